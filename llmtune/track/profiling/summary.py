"""Tell in plain words where the time of the traced steps went, and what to try."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.track.profiling.trace import (
    ATTENTION,
    COMMUNICATION,
    COPIES,
    DATA,
    HOST,
    MATMUL,
    OPTIMIZER,
    OTHER,
    TraceShares,
)

#: Operators that are named.
TOP = 8
_LETTERS = 60
#: Shares of a step from which there is something to try.
_MUCH = {DATA: 0.1, COPIES: 0.1, COMMUNICATION: 0.2, OPTIMIZER: 0.25, HOST: 0.25, OTHER: 0.5}
#: Share of arithmetic from which a step is as fast as its hardware.
_MOSTLY_ARITHMETIC = 0.7
#: Of a GPU; where the host is all there is, :data:`_ON_HOST` is in its place.
_ADVICE = {
    DATA: "the rows come too late: take a larger data.dataloader_num_workers",
    COPIES: (
        "much is moved between host and GPU: data.pin_memory=true for batches, and less offload"
        " where llmtune plan says that it fits"
    ),
    COMMUNICATION: (
        "ranks wait for each other: fewer and larger steps (train.gradient_accumulation_steps), or"
        " zero=2 or zero=1 where llmtune plan says that it fits"
    ),
    OPTIMIZER: (
        "the optimizer is a large part: more rows per step (train.global_batch_size), or"
        " optim=adamw_8bit, or tuner=lora, whose state is small"
    ),
    HOST: (
        "the GPU waits for the host: take a larger train.per_device_train_batch_size and fewer"
        " train.gradient_accumulation_steps"
    ),
    OTHER: (
        "element-wise work is larger than the arithmetic: a larger"
        " train.per_device_train_batch_size or data.packing=true, and"
        " train.gradient_checkpointing=false where memory is left"
    ),
}
_ON_HOST = {
    HOST: (
        "Python is a large part, as with every small model: take a larger"
        " train.per_device_train_batch_size"
    ),
}


def list_advice(shares: TraceShares) -> list[str]:
    """List what to try, for the largest part first; never empty."""
    found = [
        f"{category} takes {_share(shares, category):.0%}: {_advice(shares)[category]}"
        for category in shares.categories
        if category in _MUCH and _share(shares, category) > _MUCH[category]
    ]
    arithmetic = _share(shares, MATMUL) + _share(shares, ATTENTION)
    if arithmetic > _MOSTLY_ARITHMETIC:
        found.append(
            f"{MATMUL} and {ATTENTION} take {arithmetic:.0%}: the hardware does what it is there"
            " for; only less work is faster (data.packing=true where rows are padded, bf16,"
            " train.gradient_checkpointing=false where memory is left)"
        )
    return found or ["no part is so large that one setting would change much"]


def to_rows(shares: TraceShares) -> dict[str, str]:
    """Describe the parts of a step, for the console."""
    rows = {
        category: _describe(shares, seconds)
        for category, seconds in shares.categories.items()
        if seconds >= shares.seconds / 1000
    }
    for number, advice in enumerate(list_advice(shares)):
        rows["try" if number == 0 else f"try {number + 1}"] = advice
    return rows


def to_markdown(shares: TraceShares, trace: str) -> str:
    """Write the summary as a page.

    Args:
        trace: Name of the file with the trace of this rank.
    """
    return "\n".join(_lines(shares, trace)) + "\n"


def _lines(shares: TraceShares, trace: str) -> Iterator[str]:
    where = "the GPU of rank 0" if shares.on_device else "the processor of rank 0"
    yield "# Where the time of a step went"
    yield ""
    yield f"Mean of {shares.steps} traced steps on {where}: {_time(shares.seconds)} per step."
    yield "Tracing itself makes steps slower, most of all those with many small operators."
    yield ""
    yield "| part | time | share |"
    yield "| --- | ---: | ---: |"
    for category, seconds in shares.categories.items():
        yield f"| {category} | {_time(seconds)} | {seconds / shares.seconds:.1%} |"
    yield ""
    yield (
        "Parts add up to a step: of work at the same time, arithmetic counts before communication"
        " and communication before copies, so that what is hidden behind arithmetic costs nothing."
    )
    yield ""
    yield "## What to try"
    yield ""
    yield from (f"* {advice}" for advice in list_advice(shares))
    yield ""
    yield "## Largest operators"
    yield ""
    yield "| operator | part | time per step | share |"
    yield "| --- | --- | ---: | ---: |"
    for name, category, seconds in shares.operators[:TOP]:
        shown = _cut(name).replace("|", "\\|")
        yield f"| `{shown}` | {category} | {_time(seconds)} | {seconds / shares.seconds:.1%} |"
    yield ""
    yield f"`{trace}` opens in https://ui.perfetto.dev and chrome://tracing."


def _advice(shares: TraceShares) -> dict[str, str]:
    return _ADVICE if shares.on_device else {**_ADVICE, **_ON_HOST}


def _share(shares: TraceShares, category: str) -> float:
    return shares.categories.get(category, 0.0) / shares.seconds if shares.seconds else 0.0


def _describe(shares: TraceShares, seconds: float) -> str:
    return f"{_time(seconds):>9}  {100 * seconds / shares.seconds:5.1f} %"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _cut(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 3]}..."
