"""Whether a model can be trained as it was asked for, found out before any rank starts; answers are remembered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llmtune
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.model.weight_files import identify_weights, is_quantized
from llmtune.model.weight_report import WeightReport
from llmtune.plan.cache import read_cached, write_cached

#: What the remembered answers depend on beside the model.
_SOURCES = (
    *("model/weight_names.py", "model/weight_files.py", "model/weight_check.py", "model/weight_report.py"),
    *("model/attention.py", "model/shrink.py", "train/packing_probe.py"),
)


def check_model(config: Config, kernel: str, folder: Path, cache_dir: Path | None, say: Callable[[str], None]) -> None:
    """Look through a model's files, and try packing on its architecture where rows are packed.

    Args:
        kernel: Of attention.
        folder: Of the model.
        cache_dir: Where answers are remembered; None asks anew.
        say: Told what is worth a line: weights that are tied, or not used.

    Raises:
        MissingPrerequisiteError: The files lack weights, or hold them in other shapes.
        ConfigError: Documents of a packed row would see each other.
    """
    trusted = config.model.trust_remote_code
    if not is_quantized(folder):
        for note in _check_weights(config.model.name_or_path, folder, trusted, cache_dir):
            say(note)
    if config.data.packing:
        _check_packing(config.model.name_or_path, folder, trusted, cache_dir, kernel)


def _check_weights(name: str, folder: Path, trusted: bool, cache_dir: Path | None) -> list[str]:
    key = repr((_sources(), identify_weights(folder)))
    values = None if trusted else read_cached(cache_dir, "weights", key)
    if values is None:
        from llmtune.model.weight_check import compare_weights
        from llmtune.plan.shape import build_meta_model

        model, _ = build_meta_model(_architecture(folder, trusted), trusted)
        values = compare_weights(model, folder).to_dict()
        write_cached(cache_dir, "weights", key, values)
    report = WeightReport.from_dict(values)
    report.refuse(name, folder)
    return report.notes()


def _check_packing(name: str, folder: Path, trusted: bool, cache_dir: Path | None, kernel: str) -> None:
    key = repr((_sources(), name, (folder / "config.json").read_text(), kernel))
    values = None if trusted else read_cached(cache_dir, "packing", key)
    if values is None:
        from llmtune.train.packing_probe import try_architecture

        values = {"problem": try_architecture(_architecture(folder, trusted), kernel, name, trusted)}
        write_cached(cache_dir, "packing", key, values)
    if values["problem"] is not None:
        raise ConfigError(values["problem"])


def _architecture(folder: Path, trusted: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)


@cache
def _sources() -> str:
    package = Path(str(llmtune.__file__)).parent
    return hashlib.sha256(b"".join((package / name).read_bytes() for name in _SOURCES)).hexdigest()
