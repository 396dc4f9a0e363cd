"""``export=safetensors``: a model folder as transformers and vLLM load it."""

from functools import partial

from llmtune.export.formats.format import FORMATS, MERGED_OPTIONS, Format, Writer, render_usage


def _load_writer() -> Writer:
    from llmtune.export.writers.safetensors_folder import write_safetensors

    return write_safetensors


FORMATS.register(
    Format(
        name="safetensors",
        describe=lambda _: "a model folder in safetensors",
        describe_usage=partial(render_usage, "safetensors"),
        load_writer=_load_writer,
        options=MERGED_OPTIONS | {"dtype", "max_shard_bytes"},
        space=1.0,
        loads_from_hub=True,
        tells_dtype=True,
        is_checked_on_disk=True,
    )
)
