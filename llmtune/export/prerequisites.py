"""Check before the training that its result can be exported: packages, token, kind of model."""

import contextlib
from pathlib import Path

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ConfigError, ExportError, MissingPrerequisiteError
from llmtune.export.card.license import check_licenses
from llmtune.export.formats.format import find_format
from llmtune.export.writers.model_files import check_model_files
from llmtune.model.weights.quantized import quantization
from llmtune.registry import NONE


def check_exportable(config: ExportConfig, base: Path) -> None:
    """Check that a model trained on ``base`` can be exported, by its configuration and tokenizer.

    Reads no weights and uses no network. Rules about the configuration alone are in
    ``llmtune.config.rules``.

    Raises:
        ConfigError: ``export.upload`` is no address.
        MissingPrerequisiteError: A package or a token is missing, the format cannot hold this
            model, or links in its folder lead out of it.
    """
    if config.format == NONE:
        return
    kind = find_format(config.format)
    _check_upload(config, config.dry_run)
    try:
        if kind.is_merged:
            check_model_files(base)
            _check_base(base)
        check_licenses(base)
        if kind.check_base is not None:
            kind.check_base(base)
    except ExportError as error:
        raise MissingPrerequisiteError(
            f"{error} (export={config.format} was asked for after the training, which has not"
            " begun; export=none trains without)"
        ) from error


def _check_base(base: Path) -> None:
    """Refuse quantized weights that cannot be dequantized for a merge."""
    if quantization(base) is not None:
        from llmtune.export.sources.bitsandbytes_base import check_plain_or_4bit

        check_plain_or_4bit(base)


def check_address(config: ExportConfig) -> None:
    """Check ``export.upload``, whatever packages are installed.

    Raises:
        ConfigError: It is no address.
    """
    with contextlib.suppress(MissingPrerequisiteError):
        _check_upload(config, dry_run=True)


def _check_upload(config: ExportConfig, dry_run: bool) -> None:
    if config.format == NONE or not config.upload:
        return
    from llmtune.export.publish.upload import check_upload

    try:
        check_upload(config.upload, dry_run)
    except ExportError as error:
        raise ConfigError(str(error)) from error
