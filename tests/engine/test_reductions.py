"""How often ranks add up gradients, and that reductions which overlap add up the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support import train_engines

pytestmark = pytest.mark.process

BASE = [
    *("model=tiny", "data.train=stdlib_docs@200", "data.max_seq_length=256"),
    *("data.overlong=truncate", "precision=fp32", "train.per_device_train_batch_size=1"),
]
#: Elements of the adapters of the tiny model.
ADAPTERS = 32_768
STAGES, ACCUMULATION = (0, 1, 2, 3), (1, 4)
#: Smaller than most gradients, than the largest one, and than all together.
BUCKETS = (3_000, 33_000, 70_000)

Cell = tuple[Any, ...]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Any]:
    """What the last step of each engine said to the other rank, and the gradients of all."""
    tasks: dict[Cell, Any] = {}
    for stage, accumulation in itertools.product(STAGES, ACCUMULATION):
        tasks["lora", stage, accumulation] = {
            "overrides": [
                *(*BASE, "tuner=lora", f"zero={stage}"),
                f"train.gradient_accumulation_steps={accumulation}",
            ],
            "first": 0,
            "last": 3,
        }
    for bucket, overlaps in itertools.product(BUCKETS, ("true", "false")):
        keys = f"reduce_bucket_size:{bucket},overlap_comm:{overlaps}"
        tasks["full", bucket, overlaps] = {
            "overrides": [
                *(*BASE, "tuner=full", "zero=2", "train.gradient_accumulation_steps=3"),
                f"zero.deepspeed={{zero_optimization:{{{keys}}}}}",
            ],
            "first": 0,
            "last": 3,
        }
    results = train_engines(
        list(tasks.values()),
        2,
        tmp_path_factory.mktemp("ranks"),
        timeout=600,
        module="tests.engine.reductions_worker",
    )
    return dict(zip(tasks, results, strict=True))


def reductions(result: Any) -> list[int]:
    """Elements of each reduction of gradients: flags and metrics have a few numbers."""
    return [size for name, size in result["calls"] if "reduce" in name and size > 1000]


@pytest.mark.parametrize(("stage", "accumulation"), itertools.product(STAGES, ACCUMULATION))
def test_adapters_are_reduced_once_where_the_stage_permits(
    stage: int, accumulation: int, found: dict[Cell, Any]
) -> None:
    """Stages 0 and 1 reduce once per step, 2 and 3 once per micro-batch."""
    sizes = reductions(found["lora", stage, accumulation])
    assert sizes == [ADAPTERS] * (accumulation if stage >= 2 else 1)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_overlapped_reductions_give_the_same_gradients_to_the_last_bit(
    bucket: int, found: dict[Cell, Any]
) -> None:
    """On CPU ranks the buffers take turns as on GPUs, and what streams do is not seen."""
    overlapped, plain = found["full", bucket, "true"], found["full", bucket, "false"]
    assert len(set(plain["digests"])) == 3
    assert overlapped["digests"] == plain["digests"]
    assert overlapped["losses"] == plain["losses"]
    assert overlapped["norms"] == plain["norms"]
    # Three micro-batches.
    assert len(reductions(overlapped)) >= 2 * 3
