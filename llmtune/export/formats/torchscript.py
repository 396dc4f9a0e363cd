"""``export=torchscript``: a graph that torch runs without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig
from llmtune.export.formats.format import FORMATS, MERGED_OPTIONS, Format
from llmtune.export.formats.graphs import check_graph_base, compared_as_fp32, find_graph_problems
from llmtune.export.usage import (
    Usage,
    adapt_output,
    allow_code,
    first_file,
    python_block,
    warn_no_cache,
)

if TYPE_CHECKING:
    from llmtune.export.model import ExportModel
    from llmtune.export.publish.shards import Journal


def _write(export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig) -> None:
    from llmtune.export.writers.graph.torchscript_file import write_torchscript

    write_torchscript(export_model, folder, journal, config)


def _describe_usage(usage: Usage) -> str:
    file = first_file(usage.folder, "*.pt", "model.ts.pt")
    code = (
        f"import torch\nfrom transformers import AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("."{allow_code(usage)})\nmodel = torch.jit.load("{file}").eval()\n'  # noqa: E501
        'tokens = tokenizer(["Hello"], return_tensors="pt")\n'
        "with torch.no_grad():\n"
        '    output = model(tokens["input_ids"], tokens["attention_mask"])  # (batch, labels)\nprint(output.argmax(-1))\n'  # noqa: E501
    )
    return f"With torch alone:\n\n{python_block(adapt_output(usage, code))}{warn_no_cache(usage)}"


FORMATS.register(
    Format(
        name="torchscript",
        describe=lambda _: "a TorchScript graph",
        library="pytorch",
        describe_usage=_describe_usage,
        write=_write,
        options=MERGED_OPTIONS | {"dtype"},
        find_problems=find_graph_problems,
        check_base=check_graph_base,
        compared_dtype=compared_as_fp32,
    )
)
