"""A process that notes what it is told, in the file of the first message: ``python -m`` runs it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llmtune.track.apart.process import Handler, Message, serve


class Notes(Handler):
    """Obeys the messages too: ``print``, ``sleep`` and ``fail`` are done."""

    file: Path

    def __call__(self, messages: list[Message], /) -> None:
        if messages and messages[0]["kind"] == "open":
            self.file = Path(messages[0]["file"])
        with self.file.open("a") as file:
            file.write(json.dumps(messages) + "\n")
        for message in messages:
            if message["kind"] == "print":
                sys.stdout.write("a library says something\n")
                sys.stdout.flush()
            elif message["kind"] == "sleep":
                time.sleep(message["seconds"])
            elif message["kind"] == "fail":
                raise ValueError("no such thing")


if __name__ == "__main__":
    serve(Notes())
