"""``serve``: start a server with OpenAI's API for what was trained."""

import os
import shlex
import sys

from llmtune.cli.arguments import Options
from llmtune.config.composed import Composed
from llmtune.security.terminal import to_terminal
from llmtune.serve.command import ServeCommand, make_command
from llmtune.track.console import Console
from llmtune.track.status import Status


def run(composed: Composed, _options: Options) -> int:
    """Replace this process by the server, which signals then reach at once."""
    with Status(Console(sys.stderr), "checking the model"):
        command = make_command(composed)
    sys.stderr.write(to_terminal(describe(command)))
    sys.stderr.flush()
    os.execvp(command.words[0], command.words)


def describe(command: ServeCommand) -> str:
    """Describe what is started, and how a client asks it."""
    settings = command.settings
    lines = [
        f"{command.engine.title} serves {command.served.path}",
        f"  command  {shlex.join(command.words)}",
        f"  address  {command.address} (OpenAI's API)",
        f"  model    {command.model_id}",
    ]
    if command.engine.metrics:
        lines.append(f"  metrics  {command.address.removesuffix('/v1')}{command.engine.metrics}")
    if settings.host not in ("127.0.0.1", "::1", "localhost"):
        lines.append(
            f"  note     everybody who reaches {settings.host}:{settings.port} may ask it; it is"
            " for a private network"
        )
    if not command.served.has_chat_template:
        lines.append(
            "  note     the model has no chat template: it completes texts (/v1/completions), and"
            " answers no conversations"
        )
    return "\n".join(lines) + "\n"
