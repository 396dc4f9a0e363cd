"""``export=gguf``: the one file that llama.cpp, Ollama and LM Studio load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig, ExportDtype, GgufType
from llmtune.export.formats.format import FORMATS, MERGED_OPTIONS, Format, require_package
from llmtune.export.usage import Usage, first_file, request_answer, shell_block

if TYPE_CHECKING:
    import torch

    from llmtune.export.model import ExportModel
    from llmtune.export.publish.shards import Journal

#: Types that hold each number by itself.
_PLAIN = (GgufType.f32, GgufType.f16, GgufType.bf16)


def _write(export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig) -> None:
    from llmtune.export.writers.gguf.gguf_file import write_gguf

    write_gguf(export_model, folder, journal, config)


def _find_problems(config: ExportConfig) -> str | None:
    if config.dtype is ExportDtype.auto:
        return None
    return f"export.dtype={config.dtype.value} has no part in export=gguf: export.gguf_type says what it is stored in"  # noqa: E501


def _check_base(base: Path) -> None:
    require_package("gguf", "export=gguf")
    from llmtune.export.writers.gguf.gguf_hyperparameters import read_settings
    from llmtune.export.writers.gguf.gguf_vocabulary import read_vocabulary

    settings, _ = read_settings(base)
    read_vocabulary(base, settings.vocab_size)


def _compared_dtype(config: ExportConfig) -> torch.dtype:
    """Quantized types are made of the merged fp32."""
    import torch

    return {GgufType.f16: torch.float16, GgufType.bf16: torch.bfloat16}.get(
        config.gguf_type, torch.float32
    )


def _quantization(config: ExportConfig) -> str | None:
    return None if config.gguf_type in _PLAIN else config.gguf_type.value


def _describe_usage(usage: Usage) -> str:
    file = first_file(usage.folder, "*.gguf", "model.gguf")
    talk = (
        '-cnv -p "You are a helpful assistant."'
        if usage.has_template
        else '-no-cnv -n 100 -p "Once upon a time"'
    )
    modelfile = (
        "" if (usage.folder / "Modelfile").is_file() else f'echo "FROM ./{file}" > Modelfile\n'
    )
    serve = f"llama-server -m {file} --port 8000\n{request_answer(usage)}"
    ollama = f"{modelfile}ollama create {usage.name} -f Modelfile\nollama run {usage.name}"
    return (
        f"With llama.cpp:\n\n{shell_block(f'llama-cli -m {file} {talk}')}"
        f"As a server with OpenAI's interface:\n\n{shell_block(serve)}"
        f"With Ollama:\n\n{shell_block(ollama)}"
    )


FORMATS.register(
    Format(
        name="gguf",
        describe=lambda config: f"a GGUF file in {config.gguf_type.value}",
        library="gguf",
        describe_usage=_describe_usage,
        write=_write,
        options=MERGED_OPTIONS | {"gguf_type"},
        has_model_files=False,
        find_problems=_find_problems,
        check_base=_check_base,
        compared_dtype=_compared_dtype,
        quantization=_quantization,
    )
)
