"""Traces of steps: every moment is given to one kind of work, on a GPU and on a CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmtune.track.profiling.shares import Activity, share_out
from llmtune.track.profiling.summary import list_advice, to_markdown, to_rows
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
    classify,
    measure_trace,
)


def activity(start: float, end: float, level: int, name: str) -> Activity:
    return Activity(start=start, end=end, level=level, category=f"of {name}", name=name)


@pytest.mark.parametrize("seed", range(40))
def test_each_moment_is_given_to_one_as_a_look_at_every_moment_finds(seed: int) -> None:
    rng = random.Random(seed)
    given = []
    for number in range(rng.randint(0, 25)):
        start = rng.randint(0, 60)
        end = start + rng.randint(0, 25)
        given.append(activity(start, end, rng.randint(0, 3), str(number)))
    windows = [(5.0, 20.0), (20.0, 31.0), (40.0, 64.0)]
    expected: dict[tuple[str, str], float] = {}
    for begin, stop in windows:
        for moment in range(int(begin), int(stop)):
            there = [one for one in given if one.start <= moment < one.end]
            if there:
                best = max(there, key=lambda one: (one.level, one.start, given.index(one)))
                key = (best.category, best.name)
                expected[key] = expected.get(key, 0) + 1
    assert share_out(given, windows) == expected


@pytest.mark.parametrize(
    ("name", "phase", "category"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "forward", MATMUL),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "backward", MATMUL),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "forward", MATMUL),
        ("aten::addmm", "forward", MATMUL),
        ("aten::_scaled_mm", "forward", MATMUL),
        ("aten::mm", "step", OPTIMIZER),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "forward", ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "forward", ATTENTION),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgs)", "step", COMMUNICATION),
        ("c10d::allreduce_", "backward", COMMUNICATION),
        ("gloo:all_reduce", None, COMMUNICATION),
        ("Memcpy HtoD (Pinned -> Device)", "step", COPIES),
        ("Memcpy DtoH (Device -> Pageable)", None, COPIES),
        ("Memcpy DtoD (Device -> Device)", "forward", OTHER),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "step", OPTIMIZER),
        ("void at::native::vectorized_elementwise_kernel<4, mul>", "forward", OTHER),
        ("aten::rms_norm", "forward", OTHER),
        ("aten::index_put_", "backward", OTHER),
    ],
)
def test_work_is_told_by_its_name_and_its_phase(
    name: str, phase: str | None, category: str
) -> None:
    assert classify(name, phase) == category


def event(name: str, cat: str, start: float, seconds: float, **more: Any) -> dict[str, Any]:
    """An event whose times are in milliseconds."""
    return {"name": name, "cat": cat, "ts": 1000 * start, "dur": 1000 * seconds, "tid": 1, **more}


def marks(start: float, step: int) -> list[dict[str, Any]]:
    """A step of 100 ms: 10 waiting for data, 30 forward, 40 backward, 20 optimizer."""
    found = [event(f"llmtune: step {step}", "user_annotation", start, 100)]
    for phase, at, seconds in [
        ("data", 0, 10),
        ("forward", 10, 30),
        ("backward", 40, 40),
        ("step", 80, 20),
    ]:
        found.append(event(f"llmtune: {phase}", "user_annotation", start + at, seconds))
    return found


def kernel(
    name: str, start: float, seconds: float, begun: float, number: int, cat: str = "kernel"
) -> list[dict[str, Any]]:
    """A kernel and the call that starts it."""
    return [
        event("cudaLaunchKernel", "cuda_runtime", begun, 0.01, args={"correlation": number}),
        event(name, cat, start, seconds, args={"correlation": number, "stream": 7}, tid=7),
    ]


def test_on_a_gpu_what_arithmetic_hides_costs_nothing() -> None:
    events = [
        *marks(0, 4),
        *marks(200, 5),
        *(one for start in (0, 200) for one in kernel("gemm", start + 20, 40, start + 12, start)),
        # 20 of these 30 are hidden behind the product.
        *kernel("ncclDevKernel_AllReduce", 40, 30, 30, 1),
        # Begun in the optimizer's phase, whatever runs when it does.
        *kernel("multi_tensor_apply_kernel", 82, 10, 81, 2),
        *kernel("Memcpy HtoD (Pinned -> Device)", 72, 4, 71, 3, "gpu_memcpy"),
        # Between the steps: nobody's.
        *kernel("gemm", 120, 50, 119, 4),
        # A host's operator says nothing about a GPU.
        event("aten::mm", "cpu_op", 11, 5),
    ]
    shares = measure_trace(events)
    assert shares is not None
    assert shares.on_device
    assert shares.steps == 2
    assert shares.seconds == pytest.approx(0.1)
    milliseconds = {name: 2000 * seconds for name, seconds in shares.categories.items()}
    assert milliseconds == pytest.approx(
        {
            MATMUL: 80,
            COMMUNICATION: 10,
            COPIES: 4,
            # The kernel, and the host's own time in that phase.
            OPTIMIZER: 40,
            DATA: 20,
            HOST: 46,
        }
    )
    assert sum(milliseconds.values()) == pytest.approx(200)
    name, category, seconds = shares.operators[0]
    assert (name, category) == ("gemm", MATMUL)
    assert seconds == pytest.approx(0.04)
    assert list(shares.categories) == sorted(
        shares.categories, key=lambda name: -shares.categories[name]
    )


def test_on_a_cpu_the_innermost_operator_counts_and_other_threads_only_communicate() -> None:
    events = [
        *marks(0, 4),
        event("aten::linear", "cpu_op", 12, 20),
        event("aten::addmm", "cpu_op", 14, 16),
        event("aten::copy_", "cpu_op", 15, 2),
        # A worker that makes batches.
        event("aten::mul", "cpu_op", 0, 100, tid=2),
        event("gloo:all_reduce", "user_annotation", 60, 10, tid=3),
        event("aten::mul", "cpu_op", 82, 3),
        event("Optimizer.step#AdamW.step", "user_annotation", 81, 15),
    ]
    shares = measure_trace(events)
    assert shares is not None
    assert not shares.on_device
    assert {name: 1000 * seconds for name, seconds in shares.categories.items()} == pytest.approx(
        {MATMUL: 18, OTHER: 2, COMMUNICATION: 10, OPTIMIZER: 20, DATA: 10, HOST: 40}
    )


def test_a_trace_without_a_step_has_nothing_to_say() -> None:
    assert measure_trace([event("aten::mm", "cpu_op", 0, 1)]) is None


def shares_of(on_device: bool = True, **parts: float) -> TraceShares:
    names = {"data": DATA, "host": HOST, "matmul": MATMUL, "comm": COMMUNICATION, "copies": COPIES}
    names |= {"optimizer": OPTIMIZER, "other": OTHER, "attention": ATTENTION}
    categories = {names[key]: share / 100 for key, share in parts.items()}
    return TraceShares(
        steps=3,
        seconds=1.0,
        on_device=on_device,
        categories=categories,
        operators=[("a|b" * 40, MATMUL, 0.5)],
    )


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"data": 11, "matmul": 60}, ["waiting for data takes 11%", "dataloader_num_workers"]),
        ({"comm": 30, "matmul": 60}, ["communication takes 30%", "zero=2"]),
        ({"copies": 15, "matmul": 60}, ["copies between host and GPU takes 15%", "offload"]),
        ({"optimizer": 40}, ["optimizer step takes 40%", "train.global_batch_size"]),
        ({"host": 40}, ["takes 40%", "the GPU waits for the host"]),
        ({"host": 40, "on_device": False}, ["takes 40%", "Python is a large part"]),
        ({"other": 60}, ["data.packing=true"]),
        ({"matmul": 50, "attention": 25}, ["take 75%", "only less work is faster"]),
        ({"matmul": 60, "data": 10, "comm": 20}, ["no part is so large"]),
    ],
)
def test_there_is_one_thing_to_try_for_what_is_large(
    parts: dict[str, Any], words: list[str]
) -> None:
    (advice,) = list_advice(shares_of(**parts))
    for word in words:
        assert word in advice


def test_the_summary_has_every_part_and_says_where_the_trace_is() -> None:
    shares = shares_of(matmul=60, comm=30, data=10)
    page = to_markdown(shares, "trace-00000.json.gz")
    assert "| matrix products | 600.00 ms | 60.0% |" in page
    assert "| communication | 300.00 ms | 30.0% |" in page
    assert "trace-00000.json.gz" in page
    # A bar in a name would be a column.
    assert "a\\|ba" in page
    rows = to_rows(shares)
    assert rows["matrix products"] == "600.00 ms   60.0 %"
    assert "communication takes 30%" in rows["try"]
