"""How an export is loaded and served: the parts from which each format puts together what its card
says.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.export.architecture import (
    ANSWERS,
    MASKED_WORDS,
    STATES,
    TEXT,
    TEXT_CLASSES,
    TEXT_TO_TEXT,
    TOKEN_CLASSES,
    Task,
)

#: What the code for transformers does with a model that writes no text.
_LOOK = {
    TEXT_CLASSES: (
        'tokens = tokenizer("Hello", return_tensors="pt").to(model.device)\n'
        "probabilities = model(**tokens).logits[0].detach().softmax(-1)\n"
        "print(model.config.id2label[int(probabilities.argmax())], float(probabilities.max()))\n"
    ),
    TOKEN_CLASSES: (
        'tokens = tokenizer("Hello", return_tensors="pt").to(model.device)\n'
        "labels = model(**tokens).logits[0].argmax(-1).tolist()\n"
        'words = tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])\n'
        "print([(word, model.config.id2label[label]) for word, label in zip(words, labels)])\n"
    ),
    ANSWERS: (
        'tokens = tokenizer("Who wrote it?", "Ada wrote it.", return_tensors="pt").to(model.device)\n'  # noqa: E501
        "output = model(**tokens)\n"
        "first, last = output.start_logits.argmax(), output.end_logits.argmax()\n"
        'print(tokenizer.decode(tokens["input_ids"][0, first : last + 1]))\n'
    ),
    MASKED_WORDS: (
        'tokens = tokenizer(f"Hello {tokenizer.mask_token}", return_tensors="pt").to(model.device)\n'  # noqa: E501
        'place = tokens["input_ids"][0].tolist().index(tokenizer.mask_token_id)\n'
        "print(tokenizer.decode(model(**tokens).logits[0, place].argmax()))\n"
    ),
    STATES: (
        'tokens = tokenizer("Hello", return_tensors="pt").to(model.device)\n'
        "states = model(**tokens).last_hidden_state  # (batch, tokens, width)\nprint(states.shape)\n"  # noqa: E501
    ),
}

#: Of a graph's output.
_SHAPES = {
    TEXT_CLASSES: "batch, labels",
    TOKEN_CLASSES: "batch, tokens, labels",
    STATES: "batch, tokens, width",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the commands depend on."""

    folder: Path
    """With the files that were written."""
    loads_from_hub: bool
    """Loaders of the format take the name of a repository, and not only a folder."""
    name: str
    """What a server calls the model: letters, digits, dots and dashes."""
    repo: str | None
    """Where on the hub it will lie."""
    base: str
    """Hub id of the base, or a place to be filled in."""
    has_template: bool
    """Whether the tokenizer has a chat template."""
    task: Task
    own_code: bool
    """The base brings Python code that transformers has to be allowed to run."""
    adapter: dict[str, Any]
    """peft's settings."""
    base_rows: int | None
    """Rows of the embedding that the adapter brings, where they are not as many as the base's."""

    @property
    def place(self) -> str:
        """What loaders are given: those of transformers, peft and vLLM take a repository, too."""
        return self.repo if self.repo is not None and self.loads_from_hub else "."

    @property
    def writes_text(self) -> bool:
        """More text, rather than labels or numbers for what is there."""
        return self.task in (TEXT, TEXT_TO_TEXT)


def describe_usage(usage: Usage, of_format: Callable[[Usage], str]) -> str:
    """Markdown: where to be, and the code and the commands of a format."""
    if usage.repo is None:
        start = "Run this in the folder that this file lies in.\n\n"
    elif usage.loads_from_hub:
        start = ""
    else:
        folder = usage.repo.rpartition("/")[2]
        start = shell_block(f"hf download {usage.repo} --local-dir {folder}\ncd {folder}")
    code = "The model brings Python code of its own, which `trust_remote_code=True` allows to run: read it first.\n\n"  # noqa: E501
    return start + (code if usage.own_code else "") + of_format(usage)


def load_model(usage: Usage) -> str:
    """The model and its tokenizer, with transformers."""
    return (
        f"from transformers import {usage.task.loader}, AutoTokenizer\n\n"
        f'model = {usage.task.loader}.from_pretrained({json.dumps(usage.place)}, dtype="auto"{allow_code(usage)})\n'  # noqa: E501
        + load_tokenizer(usage)
    )


def load_tokenizer(usage: Usage) -> str:
    """The tokenizer alone."""
    return (
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(usage.place)}{allow_code(usage)})\n"
    )


def allow_code(usage: Usage) -> str:
    """The argument without which transformers runs no code of the model's own."""
    return ", trust_remote_code=True" if usage.own_code else ""


def ask(usage: Usage) -> str:
    """One answer of what was loaded: text, labels or numbers."""
    if not usage.writes_text:
        return _LOOK[usage.task]
    if usage.has_template:
        prompt = (
            "prompt = tokenizer.apply_chat_template(\n"
            '    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True\n'  # noqa: E501
            ").to(model.device)\n"
        )
    else:
        prompt = 'prompt = tokenizer("Once upon a time", return_tensors="pt").to(model.device)\n'
    return (
        f"{prompt}output = model.generate(**prompt, max_new_tokens=100)\n"
        'print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))\n'  # noqa: E501
    )


def adapt_output(usage: Usage, code: str) -> str:
    """The same code for models whose output is not a label for each text."""
    code = code.replace(
        "(batch, labels)", f"({_SHAPES.get(usage.task, 'batch, tokens, vocabulary')})"
    )
    if usage.task is STATES:
        return code.replace("print(output.argmax(-1))", "print(output.shape)")
    if not usage.writes_text:
        return code
    return code.replace('["Hello"]', '["Once upon a time"]').replace(
        "print(output.argmax(-1))", "print(tokenizer.decode(output[0, -1].argmax()))"
    )


def warn_no_cache(usage: Usage) -> str:
    """Of graphs that write text."""
    if not usage.writes_text:
        return ""
    return "The graph has no cache of keys and values: each further token costs a pass over the whole text.\n\n"  # noqa: E501


def serve_with_vllm(usage: Usage) -> str:
    """A server with OpenAI's interface, and a request."""
    if not usage.writes_text:
        return ""
    code = " --trust-remote-code" if usage.own_code else ""
    serve = f"vllm serve {usage.place} --served-model-name {usage.name}{code}\n"
    return f"With vLLM:\n\n{shell_block(serve + request_answer(usage))}"


def request_answer(usage: Usage) -> str:
    """A request to a server on this machine."""
    body: dict[str, Any] = {"model": usage.name}
    if usage.has_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, body["prompt"] = "completions", "Once upon a time"
    return (
        "# and in another terminal:\n"
        f"curl http://localhost:8000/v1/{path} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body))}"
    )


def first_file(folder: Path, pattern: str, default: str) -> str:
    """The first file of a kind, where it has a name that a shell and a text take as it is."""
    found = sorted(file.name for file in folder.glob(pattern))
    return found[0] if found and re.fullmatch(r"[\w.-]+", found[0]) else default


def python_block(code: str) -> str:
    """Code in Markdown."""
    return f"```python\n{code.rstrip()}\n```\n\n"


def shell_block(code: str) -> str:
    """Commands in Markdown."""
    return f"```sh\n{code.rstrip()}\n```\n\n"
