"""What would end the export after days of training is found before it: packages, a token, a model
that a format cannot hold.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ConfigError, ExportError, MissingPrerequisiteError
from llmtune.export.card.license import check_licenses
from llmtune.export.formats.format import find_format
from llmtune.export.writers.model_files import check_companions
from llmtune.model.weights.quantized import quantization
from llmtune.registry import NONE


def check_exportable(config: ExportConfig, base: Path) -> None:
    """Whether what is trained on ``base`` can be exported as asked, as far as its configuration and
    tokenizer tell.

    Reads no weights and uses no network. What the configuration alone tells is in
    ``llmtune.config.rules``.

    Raises:
        ConfigError: ``export.upload`` is no address.
        MissingPrerequisiteError: A package or a token is missing, the format has no place for this
            model, or links in its folder lead out of it.
    """
    if config.format == NONE:
        return
    kind = find_format(config.format)
    _check_upload(config, config.dry_run)
    try:
        if kind.is_merged:
            check_companions(base)
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
    if config.format == NONE or not config.upload:
        return
    from llmtune.export.publish.upload import check_upload

    try:
        check_upload(config.upload, dry_run)
    except ExportError as error:
        raise ConfigError(str(error)) from error
