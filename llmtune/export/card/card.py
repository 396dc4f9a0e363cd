"""The model card of an export: what it was made from, how, what came out, and how to load it.

It has no clock, no host and no path of this machine, so that the same inputs make the same bytes.
Secrets are removed.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from llmtune import __version__
from llmtune.config.groups.export import ExportConfig, ExportDtype, MergeOnto
from llmtune.errors import ExportError
from llmtune.export.architecture import TEXT, TEXT_TO_TEXT, Task, headed_task, task_of
from llmtune.export.card.curves import draw_curves
from llmtune.export.card.facts import (
    Facts,
    find_hub_datasets,
    list_sources,
    read_facts,
    read_json,
    read_metrics_after,
)
from llmtune.export.card.license import License, copy_license_files, find_license
from llmtune.export.card.tables import (
    describe_data,
    describe_metrics,
    describe_plan,
    describe_settings,
    describe_versions,
)
from llmtune.export.formats.format import find_format
from llmtune.export.identity import find_repo
from llmtune.export.markdown import escape, render
from llmtune.export.request import ExportRequest, is_hub_id
from llmtune.export.usage import Usage
from llmtune.metrics.confusion import ConfusionTable
from llmtune.metrics.report import format_scores, write_confusion
from llmtune.security.redaction import redact, redact_values
from llmtune.security.trust import read_foreign
from llmtune.storage.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFUSION_TABLE,
    is_result_folder,
)
from llmtune.storage.yaml_text import to_yaml
from llmtune.tuner.tuner import TUNERS

CARD, CURVES = "README.md", "loss.png"

#: An embedding that an adapter brings whole.
_EMBEDDING = re.compile(r"(embed_tokens|wte)\.(modules_to_save\.|base_layer\.)?weight$")


def write_model_card(
    folder: Path, request: ExportRequest, config: ExportConfig, parity: str | None = None
) -> None:
    """Add ``README.md``, the curves and the base's license files to an otherwise complete export.

    Args:
        folder: Where the export is being written; its files decide what the commands in the card
            name.
        parity: What a comparison with base and adapter found, in one sentence.

    Raises:
        ExportError: A license file is a link that leads out of its folder.
    """
    facts = read_facts(request)
    name = _find_name(request, config, facts)
    base_license = find_license(_base_folders(request, facts))
    copy_license_files(base_license.files, folder)
    has_curves = draw_curves(facts.metrics, folder / CURVES)
    usage = _find_usage(
        folder, request, config, name, adds_tokens=bool(facts.get("tuner.new_tokens"))
    )
    kind = find_format(config.format)
    is_retyped = config.dtype is not ExportDtype.auto and kind.tells_dtype
    body = render(
        "card",
        name=name,
        base=_describe_base(request, facts),
        format=kind.describe(config),
        tuner=None if facts.tuner is None else _name_tuner(facts.tuner),
        step=facts.step,
        version=__version__,
        usage=usage,
        commands=Markup(kind.describe_usage(usage).rstrip()),
        results=describe_metrics(facts),
        curves=CURVES if has_curves else None,
        classes=_add_classes(folder, request),
        data=describe_data(facts),
        settings=describe_settings(facts),
        plan=describe_plan(facts),
        merge=_find_merge(request, config, facts),
        trained_in_4_bits=facts.tuner == "qlora",
        stored_dtype=config.dtype.value if is_retyped else None,
        parity=parity,
        versions=_list_versions(facts),
        license=base_license,
    )
    header = render_front_matter(request, config, facts, base_license, usage)
    (folder / CARD).write_text(f"---\n{header}---\n\n{redact(body)}", encoding="utf-8")


def _add_classes(folder: Path, request: ExportRequest) -> Markup | None:
    """Add which classes the run's result took for which, as a file, a picture and a table.

    Returns:
        The table; None for a task without classes, and for what is not the result of a run.
    """
    trained = request.adapter or request.base
    if request.run is None or not is_result_folder(trained, request.run):
        return None
    file = request.run / CONFUSION_TABLE
    if not file.is_file():
        return None
    try:
        table = ConfusionTable.from_json(read_foreign(file, ExportError))
    except ValueError:
        return None
    write_confusion(table, folder)
    return Markup(format_scores(table, escape))


def _find_name(request: ExportRequest, config: ExportConfig, facts: Facts) -> str:
    """Return the repository's name, the run's, or the folder's."""
    repo = find_repo(config)
    if repo is not None:
        return repo.rpartition("/")[2]
    run_name = facts.plan.run_name or facts.get("run_name")
    return str(run_name) if run_name else request.output.name


def _describe_base(request: ExportRequest, facts: Facts) -> dict[str, Any]:
    name = request.base_name
    is_on_hub = is_hub_id(name)
    return {
        "name": name if is_on_hub else _last_part(name),
        "is_on_hub": is_on_hub,
        "revision": facts.get("model.revision"),
    }


def _last_part(path: str) -> str:
    """Return the part of a path that says nothing about this machine."""
    return path.rstrip("/").rpartition("/")[2]


def _base_folders(request: ExportRequest, facts: Facts) -> list[Path]:
    """List folders that may hold files of the base: a model that was trained whole has none."""
    trained_from = facts.plan.model_folder
    if request.adapter is None and trained_from:
        return [request.base, trained_from]
    return [request.base]


def _find_merge(request: ExportRequest, config: ExportConfig, facts: Facts) -> str | None:
    """Name how the adapter was added to the base, for ``card.md.jinja``; None without one."""
    if request.adapter is None:
        return None
    if not find_format(config.format).is_merged:
        return "none" if facts.tuner == "qlora" else None
    if facts.tuner == "qlora" or config.merge_onto is MergeOnto.nf4:
        return config.merge_onto.value
    return "fp32"


