"""Check before any rank starts that a model can be trained as asked; answers are remembered."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import llmtune
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.model.weights.files import identify_weights, read_entries
from llmtune.model.weights.quantized import (
    check_trainable,
    has_known_names,
    method_of,
    quantization,
)
from llmtune.model.weights.report import WeightReport
from llmtune.plan.memory.trace_cache import read_cached, write_cached
from llmtune.storage.hashing import sha256_files
from llmtune.storage.plain_fields import from_plain
from llmtune.task.task import find_task
from llmtune.tuner.tuner import TUNERS
from llmtune.varlen_attention import VARLEN

#: Dependencies of the remembered answers beside the model.
_SOURCES = (
    "model/weights/names.py",
    "model/weights/files.py",
    "model/weights/check.py",
    "model/weights/report.py",
    "model/weights/quantized.py",
    "model/attention.py",
    "plan/architecture/shrink.py",
    "train/hooks/packing_probe.py",
)


def check_quantized(config: Config, stage: int, folder: Path) -> None:
    """Check that weights in fewer bits can be trained on under a stage of ZeRO.

    Args:
        folder: Of the model.

    Raises:
        ConfigError: They cannot.
    """
    settings = quantization(folder)
    if settings is not None:
        name = config.model.name_or_path
        tuner = TUNERS.find(config.tuner.kind)
        own = None if tuner.has_adapter else config.tuner.kind
        check_trainable(
            settings, read_entries(folder), own, stage, name, requantizes=tuner.is_quantized
        )


def check_model(
    config: Config,
    kernel: str,
    folder: Path,
    cache_dir: Path | None,
    say: Callable[[str], None],
) -> None:
    """Check a model's files, and packing on its architecture if rows are packed.

    Args:
        kernel: Of attention.
        folder: Of the model.
        cache_dir: Where answers are remembered; None asks anew.
        say: Told what is worth a line: weights that are tied, or not used.

    Raises:
        MissingPrerequisiteError: The files lack weights, or hold them in other shapes.
        ConfigError: Documents of a packed row would see each other.
    """
    name, trusted = config.model.name_or_path, config.model.trust_remote_code
    task = config.model.task
    settings = quantization(folder)
    if settings is None or has_known_names(settings):
        for note in _find_weight_notes(name, folder, trusted, cache_dir, task):
            say(note)
    if settings is not None:
        say(_describe_comparison(settings))
    # That kernel was tried when it was chosen (plan/architecture/varlen_trial.py).
    if config.data.packing and kernel != VARLEN:
        _check_packing(name, folder, trusted, cache_dir, kernel)


def _describe_comparison(settings: dict[str, Any]) -> str:
    method = method_of(settings)
    if has_known_names(settings):
        return (
            f"weights: those that {method} packed are compared with the model by their names, not"
            " by their shapes"
        )
    return (
        f"weights: what the files lack was not looked for, because the names that {method} gives"
        " are not known here"
    )


def _find_weight_notes(
    name: str, folder: Path, trusted: bool, cache_dir: Path | None, task: str
) -> list[str]:
    key = repr((_sources(), identify_weights(folder), find_task(task).name))
    values = None if trusted else read_cached(cache_dir, "weights", key)
    if values is None:
        from llmtune.model.weights.check import compare_weights
        from llmtune.plan.architecture.meta_model import build_meta_model

        model_class = find_task(task).model_class
        model, _ = build_meta_model(_architecture(folder, trusted), trusted, model_class)
        report = compare_weights(model, folder)
        write_cached(cache_dir, "weights", key, asdict(report))
    else:
        report = from_plain(WeightReport, values)
    report.refuse(name, folder)
    return report.notes()


def _check_packing(
    name: str, folder: Path, trusted: bool, cache_dir: Path | None, kernel: str
) -> None:
    key = repr((_sources(), name, (folder / "config.json").read_text(), kernel))
    values = None if trusted else read_cached(cache_dir, "packing", key)
    if values is None:
        from llmtune.train.hooks.packing_probe import try_architecture

        values = {
            "problem": try_architecture(_architecture(folder, trusted), kernel, name, trusted)
        }
        write_cached(cache_dir, "packing", key, values)
    if values["problem"] is not None:
        raise ConfigError(values["problem"])


def _architecture(folder: Path, trusted: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)


@cache
def _sources() -> str:
    package = Path(str(llmtune.__file__)).parent
    return sha256_files(package / name for name in _SOURCES)
