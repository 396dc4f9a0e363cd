"""``export=pt``: one PyTorch file of weights."""

from functools import partial

from llmtune.export.formats.format import FORMATS, Format, Writer, render_usage


def _load_writer() -> Writer:
    from llmtune.export.writers.torch_file import write_torch_file

    return write_torch_file


FORMATS.register(
    Format(
        name="pt",
        describe=lambda _: "one PyTorch file of weights",
        describe_usage=partial(render_usage, "pt"),
        load_writer=_load_writer,
        space=1.0,
        tells_dtype=True,
    )
)
