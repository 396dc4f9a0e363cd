"""``export=onnx``: a graph that onnxruntime runs without torch."""

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
    from llmtune.export.writers.graph.onnx_file import write_onnx

    write_onnx(export_model, folder, journal, config)


def _check_base(base: Path) -> None:
    from llmtune.export.writers.graph.onnx_file import check_onnx_packages

    check_onnx_packages()
    check_graph_base(base)


def _describe_usage(usage: Usage) -> str:
    file = first_file(usage.folder, "*.onnx", "model.onnx")
    code = (
        f"import onnxruntime\nfrom transformers import AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("."{allow_code(usage)})\n'
        f'session = onnxruntime.InferenceSession("{file}")\n'
        'tokens = tokenizer(["Hello"], return_tensors="np")\n'
        "feed = {given.name: tokens[given.name] for given in session.get_inputs()}\n"
        "output = session.run(None, feed)[0]  # (batch, labels)\nprint(output.argmax(-1))\n"
    )
    return f"With onnxruntime, without torch:\n\n{python_block(adapt_output(usage, code))}{warn_no_cache(usage)}"  # noqa: E501


FORMATS.register(
    Format(
        name="onnx",
        describe=lambda _: "an ONNX graph",
        library="onnx",
        describe_usage=_describe_usage,
        write=_write,
        options=MERGED_OPTIONS | {"dtype"},
        find_problems=find_graph_problems,
        check_base=_check_base,
        compared_dtype=compared_as_fp32,
    )
)
