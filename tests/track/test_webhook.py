"""A web address is told how a run ends, and never keeps one from ending."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.groups.tracker import TrackerConfig
from llmtune.config.stored import dump_redacted
from llmtune.errors import StoppedError
from llmtune.run.finish import recorded_end
from llmtune.storage import layout
from llmtune.track import webhook
from llmtune.track.service import find_service_problems
from llmtune.track.webhook import VARIABLE, hide_address, tell_webhook
from llmtune.train.run_folder import RunFolder


class Receiver:
    """A web server that answers as it is told, and keeps what it got."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.delay = 0.0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                receiver.got.append(json.loads(body))
                time.sleep(receiver.delay)
                self.send_response(receiver.answers.pop(0) if receiver.answers else 200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/services/T00/s3cr3t"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(webhook, "WAIT_SECONDS", (0.01, 0.01))
    one = Receiver()
    yield one
    one.server.shutdown()
    one.server.server_close()


def tell(address: str | None, folder: Path, said: list[str], message: str = "It is done.") -> None:
    tell_webhook(address, folder, "finished", message, 10.0, said.append)


def test_the_message_says_which_run_and_how_far_it_got(receiver: Receiver, tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}, {"step": 3, "loss": 2.0}]
    run = tmp_path / "first"
    run.mkdir()
    (run / layout.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []
    tell(receiver.address, run, said)
    assert said == []
    (body,) = receiver.got
    assert {key: body[key] for key in ("event", "run", "step", "loss", "eval_loss")} == {
        "event": "finished",
        "run": "first",
        "step": 3,
        "loss": 2.0,
        "eval_loss": 2.5,
    }
    assert body["text"] == body["content"] == "first: finished at step 3. It is done."
    assert abs(body["time"] - time.time()) < 60


def test_no_secret_is_sent(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz0123456789")
    tell(receiver.address, tmp_path, [], "with hf_abcdefghijklmnopqrstuvwxyz0123456789 in it")
    assert "hf_abc" not in json.dumps(receiver.got)


@pytest.mark.parametrize(
    ("answers", "posts", "reason"),
    [
        ([503, 200], 2, None),
        ([429, 500, 200], 3, None),
        ([503, 503, 503], 3, "it answered 503"),
        ([404], 1, "it answered 404"),
    ],
)
def test_it_is_tried_again_where_that_may_help(
    answers: list[int], posts: int, reason: str | None, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answers = answers
    said: list[str] = []
    tell(receiver.address, tmp_path, said)
    assert len(receiver.got) == posts
    expected = [f"tracker.webhook was not told that the run finished: {reason}"] if reason else []
    assert said == expected


def test_nobody_there_is_said_and_nothing_more(receiver: Receiver, tmp_path: Path) -> None:
    address = receiver.address
    receiver.server.shutdown()
    receiver.server.server_close()
    said: list[str] = []
    tell(address, tmp_path, said)
    assert len(said) == 1
    assert "refused" in said[0]
    assert "s3cr3t" not in said[0]


def test_nobody_waits_for_a_slow_one(receiver: Receiver, tmp_path: Path) -> None:
    receiver.delay = 5.0
    began = time.monotonic()
    tell_webhook(receiver.address, tmp_path, "fallback", "x", 0.1, lambda _: None)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("error", "event"),
    [(None, "finished"), (ValueError("no room\nat all"), "failed"), (StoppedError("x"), "stopped")],
)
def test_every_end_is_told(
    error: Exception | None, event: str, receiver: Receiver, tmp_path: Path
) -> None:
    config = compose_config(
        ["model=tiny", f"tracker.webhook={receiver.address}", "report.write=false"]
    ).config
    with suppress(ValueError, StoppedError), recorded_end(tmp_path, config, lambda _: None):
        if error is not None:
            raise error
    (body,) = receiver.got
    assert body["event"] == event
    if event == "failed":
        assert body["message"] == "no room"


def test_the_address_can_be_in_the_environment_and_none_is_nothing(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(None, tmp_path, [])
    assert receiver.got == []
    monkeypatch.setenv(VARIABLE, receiver.address)
    tell(None, tmp_path, [])
    assert len(receiver.got) == 1


@pytest.mark.parametrize("address", ["ftp://x/y", "hooks.slack.com/x", "https://", "file:///etc"])
def test_what_cannot_be_posted_to_is_refused_without_showing_it(address: str) -> None:
    (problem,) = find_service_problems(TrackerConfig(webhook=address))
    assert "must begin with https:// or http://" in problem
    assert address == "https://" or address not in problem


def test_the_address_is_in_no_file_of_the_run_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "https://hooks.example.com/services/T00/s3cr3t"
    monkeypatch.setenv(VARIABLE, "")
    config = compose_config(["model=tiny", f"tracker.webhook={address}"]).config
    hide_address(config.tracker.webhook)
    text = dump_redacted(config)
    assert "s3cr3t" not in text
    (tmp_path / layout.CONFIG).write_text(text)
    (tmp_path / layout.METRICS).write_text('{"step": 1, "loss": 1.0}\n')
    assert RunFolder(tmp_path).find_changes(config) == []
    none = replace(config, tracker=replace(config.tracker, webhook=None))
    assert all("s3cr3t" not in change for change in RunFolder(tmp_path).find_changes(none))
