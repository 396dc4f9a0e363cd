"""``export=gguf``: the one file that llama.cpp, Ollama and LM Studio load."""

from functools import partial
from pathlib import Path

from llmtune.config.groups.export import ExportConfig, ExportDtype, GgufType
from llmtune.export.formats.format import (
    FORMATS,
    MERGED_OPTIONS,
    Format,
    Writer,
    render_usage,
    require_package,
)

#: Types that hold each number by itself.
_PLAIN = (GgufType.f32, GgufType.f16, GgufType.bf16)


def _load_writer() -> Writer:
    from llmtune.export.writers.gguf.gguf_file import write_gguf

    return write_gguf


def _find_problems(config: ExportConfig) -> str | None:
    if config.dtype is ExportDtype.auto:
        return None
    return (
        f"export.dtype={config.dtype.value} has no part in export=gguf: export.gguf_type says what"
        " it is stored in"
    )


def _check_base(base: Path) -> None:
    require_package("gguf", "export=gguf")
    from llmtune.export.writers.gguf.gguf_hyperparameters import read_settings
    from llmtune.export.writers.gguf.gguf_vocabulary import read_vocabulary

    settings, _ = read_settings(base)
    read_vocabulary(base, settings.vocab_size)


def _compared_dtype(config: ExportConfig) -> ExportDtype:
    """Return the dtype of unquantized types; quantized ones are computed from the merged fp32."""
    dtypes = {GgufType.f16: ExportDtype.fp16, GgufType.bf16: ExportDtype.bf16}
    return dtypes.get(config.gguf_type, ExportDtype.fp32)


def _quantization(config: ExportConfig) -> str | None:
    return None if config.gguf_type in _PLAIN else config.gguf_type.value


FORMATS.register(
    Format(
        name="gguf",
        describe=lambda config: f"a GGUF file in {config.gguf_type.value}",
        library="gguf",
        describe_usage=partial(render_usage, "gguf"),
        load_writer=_load_writer,
        options=MERGED_OPTIONS | {"gguf_type"},
        has_model_files=False,
        find_problems=_find_problems,
        check_base=_check_base,
        compared_dtype=_compared_dtype,
        quantization=_quantization,
    )
)
