"""``export=bnb_4bit``: a model folder in bitsandbytes' NF4."""

from functools import partial
from pathlib import Path

from llmtune.export.formats.format import (
    FORMATS,
    MERGED_OPTIONS,
    Format,
    Writer,
    render_usage,
    require_package,
)


def _load_writer() -> Writer:
    from llmtune.export.writers.bitsandbytes_folder import write_bnb_4bit

    return write_bnb_4bit


def _check_base(_base: Path) -> None:
    require_package("bitsandbytes", "export=bnb_4bit")


FORMATS.register(
    Format(
        name="bnb_4bit",
        describe=lambda _: "a model folder in 4 bits (bitsandbytes NF4)",
        describe_usage=partial(render_usage, "bnb_4bit"),
        load_writer=_load_writer,
        options=MERGED_OPTIONS | {"dtype", "max_shard_bytes"},
        space=0.5,
        loads_from_hub=True,
        check_base=_check_base,
        quantization=lambda _: "4 bits (NF4)",
    )
)
