"""The model card of an export: what it was made from, how, what came out, and how to load it.

It has no clock, no host and no path of this machine, so that the same inputs make the same bytes;
secrets are taken out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.config.groups.export import ExportConfig, ExportDtype, MergeOnto
from llmtune.errors import ExportError
from llmtune.export.architecture import TEXT, TEXT_TO_TEXT, Task, headed_task, task_of
from llmtune.export.card.curves import draw_curves
from llmtune.export.card.facts import (
    Facts,
    describe_data,
    describe_metrics,
    describe_plan,
    describe_settings,
    describe_versions,
    find_hub_datasets,
    list_sources,
    read_facts,
    read_metrics_after,
)
from llmtune.export.card.license import License, copy_license_files, find_license
from llmtune.export.formats.format import find_format
from llmtune.export.identity import find_repo, is_hub_id
from llmtune.export.model import ExportRequest
from llmtune.export.usage import Usage, describe_usage
from llmtune.model.adapter.stored_adapter import WEIGHTS_FILE
from llmtune.security.redaction import redact, redact_values
from llmtune.security.trust import read_foreign
from llmtune.storage.plain_json import parse_json
from llmtune.storage.yaml_text import to_yaml

CARD, CURVES = "README.md", "loss.png"

#: An embedding that an adapter brings whole.
_EMBEDDING = re.compile(r"(embed_tokens|wte)\.(modules_to_save\.|base_layer\.)?weight$")
_TUNERS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}


def write_model_card(
    folder: Path, request: ExportRequest, config: ExportConfig, parity: str | None = None
) -> None:
    """Write ``README.md``, the curves and the base's license files into an export that is otherwise
    complete.

    Args:
        folder: Where the export is being written; its files decide what the commands in the card
            name.
        parity: What a comparison with base and adapter found, in one sentence.
    """
    facts = read_facts(request)
    name = _find_name(request, config, facts)
    base = (
        request.base_name
        if is_hub_id(request.base_name)
        else request.base_name.rstrip("/").rpartition("/")[2]
    )
    base_license = find_license(_base_folders(request, facts))
    copy_license_files(base_license.files, folder)
    usage = _find_usage(folder, request, config, name)
    has_curves = draw_curves(facts.metrics, folder / CURVES)
    front = _front_matter(request, config, facts, base_license, usage)
    parts = [
        f"# {_escape(name)}\n",
        _introduction(base, config, facts),
        f"## Load it\n\n{describe_usage(usage, find_format(config.format).describe_usage).rstrip()}\n",  # noqa: E501
        _table("Results", ("metric", "before", "after"), describe_metrics(facts)),
        f"![Loss over the steps]({CURVES})\n" if has_curves else "",
        _table("Data", ("", ""), describe_data(facts)),
        _table("Settings", ("", ""), describe_settings(facts)),
        _table("Plan", ("", ""), describe_plan(facts)),
        _describe_making(request, config, facts, parity),
        _versions(facts),
        _describe_license(base, base_license),
    ]
    body = redact("\n".join(part for part in parts if part))
    header = to_yaml(redact_values(front), width=float("inf"))
    (folder / CARD).write_text(f"---\n{header}---\n\n{body}", encoding="utf-8")


def _find_name(request: ExportRequest, config: ExportConfig, facts: Facts) -> str:
    """The repository's name, the run's, or the folder's."""
    repo = find_repo(config)
    if repo is not None:
        return repo.rpartition("/")[2]
    run_name = facts.plan.run_name or facts.get("run_name")
    return str(run_name) if run_name else request.output.name


def _base_folders(request: ExportRequest, facts: Facts) -> list[Path]:
    """Where files of the base may lie: a model that was trained as a whole has left them behind."""
    trained_from = facts.plan.model_folder
    return [
        request.base,
        *([Path(trained_from)] if request.adapter is None and trained_from else []),
    ]


