"""What would end the export after days of training is found before it: packages, a token, a model that a format cannot hold."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from pathlib import Path

from llmtune.config.groups.export import ExportConfig, ExportFormat
from llmtune.errors import ConfigError, ExportError, MissingPrerequisiteError
from llmtune.export.card.licence import check_licences
from llmtune.export.formats.model_files import check_companions
from llmtune.model.weights.quantized import quantization


def check_exportable(config: ExportConfig, base: Path) -> None:
    """Whether what is trained on ``base`` can be exported as asked, as far as its configuration and tokenizer tell.

    Reads no weights and uses no network. What the configuration alone tells is in ``llmtune.config.rules``.

    Raises:
        ConfigError: ``export.upload`` is no address.
        MissingPrerequisiteError: A package or a token is missing, the format has no place for this model, or links in its
            folder lead out of it.
    """
    if config.format is ExportFormat.none:
        return
    _check_upload(config, config.dry_run)
    try:
        if config.format is not ExportFormat.adapter:
            check_companions(base)
            _check_base(base)
        check_licences(base)
        if (check := _CHECKS.get(config.format)) is not None:
            check(base)
    except ExportError as error:
        raise MissingPrerequisiteError(
            f"{error} (export={config.format.value} was asked for after the training, which has not begun; export=none "
            "trains without)"
        ) from error


def _check_base(base: Path) -> None:
    """Weights in fewer bits can be unpacked for a merge where they are bitsandbytes' 4 bits."""
    if quantization(base) is not None:
        from llmtune.export.sources.bitsandbytes import check_plain_or_4bit

        check_plain_or_4bit(base)


def check_address(config: ExportConfig) -> None:
    """
    Raises:
        ConfigError: ``export.upload`` is no address, whatever is installed here.
    """
    with contextlib.suppress(MissingPrerequisiteError):
        _check_upload(config, dry_run=True)


def _check_upload(config: ExportConfig, dry_run: bool) -> None:
    if config.format is ExportFormat.none or not config.upload:
        return
    from llmtune.export.publish.upload import check_upload

    try:
        check_upload(config.upload, dry_run)
    except ExportError as error:
        raise ConfigError(str(error)) from error


def _check_gguf(base: Path) -> None:
    _require("gguf", "export=gguf")
    from llmtune.export.formats.gguf.vocabulary import read_vocabulary
    from llmtune.export.formats.gguf.writer import read_settings

    settings, _ = read_settings(base)
    read_vocabulary(base, settings.vocab_size)


def _check_onnx(base: Path) -> None:
    from llmtune.export.formats.graph.writers import import_onnx

    import_onnx()
    _check_graph(base)


def _check_graph(base: Path) -> None:
    from llmtune.export.formats.graph.model import find_loader
    from llmtune.export.formats.graph.writers import check_size
    from llmtune.export.sources.base import SafetensorsSource

    find_loader(base)
    check_size(sum(math.prod(spec.shape) for spec in SafetensorsSource(base).specs.values()))


def _check_bnb(_base: Path) -> None:
    _require("bitsandbytes", "export=bnb_4bit")


def _require(package: str, wanted: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingPrerequisiteError(f"{wanted} needs {package} ({error}): pip install {package}") from error


_CHECKS: dict[ExportFormat, Callable[[Path], None]] = {
    ExportFormat.gguf: _check_gguf,
    ExportFormat.onnx: _check_onnx,
    ExportFormat.torchscript: _check_graph,
    ExportFormat.bnb_4bit: _check_bnb,
}
