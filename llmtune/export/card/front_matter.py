"""The front matter of a model card: what the Hugging Face hub reads of it."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from llmtune.config.groups.export import ExportConfig
from llmtune.export.card.facts import Facts, find_hub_datasets, list_sources, read_metrics_after
from llmtune.export.card.license import License
from llmtune.export.formats.format import find_format
from llmtune.export.request import ExportRequest, is_hub_id
from llmtune.export.usage import Usage
from llmtune.security.redaction import redact_values
from llmtune.storage.yaml_text import to_yaml


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