def _find_usage(folder: Path, request: ExportRequest, config: ExportConfig, name: str) -> Usage:
    base_config = _read_json(request.base / "config.json")
    settings = _read_json(folder / "config.json") or base_config
    adapter = (
        _read_json(request.adapter / "adapter_config.json") if request.adapter is not None else {}
    )
    base = request.base_name
    return Usage(
        folder=folder,
        loads_from_hub=find_format(config.format).loads_from_hub,
        name=re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "model",
        repo=find_repo(config),
        base=base if is_hub_id(base) else f"path/to/{base.rstrip('/').rpartition('/')[2]}",
        has_template=_has_template([folder, request.adapter, request.base]),
        task=_find_task(settings, adapter),
        own_code=bool(settings.get("auto_map")),
        adapter=adapter,
        base_rows=_resized_rows(request.adapter, base_config)
        if request.adapter is not None
        else None,
    )


def _find_task(settings: dict[str, Any], adapter: dict[str, Any]) -> Task:
    """An adapter with a head of its own has another task than its base."""
    found = (
        headed_task(adapter.get("task_type"))
        or task_of(str((settings.get("architectures") or [""])[0]))
        or TEXT
    )
    # Models of images and text go by the same name, and are loaded as those of text.
    return TEXT if found is TEXT_TO_TEXT and not settings.get("is_encoder_decoder") else found


def _has_template(folders: Sequence[Path | None]) -> bool:
    """Whether the tokenizer has a chat template; the first folder with a tokenizer decides."""
    for folder in folders:
        if folder is None:
            continue
        if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
            return True
        file = folder / "tokenizer_config.json"
        if file.is_file():
            return bool(_read_json(file).get("chat_template"))
    return False


def _resized_rows(adapter: Path, base_config: dict[str, Any]) -> int | None:
    """Rows of the embedding in an adapter that added tokens; peft loads it only onto a base of that
    size.
    """
    from safetensors import safe_open

    file = adapter / WEIGHTS_FILE
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if _EMBEDDING.search(name)]  # noqa: SIM118
        rows = [int(tensors.get_slice(name).get_shape()[0]) for name in names]
    return rows[0] if rows and rows[0] != base_config.get("vocab_size") else None


def _front_matter(
    request: ExportRequest, config: ExportConfig, facts: Facts, base_license: License, usage: Usage
) -> dict[str, Any]:
    """What the hub reads."""
    task = usage.task.hub
    front: dict[str, Any] = {}
    if is_hub_id(request.base_name):
        front["base_model"] = request.base_name
        front["base_model_relation"] = _relation(config, facts)
    front |= {
        "library_name": find_format(config.format).library,
        "pipeline_tag": task,
        **base_license.front_matter,
    }
    tags = ["llmtune"]
    if facts.tuner is not None:
        tags += [facts.tuner if facts.tuner != "full" else "full-fine-tuning"]
    if config.format != "safetensors":
        tags.append(config.format.replace("_", "-"))
    if usage.has_template and usage.writes_text:
        tags.append("conversational")
    front["tags"] = tags
    if datasets := find_hub_datasets(facts):
        front["datasets"] = datasets
    if metrics := read_metrics_after(facts):
        front["model-index"] = [{"name": usage.name, "results": [_result(task, facts, metrics)]}]
    return front


def _relation(config: ExportConfig, facts: Facts) -> str:
    """To the base, in the hub's words.

    Weights that were trained and then quantized are first of all another model.
    """
    kind = find_format(config.format)
    if not kind.is_merged:
        return "adapter"
    quantized = kind.quantization(config) is not None
    return "quantized" if quantized and facts.tuner is None else "finetune"


def _result(task: str, facts: Facts, metrics: dict[str, float]) -> dict[str, Any]:
    """An entry of ``model-index``."""
    hub = find_hub_datasets(facts)
    names = list_sources(facts.get("data.eval") or facts.get("data.train")) or ["held-out rows"]
    return {
        "task": {"type": task},
        "dataset": {
            "type": hub[0] if len(hub) == 1 else "custom",
            "name": f"{', '.join(names)} (held-out rows)",
        },
        "metrics": [
            {"type": key, "name": f"held-out {key}", "value": value}
            for key, value in metrics.items()
        ],
    }


