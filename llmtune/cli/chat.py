"""``chat``: answer one prompt, or hold a conversation on the terminal."""

import sys

from llmtune.cli.arguments import Options
from llmtune.config.composed import Composed
from llmtune.errors import ConfigError
from llmtune.security.terminal import show_controls
from llmtune.track.console import Console
from llmtune.track.status import Status


def run(composed: Composed, _options: Options) -> int:
    """Answer ``chat.prompt``, or each line of the standard input with the conversation so far."""
    settings = composed.config.chat
    console = Console(sys.stderr)
    with Status(console, "loading the libraries and the model"):
        from llmtune.data.tokenize.chat_template import check_chat_template
        from llmtune.model.generate import generate
        from llmtune.run.artifact import load_model, resolve_target
        from llmtune.task.task import find_task

        target = resolve_target(composed)
        task = find_task(target.config.model.task)
        if not task.generates:
            raise ConfigError(
                f"chat needs a model that writes text, and {target.adapter or target.model_folder}"
                f" is trained for {task.title}; take predict, with predict.input=FILE"
            )
        model, tokenizer = load_model(target)
        check_chat_template(tokenizer, target.base_name)
    history = [{"role": "system", "content": settings.system}] if settings.system else []

    def reply(text: str) -> str:
        history.append({"role": "user", "content": text})
        with Status(console, "answering"):
            (said,) = generate(
                model, tokenizer, [history], settings.max_new_tokens, settings.temperature
            )
        history.append({"role": "assistant", "content": said})
        return said

    if settings.prompt is not None:
        sys.stdout.write(show_controls(reply(settings.prompt) + "\n"))
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        sys.stdout.write(
            show_controls(f"{target.adapter or target.model_folder} (end with Ctrl-D)\n")
        )
    while True:
        if interactive:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return 0
        if line.strip():
            sys.stdout.write(show_controls(reply(line.strip()) + "\n"))
            sys.stdout.flush()
