"""How an export is loaded and served, for the format that it has and the files that it holds."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config.groups.export import ExportFormat
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
        'tokens = tokenizer("Who wrote it?", "Ada wrote it.", return_tensors="pt").to(model.device)\n'
        "output = model(**tokens)\n"
        "first, last = output.start_logits.argmax(), output.end_logits.argmax()\n"
        'print(tokenizer.decode(tokens["input_ids"][0, first : last + 1]))\n'
    ),
    MASKED_WORDS: (
        'tokens = tokenizer(f"Hello {tokenizer.mask_token}", return_tensors="pt").to(model.device)\n'
        'place = tokens["input_ids"][0].tolist().index(tokenizer.mask_token_id)\n'
        "print(tokenizer.decode(model(**tokens).logits[0, place].argmax()))\n"
    ),
    STATES: (
        'tokens = tokenizer("Hello", return_tensors="pt").to(model.device)\n'
        "states = model(**tokens).last_hidden_state  # (batch, tokens, width)\nprint(states.shape)\n"
    ),
}

#: Of a graph's output.
_SHAPES = {TEXT_CLASSES: "batch, labels", TOKEN_CLASSES: "batch, tokens, labels", STATES: "batch, tokens, width"}

_FROM_HUB = (ExportFormat.safetensors, ExportFormat.bnb_4bit, ExportFormat.adapter)

#: Ranks that vLLM keeps room for.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the commands depend on."""

    folder: Path
    """With the files that were written."""
    format: ExportFormat
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
        return self.repo if self.repo is not None and self.format in _FROM_HUB else "."

    @property
    def writes_text(self) -> bool:
        """More text, rather than labels or numbers for what is there."""
        return self.task in (TEXT, TEXT_TO_TEXT)


def describe_usage(usage: Usage) -> str:
    """Markdown: the code and the commands for this format."""
    by_format = {
        ExportFormat.safetensors: _transformers,
        ExportFormat.bnb_4bit: _bitsandbytes,
        ExportFormat.adapter: _adapter,
        ExportFormat.gguf: _gguf,
        ExportFormat.onnx: _onnx,
        ExportFormat.torchscript: _torchscript,
        ExportFormat.pt: _pt,
    }
    if usage.repo is None:
        start = "Run this in the folder that this file lies in.\n\n"
    else:
        folder = usage.repo.rpartition("/")[2]
        start = (
            "" if usage.format in _FROM_HUB else _shell(f"hf download {usage.repo} --local-dir {folder}\ncd {folder}")
        )
    code = "The model brings Python code of its own, which `trust_remote_code=True` allows to run: read it first.\n\n"
    return start + (code if usage.own_code else "") + by_format[usage.format](usage)


def _transformers(usage: Usage) -> str:
    return f"With transformers:\n\n{_python(_load(usage) + _ask(usage))}{_vllm(usage)}"


def _bitsandbytes(usage: Usage) -> str:
    text = "The weights are stored in 4 bits (NF4), for GPUs; transformers needs bitsandbytes to read them.\n\n"
    return f"{text}{_shell('pip install bitsandbytes')}{_python(_load(usage) + _ask(usage))}{_vllm(usage)}"


def _adapter(usage: Usage) -> str:
    rows = f"base.resize_token_embeddings({usage.base_rows})\n" if usage.base_rows else ""
    load = (
        f"from peft import PeftModel\nfrom transformers import {usage.task.loader}, AutoTokenizer\n\n"
        f'base = {usage.task.loader}.from_pretrained({json.dumps(usage.base)}, dtype="auto"{_allow(usage)})\n{rows}'
        f"model = PeftModel.from_pretrained(base, {json.dumps(usage.place)})\n{_tokenizer(usage)}"
    )
    text = f"These are the adapter's weights alone; they need the base.\n\nWith peft:\n\n{_python(load + _ask(usage))}"
    unusual = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")
    if not usage.writes_text or usage.base_rows or any(usage.adapter.get(key) for key in unusual):
        return text
    rank = next((size for size in _VLLM_RANKS if size >= int(usage.adapter.get("r") or 1)), None)
    if rank is None:
        return text
    serve = (
        f"vllm serve {shlex.quote(usage.base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {usage.name}={usage.place}\n"
    )
    return f"{text}With vLLM:\n\n{_shell(serve + _request(usage))}"


def _gguf(usage: Usage) -> str:
    file = _first(usage.folder, "*.gguf", "model.gguf")
    ask = '-cnv -p "You are a helpful assistant."' if usage.has_template else '-no-cnv -n 100 -p "Once upon a time"'
    modelfile = "" if (usage.folder / "Modelfile").is_file() else f'echo "FROM ./{file}" > Modelfile\n'
    return (
        f"With llama.cpp:\n\n{_shell(f'llama-cli -m {file} {ask}')}"
        f"As a server with OpenAI's interface:\n\n{_shell(f'llama-server -m {file} --port 8000{chr(10)}{_request(usage)}')}"
        f"With Ollama:\n\n{_shell(f'{modelfile}ollama create {usage.name} -f Modelfile{chr(10)}ollama run {usage.name}')}"
    )


