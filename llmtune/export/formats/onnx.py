"""``export=onnx``: a graph that onnxruntime runs without torch."""

from functools import partial
from pathlib import Path

from llmtune.export.formats.format import FORMATS, Format, Writer, render_usage
from llmtune.export.formats.graphs import check_graph_base, compared_as_fp32, find_graph_problems


def _load_writer() -> Writer:
    from llmtune.export.writers.graph.onnx_file import write_onnx

    return write_onnx


def _check_base(base: Path) -> None:
    from llmtune.export.writers.graph.onnx_file import check_onnx_packages

    check_onnx_packages()
    check_graph_base(base)


FORMATS.register(
    Format(
        name="onnx",
        describe=lambda _: "an ONNX graph",
        library="onnx",
        describe_usage=partial(render_usage, "onnx"),
        load_writer=_load_writer,
        find_problems=find_graph_problems,
        check_base=_check_base,
        compared_dtype=compared_as_fp32,
    )
)
