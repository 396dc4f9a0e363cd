"""The tables of a card: data, settings, metrics, plan and versions of a run."""

import contextlib
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.export.card.facts import Facts, list_sources, read_metrics_after
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.memory.memory_plan import MemoryPlan
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.prepared_data import SplitSummary
from llmtune.plan.run_record import RunRecord
from llmtune.units import format_bytes

#: The rows of a table: name and value.
Rows = list[tuple[str, str]]


_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")


def describe_data(facts: Facts) -> Rows:
    """Describe the data: names, counts and hashes."""
    rows: Rows = []
    data = facts.plan.data
    splits = (
        ("train", "training data", data.train if data else None),
        ("eval", "held-out data", data.eval if data else None),
    )
    for key, label, counts in splits:
        if sources := list_sources(facts.get(f"data.{key}")):
            rows.append((label, ", ".join(sources)))
        if counts:
            rows.append((label.replace("data", "rows"), _describe_counts(counts)))
    share = facts.get("data.val_set_size")
    if facts.config and facts.get("data.eval") is None and share:
        rows.append(
            (
                "held out",
                f"{share} {'of the rows' if share < 1 else 'rows'}, split off the training data",
            )
        )
    rows += _rows(
        ("fingerprint of the rows", data.fingerprint if data else None),
        ("tokenized sources", ", ".join(_stores(facts))),
        ("trained on", _describe_mask(facts)),
        ("chat template", str(facts.get("data.chat_template") or "").rpartition("/")[2]),
    )
    return rows


def describe_settings(facts: Facts) -> Rows:
    """Describe what was trained, and how."""
    plan, adapter, get = facts.plan, facts.adapter, facts.get
    planned = plan.steps.total_steps if plan.steps else None
    steps = f"{facts.step} of {planned}" if facts.step is not None and planned else planned
    schedule, warmup = get("schedule.lr_scheduler_type"), plan.steps and plan.steps.warmup_steps
    tuned = bool(adapter)
    return _rows(
        ("tuner", facts.tuner),
        ("rank", adapter.get("r")),
        ("alpha", adapter.get("lora_alpha")),
        ("dropout", adapter.get("lora_dropout")),
        ("variant", ", ".join(name for name, key in _VARIANTS.items() if adapter.get(key))),
        ("target modules", _describe_targets(adapter.get("target_modules")) if tuned else None),
        ("also trained", _describe_targets(adapter.get("modules_to_save")) if tuned else None),
        ("trainable parameters", _describe_parameters(plan.shape)),
        ("learning rate", plan.learning_rate or get("optim.learning_rate")),
        (
            "schedule",
            f"{schedule}, {warmup} steps of warm-up"
            if schedule and warmup is not None
            else schedule,
        ),
        ("optimizer", _describe_optimizer(get("optim"))),
        ("gradient clipping", get("train.max_grad_norm")),
        ("batch", _describe_batch(plan.batch, get("train.global_batch_size"))),
        ("batch schedule", _describe_schedule(facts)),
        ("optimizer steps", steps),
        ("chosen", _describe_choice(facts)),
        ("precision", get("precision")),
        ("sequence length", get("data.max_seq_length")),
        ("packing", _yes(get("data.packing"))),
        ("seed", get("seed")),
    )


def _describe_optimizer(optim: dict[str, Any] | None) -> str | None:
    """Describe the optimizer; by its name where the module that registers it is not here."""
    if not optim:
        return None
    # Configurations stored before there was a choice do not name it.
    name = str(optim.get("kind", "adamw"))
    optimizer = OPTIMIZERS.list().get(name)
    return name if optimizer is None else optimizer.describe(optim)


#: Name of a variant of LoRA -> the key of peft that turns it on.
_VARIANTS = {"DoRA": "use_dora", "rsLoRA": "use_rslora"}


def describe_metrics(facts: Facts) -> list[tuple[str, str, str]]:
    """Describe each metric before and after training; held-out ones are named so."""
    evaluations, train = facts.evaluations, [r for r in facts.metrics if r.get("loss") is not None]
    found = []
    if train:
        found.append(
            (
                "training loss (first and last step)",
                _format(train[0]["loss"]),
                _format(train[-1]["loss"]),
            )
        )
    if evaluations:
        first = evaluations[0] if evaluations[0]["step"] == 0 else {}
        for key, value in read_metrics_after(facts).items():
            label = f"held-out {key.replace('_', ' ')}"
            found.append((label, _format(first.get(f"eval_{key}")), _format(value)))
    return found