def _onnx(usage: Usage) -> str:
    file = _first(usage.folder, "*.onnx", "model.onnx")
    code = (
        f"import onnxruntime\nfrom transformers import AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("."{_allow(usage)})\nsession = onnxruntime.InferenceSession("{file}")\n'
        'tokens = tokenizer(["Hello"], return_tensors="np")\n'
        "feed = {given.name: tokens[given.name] for given in session.get_inputs()}\n"
        "output = session.run(None, feed)[0]  # (batch, labels)\nprint(output.argmax(-1))\n"
    )
    return f"With onnxruntime, without torch:\n\n{_python(_words(usage, code))}{_no_cache(usage)}"


def _torchscript(usage: Usage) -> str:
    file = _first(usage.folder, "*.pt", "model.ts.pt")
    code = (
        f"import torch\nfrom transformers import AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("."{_allow(usage)})\nmodel = torch.jit.load("{file}").eval()\n'
        'tokens = tokenizer(["Hello"], return_tensors="pt")\n'
        "with torch.no_grad():\n"
        '    output = model(tokens["input_ids"], tokens["attention_mask"])  # (batch, labels)\nprint(output.argmax(-1))\n'
    )
    return f"With torch alone:\n\n{_python(_words(usage, code))}{_no_cache(usage)}"


def _pt(usage: Usage) -> str:
    file = _first(usage.folder, "*.pt", "model.pt")
    code = (
        f"import torch\nfrom transformers import AutoConfig, {usage.task.loader}, AutoTokenizer\n\n"
        f'config = AutoConfig.from_pretrained("."{_allow(usage)})\n'
        f"model = {usage.task.loader}.from_config(config, dtype=config.dtype{_allow(usage)})\n"
        f'tensors = torch.load("{file}", weights_only=True)\n'
        "# A head that is tied to the embedding is not stored twice.\n"
        "model.load_state_dict(tensors, strict=False)\nmodel.tie_weights()\nmodel.eval()\n" + _tokenizer(usage)
    )
    text = "The file holds a state dict, which torch.load reads with weights_only=True.\n\n"
    return f"{text}{_python(code + _ask(usage))}"


def _load(usage: Usage) -> str:
    return (
        f"from transformers import {usage.task.loader}, AutoTokenizer\n\n"
        f'model = {usage.task.loader}.from_pretrained({json.dumps(usage.place)}, dtype="auto"{_allow(usage)})\n'
        + _tokenizer(usage)
    )


def _tokenizer(usage: Usage) -> str:
    return f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(usage.place)}{_allow(usage)})\n"


def _allow(usage: Usage) -> str:
    return ", trust_remote_code=True" if usage.own_code else ""


def _ask(usage: Usage) -> str:
    if not usage.writes_text:
        return _LOOK[usage.task]
    if usage.has_template:
        prompt = (
            "prompt = tokenizer.apply_chat_template(\n"
            '    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
            ").to(model.device)\n"
        )
    else:
        prompt = 'prompt = tokenizer("Once upon a time", return_tensors="pt").to(model.device)\n'
    return (
        f"{prompt}output = model.generate(**prompt, max_new_tokens=100)\n"
        'print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )


def _words(usage: Usage, code: str) -> str:
    """The same code for models whose output is not a label for each text."""
    code = code.replace("(batch, labels)", f"({_SHAPES.get(usage.task, 'batch, tokens, vocabulary')})")
    if usage.task is STATES:
        return code.replace("print(output.argmax(-1))", "print(output.shape)")
    if not usage.writes_text:
        return code
    return code.replace('["Hello"]', '["Once upon a time"]').replace(
        "print(output.argmax(-1))", "print(tokenizer.decode(output[0, -1].argmax()))"
    )


def _no_cache(usage: Usage) -> str:
    if not usage.writes_text:
        return ""
    return "The graph has no cache of keys and values: each further token costs a pass over the whole text.\n\n"


def _vllm(usage: Usage) -> str:
    if not usage.writes_text:
        return ""
    code = " --trust-remote-code" if usage.own_code else ""
    serve = f"vllm serve {usage.place} --served-model-name {usage.name}{code}\n"
    return f"With vLLM:\n\n{_shell(serve + _request(usage))}"


def _request(usage: Usage) -> str:
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


def _first(folder: Path, pattern: str, default: str) -> str:
    """The first file of a kind, where it has a name that a shell and a text take as it is."""
    found = sorted(file.name for file in folder.glob(pattern))
    return found[0] if found and re.fullmatch(r"[\w.-]+", found[0]) else default


def _python(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```\n\n"


def _shell(code: str) -> str:
    return f"```sh\n{code.rstrip()}\n```\n\n"
