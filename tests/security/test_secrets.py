"""Values of secret variables are found in whatever form they leave; ordinary text stays as it
is.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.stored import dump_redacted, load_config, redact_config
from llmtune.security.redaction import (
    SECRET_NAMES,
    has_secrets,
    redact,
    redact_values,
    remember_names,
    restrict_umask,
    split_unfinished,
)

VALUE = "hf_abcDEF123456"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name not in ("PATH", "HOME"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "wandb_apikey",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "DB_PASSWORD",
        *("MYSQL_PASSWD", "SSH_PRIVATE_KEY", "AZURE_CREDENTIAL", "OPENAI_KEY", "GITHUB_PAT"),
    ],
)
def test_values_of_secret_variables_are_replaced_by_their_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, VALUE)
    assert redact(f"a {VALUE}, b={VALUE}") == f"a ***{name}***, b=***{name}***"


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "HOSTNAME", "KEYBOARD_LAYOUT", "MONKEY", "PATH_TO_DATA"]
)
def test_harmless_variables_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, VALUE)
    assert not has_secrets()
    assert redact(VALUE) == VALUE


@pytest.mark.parametrize("value", ["", "true", "disabled", "/usr/bin", "~"])
def test_words_and_paths_are_no_secrets(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", value)
    assert not has_secrets()
    assert redact("true /usr/bin disabled") == "true /usr/bin disabled"


@pytest.mark.process
def test_what_came_from_a_file_is_secret_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", VALUE)
    assert redact(VALUE) == VALUE
    remember_names(["MINE", "NEVER_SET"])
    assert os.environ[SECRET_NAMES] == "MINE,NEVER_SET"
    assert redact(VALUE) == "***MINE***"
    remember_names(["OTHER"])
    assert redact(VALUE) == "***MINE***"
    child = f"from llmtune.security.redaction import redact; print(redact({VALUE!r}))"
    assert subprocess.check_output([sys.executable, "-c", child], text=True) == "***MINE***\n"


def test_settings_of_libraries_are_no_secrets_wherever_they_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "my-project")
    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    remember_names(["WANDB_PROJECT", "WANDB_API_KEY"])
    assert redact(f"my-project {VALUE}") == "my-project ***WANDB_API_KEY***"


def test_escaped_forms_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    value = "pä/ss w\"ö'rd+\\&="
    monkeypatch.setenv("DB_PASSWORD", value)
    forms = [
        json.dumps({"x": value}),
        json.dumps([value], ensure_ascii=False),
        str({"x": value}),
        repr([value]),
    ]
    for text in [value, f"?p={quote(value, safe='')}", *forms]:
        shown = redact(text)
        assert "***DB_PASSWORD***" in shown
        assert "rd" not in shown.replace("PASSWORD", "")


def test_a_value_of_several_lines_is_found_whole_escaped_and_line_by_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSH_PRIVATE_KEY", "-----BEGIN-----\nMIIEowIBAAKCAQ\nxyz12345abc\n")
    whole = os.environ["SSH_PRIVATE_KEY"]
    for text in (whole, repr(whole), json.dumps(whole), "  MIIEowIBAAKCAQ", "xyz12345abc\r\n"):
        shown = redact(text)
        assert "***SSH_PRIVATE_KEY***" in shown
        assert "MIIE" not in shown
        assert "xyz" not in shown


def test_a_secret_within_another_does_not_uncover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", VALUE)
    monkeypatch.setenv("B_TOKEN", f"{VALUE}-more-of-it")
    assert redact(f"{VALUE}-more-of-it {VALUE}") == "***B_TOKEN*** ***A_TOKEN***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host/x.jsonl", "https://***@host/x.jsonl"),
        ("postgres://u:p@ss:word@db:5432/x", "postgres://***@db:5432/x"),
        ("redis://:pw@h", "redis://***@h"),
        ("https://ghp_123@github.com/a.git", "https://***@github.com/a.git"),
        ("http://tok@h", "http://***@h"),
        ('{"url": "https://u:p@h", "mail": "a@b"}', '{"url": "https://***@h", "mail": "a@b"}'),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("ssh://git@host/x", "ssh://git@host/x"),
        ("https://host:80?mail=a@b", "https://host:80?mail=a@b"),
        ("a@b.de", "a@b.de"),
    ],
    # pytest puts the names of tests into the environment, where passwords in URLs are secrets.
    ids=map(str, range(10)),
)
def test_passwords_in_urls(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


def test_nests_keep_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)

    class Kind(StrEnum):
        one = "one"

    nest = {"a": [VALUE, 1, None, (VALUE, 2.5)], VALUE: True, "kind": Kind.one}
    assert redact_values(nest) == {
        "a": ["***HF_TOKEN***", 1, None, ("***HF_TOKEN***", 2.5)],
        "***HF_TOKEN***": True,
        "kind": Kind.one,
    }


def test_the_beginning_of_a_secret_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    assert split_unfinished(f"45% {VALUE[:6]}") == ("45% ", VALUE[:6])
    assert split_unfinished("loss 1.5 https://user:pa") == ("loss 1.5 https", "://user:pa")
    assert split_unfinished("45% done") == ("45% done", "")
    assert split_unfinished("") == ("", "")


def test_a_kept_config_holds_no_secret_and_still_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_TOKEN", VALUE)
    overrides = [
        "data.train=[https://user:pw@host/x.jsonl]",
        f"model.name_or_path=me/{VALUE}",
        "zero=2",
    ]
    config = compose_config(overrides).config
    file = tmp_path / "config.yaml"
    file.write_text(dump_redacted(config))
    assert VALUE not in file.read_text()
    assert "user:pw" not in file.read_text()
    stored = load_config(file)
    assert stored.model.name_or_path == "me/***DATA_TOKEN***"
    assert redact_config(stored) == redact_config(config) == stored
    assert redact_config(compose_config([*overrides, "seed=7"]).config) != stored


def test_others_may_not_write_what_is_created(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        restrict_umask()
        (tmp_path / "file").touch(0o666)
        (tmp_path / "folder").mkdir(0o777)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
        assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755
        os.umask(0o077)
        restrict_umask()
        assert os.umask(0) == 0o077, "what was forbidden before stays forbidden"
    finally:
        os.umask(before)
