"""``export=torchscript``: a graph that torch runs without transformers."""

from functools import partial

from llmtune.export.formats.format import FORMATS, Format, Writer, render_usage
from llmtune.export.formats.graphs import check_graph_base, compared_as_fp32, find_graph_problems


def _load_writer() -> Writer:
    from llmtune.export.writers.graph.torchscript_file import write_torchscript

    return write_torchscript


FORMATS.register(
    Format(
        name="torchscript",
        describe=lambda _: "a TorchScript graph",
        library="pytorch",
        describe_usage=partial(render_usage, "torchscript"),
        load_writer=_load_writer,
        find_problems=find_graph_problems,
        check_base=check_graph_base,
        compared_dtype=compared_as_fp32,
    )
)
