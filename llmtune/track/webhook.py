"""Tell a web address how a run ends, or that it went on elsewhere: ``tracker.webhook``.

A message is one JSON object, sent with POST. ``text`` and ``content`` hold a sentence for people,
which chat services show (Slack and Mattermost the one, Discord the other).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmtune.security.redaction import redact_values
from llmtune.storage import layout
from llmtune.track.metrics import read_metrics

#: The address is told by this variable too. By its name it is a secret: whoever knows the address
#: can post there, so that it is redacted wherever it would be written.
VARIABLE = "LLMTUNE_WEBHOOK"

#: Seconds of one try, and between the first and the next ones.
TRY_SECONDS, WAIT_SECONDS = 10.0, (1.0, 4.0)
_MOST_LETTERS = 2000


def find_webhook_problem(address: str | None) -> str | None:
    """Find that an address cannot be posted to; its own text is not shown."""
    if address is None or (
        urlsplit(address).scheme in ("http", "https") and urlsplit(address).hostname
    ):
        return None
    return "tracker.webhook: the address must begin with https:// or http://, and name a host"


def hide_address(address: str | None) -> None:
    """Treat the address as a secret, in this process and its ranks."""
    if address:
        os.environ[VARIABLE] = address


def tell_webhook(
    address: str | None,
    run: Path,
    event: str,
    message: str,
    wait_seconds: float,
    say: Callable[[str], None],
) -> None:
    """Post what happened, from another thread; no failure of it is one of the run.

    Args:
        event: ``finished``, ``failed``, ``stopped``, ``fallback`` or ``restart``.
        message: A sentence for people.
        wait_seconds: How long the caller waits at the most.
        say: Shows a line where the message did not arrive.
    """
    address = address or os.environ.get(VARIABLE)
    if not address:
        return
    body = _describe(run, event, message)
    thread = threading.Thread(target=_post, args=(address, event, body, say), daemon=True)
    thread.start()
    thread.join(wait_seconds)


def _describe(run: Path, event: str, message: str) -> dict[str, Any]:
    """Return the message, without the secrets of this environment."""
    records = read_metrics(run / layout.METRICS)
    values: dict[str, Any] = {"event": event, "run": run.name, "folder": str(run)}
    values |= {"time": time.time(), "message": message.strip()[:_MOST_LETTERS]}
    values["step"] = records[-1]["step"] if records else 0
    for key in ("loss", "eval_loss"):
        found = [record[key] for record in records if record.get(key) is not None]
        values[key] = found[-1] if found else None
    values["text"] = values["content"] = f"{run.name}: {event} at step {values['step']}. {message}"
    clean: dict[str, Any] = redact_values(values)
    return clean


def _post(address: str, event: str, body: dict[str, Any], say: Callable[[str], None]) -> None:
    # Slow to import, and few runs need them.
    import urllib.error
    import urllib.request

    request = urllib.request.Request(
        address,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "llmtune"},
    )
    reason = ""
    for wait in (*WAIT_SECONDS, None):
        try:
            with urllib.request.urlopen(request, timeout=TRY_SECONDS):
                return
        except urllib.error.HTTPError as error:
            reason = f"it answered {error.code}"
            # What is wrong with the address or the message will be wrong again.
            if error.code < 500 and error.code != 429:
                break
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error))
        if wait is not None:
            time.sleep(wait)
    say(f"tracker.webhook was not told that the run {_PAST[event]}: {reason}")


_PAST = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "was stopped",
    "fallback": "took another rung",
    "restart": "starts again",
}