def _list_versions(facts: Facts) -> dict[str, Any]:
    rows = describe_versions(facts)
    if facts.environment:
        return {"head": ("", "trained with", "exported with"), "rows": rows}
    return {"head": ("", "exported with"), "rows": [(package, now) for package, _, now in rows]}


def _find_usage(
    folder: Path, request: ExportRequest, config: ExportConfig, name: str, *, adds_tokens: bool
) -> Usage:
    """Collect what the commands in the card need to know.

    Args:
        adds_tokens: The run added tokens to its base; ``request.base`` has them, and what its
            authors published does not.
    """
    base_config = read_json(request.base / "config.json")
    settings = read_json(folder / "config.json") or base_config
    adapter: dict[str, Any] = {}
    base_rows = None
    if request.adapter is not None:
        adapter = read_json(request.adapter / ADAPTER_CONFIG)
        base_rows = _find_resized_rows(request.adapter, base_config)
        if adds_tokens:
            base_rows = base_config.get("vocab_size")
    base = request.base_name
    if not is_hub_id(base):
        # On one line, as it goes into a command.
        base = f"path/to/{' '.join(_last_part(base).split())}"
    return Usage(
        folder=folder,
        loads_from_hub=find_format(config.format).loads_from_hub,
        name=re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "model",
        repo=find_repo(config),
        base=base,
        has_template=_has_template([folder, request.adapter, request.base]),
        task=_find_task(settings, adapter),
        own_code=bool(settings.get("auto_map")),
        adapter=adapter,
        base_rows=base_rows,
    )


def _find_task(settings: dict[str, Any], adapter: dict[str, Any]) -> Task:
    """Find the task of the head that the adapter brings, or else of the architecture."""
    architecture = str((settings.get("architectures") or [""])[0])
    task = headed_task(adapter.get("task_type")) or task_of(architecture) or TEXT
    # Models of images and text go by the same name, and are loaded as those of text.
    if task is TEXT_TO_TEXT and not settings.get("is_encoder_decoder"):
        return TEXT
    return task


def _has_template(folders: Sequence[Path | None]) -> bool:
    """Tell whether the tokenizer has a chat template; the first folder with a tokenizer decides."""
    for folder in folders:
        if folder is None:
            continue
        if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
            return True
        file = folder / "tokenizer_config.json"
        if file.is_file():
            return bool(read_json(file).get("chat_template"))
    return False


def _find_resized_rows(adapter: Path, base_config: dict[str, Any]) -> int | None:
    """Count an adapter's rows of the embedding, if it added tokens; None if they are the base's.

    peft loads such an adapter only onto a base of that size.
    """
    from safetensors import safe_open

    file = adapter / ADAPTER_WEIGHTS
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if _EMBEDDING.search(name)]  # noqa: SIM118
        rows = [int(tensors.get_slice(name).get_shape()[0]) for name in names]
    return rows[0] if rows and rows[0] != base_config.get("vocab_size") else None


def _name_tuner(name: str) -> str:
    """Return the tuner's title, or its name where no loaded module registers it."""
    tuner = TUNERS.list().get(name)
    return name if tuner is None else tuner.title


def render_front_matter(
    request: ExportRequest, config: ExportConfig, facts: Facts, base_license: License, usage: Usage
) -> str:
    """Write the front matter as YAML, without secrets.

    The values are ``huggingface_hub``'s. The YAML is not: ``ModelCardData.to_yaml`` leaves line
    ends of Unicode in a text, and reads them back as spaces.
    """
    is_on_hub = is_hub_id(request.base_name)
    named = base_license.front_matter
    results = _list_results(facts, usage.task.hub)
    data = ModelCardData(
        base_model=request.base_name if is_on_hub else None,
        base_model_relation=_describe_relation(config, facts) if is_on_hub else None,
        library_name=find_format(config.format).library,
        pipeline_tag=usage.task.hub,
        tags=_list_tags(config, facts, usage),
        datasets=find_hub_datasets(facts) or None,
        model_name=usage.name if results else None,
        eval_results=results or None,
        license=named.get("license"),
        license_name=named.get("license_name"),
        license_link=named.get("license_link"),
    )
    return to_yaml(redact_values(data.to_dict()), width=float("inf"))


def _describe_relation(config: ExportConfig, facts: Facts) -> str:
    """Name the relation to the base in the hub's words.

    Weights that were trained and then quantized are first of all another model.
    """
    kind = find_format(config.format)
    if not kind.is_merged:
        return "adapter"
    is_quantized = kind.quantization(config) is not None
    return "quantized" if is_quantized and facts.tuner is None else "finetune"


def _list_tags(config: ExportConfig, facts: Facts, usage: Usage) -> list[str]:
    tags = ["llmtune"]
    if facts.tuner is not None:
        tags.append("full-fine-tuning" if facts.tuner == "full" else facts.tuner)
    if config.format != "safetensors":
        tags.append(config.format.replace("_", "-"))
    if usage.has_template and usage.writes_text:
        tags.append("conversational")
    return tags


def _list_results(facts: Facts, task: str) -> list[EvalResult]:
    """Return the held-out metrics as entries of ``model-index``."""
    on_hub = find_hub_datasets(facts)
    names = list_sources(facts.get("data.eval") or facts.get("data.train")) or ["held-out rows"]
    return [
        EvalResult(
            task_type=task,
            dataset_type=on_hub[0] if len(on_hub) == 1 else "custom",
            dataset_name=f"{', '.join(names)} (held-out rows)",
            metric_type=key,
            metric_name=f"held-out {key}",
            metric_value=value,
        )
        for key, value in read_metrics_after(facts).items()
    ]