def describe_plan(facts: Facts) -> Rows:
    """Describe where the training ran, what was predicted, and what was measured."""
    plan, hardware = facts.plan, facts.plan.hardware
    if plan == RunRecord():
        return []
    steps = [record for record in facts.metrics if "tokens_per_second" in record]
    speeds = [record["tokens_per_second"] for record in (steps[1:] or steps)]
    memory = [record["memory_bytes"] for record in facts.metrics if record.get("memory_bytes")]
    predicted = plan.tokens_per_second
    return _rows(
        ("hardware", _describe_hardware(hardware) if hardware and hardware.name else None),
        ("world size", plan.world_size),
        ("placement", _describe_placement(plan.placement)),
        ("gradient checkpointing", _describe_recomputing(plan)),
        ("attention", plan.attn_implementation),
        ("predicted memory per rank", _describe_memory(plan.memory)),
        (
            "measured memory per rank",
            f"{format_bytes(max(memory))} at its peak" if memory else None,
        ),
        ("predicted speed", f"{predicted:,.0f} tokens/s" if predicted else None),
        (
            "measured speed",
            f"{statistics.median(speeds):,.0f} tokens/s (median)" if speeds else None,
        ),
        (
            "out of memory",
            f"{len(plan.history)} times, continued with another placement"
            if plan.history
            else None,
        ),
    )


def describe_versions(facts: Facts) -> list[tuple[str, str, str]]:
    """Describe the version of each package in training and in the export."""
    trained = facts.environment
    found = [("llmtune", str(trained.get("llmtune", "")), __version__)]
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append((package, str(trained.get(package, "")), metadata.version(package)))
    return found


def _describe_counts(counts: SplitSummary) -> str:
    text = f"{counts.rows:,} ({counts.tokens:,} tokens, {counts.supervised_tokens:,} trained on)"
    left_out = {
        "dropped": counts.dropped,
        "truncated": counts.truncated,
        "skipped": counts.skipped,
        "twins": counts.duplicates_of_eval,
    }
    parts = [text, *(f"{count:,} {name}" for name, count in left_out.items() if count)]
    if counts.packing_efficiency:
        parts.append(f"packed to {counts.packing_efficiency:.1%}")
    return "; ".join(parts)


def _describe_parameters(shape: ModelShape | None) -> str | None:
    if shape is None or not (shape.trainable_parameters and shape.parameters):
        return None
    return f"{shape.trainable_parameters:,} of {shape.parameters:,}"


def _describe_batch(batch: BatchPlan | None, configured: Any) -> str | None:
    rows = (batch and batch.global_batch_size) or configured
    if not rows:
        return None
    if batch is None or not batch.micro_batch_size:
        return f"{rows} rows"
    return (
        f"{rows} rows ({batch.micro_batch_size} per micro-batch, {batch.accumulation_steps}"
        " accumulated)"
    )


def _describe_schedule(facts: Facts) -> str | None:
    """Describe how the rows per step grew; None where they did not."""
    entries = facts.get("train.batch_schedule")
    if not isinstance(entries, list) or len(entries) < 2:
        return None
    unit, scaling = (facts.get(f"train.batch_schedule_{name}") for name in ("unit", "lr"))
    return f"{entries} ({unit} before, rows per step); learning rate scaled: {scaling}"


def _describe_choice(facts: Facts) -> str | None:
    """Say why this step was taken out of the steps that were trained."""
    if facts.best.get("step") != facts.step or facts.step is None:
        return None
    return (
        f"step {facts.step} of the {facts.last_step} that were trained, with the best"
        f" {facts.best.get('metric')}: {_format(facts.best.get('value'))}"
    )


def _describe_hardware(hardware: Hardware) -> str:
    devices = f"{hardware.device_count} x {hardware.name}"
    return f"{hardware.nodes} nodes of {devices}" if hardware.nodes > 1 else devices


def _describe_mask(facts: Facts) -> str | None:
    on_inputs = facts.get("data.train_on_inputs")
    if on_inputs is None:
        return None
    return "all tokens" if on_inputs else "the answers alone"


def _stores(facts: Facts) -> list[str]:
    """Return the hashes of the tokenized sources, without the folder that holds them."""
    return [Path(store).name for store in facts.plan.data.train_stores] if facts.plan.data else []


def _describe_targets(given: Any) -> str | None:
    """List the last parts of module names, sorted: peft stores them in any order."""
    if isinstance(given, str):
        return given
    return ", ".join(sorted({str(name).rpartition(".")[2] for name in given or []})) or None


def _describe_placement(placement: Placement | None) -> str | None:
    # A placement that this version does not know is left out.
    with contextlib.suppress(KeyError, StopIteration):
        return placement.describe() if placement is not None else None
    return None


def _describe_memory(memory: MemoryPlan | None) -> str | None:
    if memory is None:
        return None
    parts = {"accelerator": memory.device.total, "host": memory.host.total, "NVMe": memory.nvme}
    return ", ".join(f"{format_bytes(size)} {name}" for name, size in parts.items() if size)


def _rows(*pairs: tuple[str, Any]) -> Rows:
    return [(label, str(value)) for label, value in pairs if value is not None and value != ""]


def _describe_recomputing(plan: RunRecord) -> str | None:
    if plan.recomputed is not None and plan.recomputed.is_partial:
        return plan.recomputed.describe()
    return _yes(plan.gradient_checkpointing)


def _yes(value: Any) -> str | None:
    if value is None:
        return None
    return "yes" if value else "no"


def _format(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""