def _introduction(base: str, config: ExportConfig, facts: Facts) -> str:
    shown = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else _escape(base)
    revision = facts.get("model.revision")
    shown += f" (revision {_escape(str(revision))})" if revision else ""
    kind = find_format(config.format).describe(config)
    if facts.tuner is None:
        return f"{shown} as {kind}, written by llmtune {__version__}.\n"
    step = f" to step {facts.step}" if facts.step is not None else ""
    return f"{shown}, fine-tuned with llmtune ({_TUNERS.get(facts.tuner, facts.tuner)}){step}, as {kind}.\n"  # noqa: E501


def _describe_making(
    request: ExportRequest, config: ExportConfig, facts: Facts, parity: str | None
) -> str:
    """How the weights became what they are."""
    lines = []
    if request.adapter is not None and find_format(config.format).is_merged:
        if facts.tuner == "qlora" or config.merge_onto is MergeOnto.nf4:
            lines.append(_describe_merge(config.merge_onto, facts.tuner == "qlora"))
        else:
            lines.append(
                "The adapter was added to the base's weights, computed in fp32 and rounded once."
            )
    elif request.adapter is not None and facts.tuner == "qlora":
        lines.append(
            "The adapter was trained on the base in 4 bits (NF4). On the unquantized base it computes slightly other numbers; "  # noqa: E501
            'with `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` it has those of the training.'  # noqa: E501
        )
    if config.dtype is not ExportDtype.auto and find_format(config.format).tells_dtype:
        lines.append(f"The weights are stored in {config.dtype.value}.")
    if parity:
        lines.append(f"Run before it was published: {_escape(parity)}.")
    return "## How it was made\n\n" + "\n\n".join(lines) + "\n" if lines else ""


def _describe_merge(merge_onto: MergeOnto, trained_in_4_bits: bool) -> str:
    start = (
        "The adapter was trained on the base in 4 bits (NF4)"
        if trained_in_4_bits
        else "The adapter"
    )
    if merge_onto is MergeOnto.nf4:
        return (
            f"{start}{' and' if trained_in_4_bits else ''} was added to the base after that had been quantized to NF4 and back "  # noqa: E501
            "(`export.merge_onto=nf4`). These are the weights that such a training sees, with their quantization error: the "  # noqa: E501
            "model computes what it computed in training, but what the quantization took from the base stays lost."  # noqa: E501
        )
    return (
        f"{start} and was added to the unquantized base (`export.merge_onto=original`). The base keeps its own precision, but "  # noqa: E501
        "the adapter had learned beside the quantized weights, and part of it makes up for an error that is not here: the "  # noqa: E501
        "numbers differ a little from those of the training. `export.merge_onto=nf4` would keep those."  # noqa: E501
    )


def _versions(facts: Facts) -> str:
    rows = describe_versions(facts)
    if not facts.environment:
        return _table(
            "Versions", ("", "exported with"), [(package, now) for package, _, now in rows]
        )
    return _table("Versions", ("", "trained with", "exported with"), rows)


def _describe_license(base: str, base_license: License) -> str:
    text = f"The license of {_escape(base)} applies"
    if base_license.shown:
        text += f": {_escape(base_license.shown)}"
    elif not base_license.files:
        text += ". Its files do not say which one it is; look it up before you publish this"
    if base_license.files:
        text += f". Its text lies beside this file: {', '.join(_escape(file.name) for file in base_license.files)}"  # noqa: E501
    return f"## License\n\n{text}.\n"


def _table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A section with a table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *(tuple(map(_escape, row)) for row in rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _escape(text: str) -> str:
    """Text that markdown shows as it is, on one line; secrets go before their letters are
    escaped.
    """
    text = " ".join(redact(text).split())
    text = re.sub(
        r"([\\`*\[\]|#])",
        r"\\\1",
        text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    )
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ExportError, ValueError):
        found = parse_json(read_foreign(path, ExportError))
        return found if isinstance(found, dict) else {}
    return {}
