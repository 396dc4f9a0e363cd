"""``export=pt``: one PyTorch file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig
from llmtune.export.formats.format import FORMATS, MERGED_OPTIONS, Format
from llmtune.export.usage import Usage, allow_code, ask, first_file, load_tokenizer, python_block

if TYPE_CHECKING:
    from llmtune.export.model import ExportModel
    from llmtune.export.publish.shards import Journal


def _write(export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig) -> None:
    from llmtune.export.writers.torch_file import write_torch_file

    write_torch_file(export_model, folder, journal, config)


def _describe_usage(usage: Usage) -> str:
    file = first_file(usage.folder, "*.pt", "model.pt")
    code = (
        f"import torch\nfrom transformers import AutoConfig, {usage.task.loader}, AutoTokenizer\n\n"
        f'config = AutoConfig.from_pretrained("."{allow_code(usage)})\n'
        f"model = {usage.task.loader}.from_config(config, dtype=config.dtype{allow_code(usage)})\n"
        f'tensors = torch.load("{file}", weights_only=True)\n'
        "# A head that is tied to the embedding is not stored twice.\n"
        "model.load_state_dict(tensors, strict=False)\nmodel.tie_weights()\nmodel.eval()\n"
        + load_tokenizer(usage)
    )
    text = "The file holds a state dict, which torch.load reads with weights_only=True.\n\n"
    return f"{text}{python_block(code + ask(usage))}"


FORMATS.register(
    Format(
        name="pt",
        describe=lambda _: "one PyTorch file of weights",
        library="transformers",
        describe_usage=_describe_usage,
        write=_write,
        options=MERGED_OPTIONS | {"dtype"},
        space=1.0,
        tells_dtype=True,
    )
)
