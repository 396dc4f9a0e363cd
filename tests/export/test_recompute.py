"""Recomputing a merge: right at real sizes and in any order of sums, wrong at the smallest lean;
and answers where it must be.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtune.errors import ExportError
from llmtune.export.merge.deltas import LowRank
from llmtune.export.merge.peft_adapter import read_adapter
from llmtune.export.sources.tensor_source import SafetensorsSource, TensorSource
from llmtune.export.verify import parity
from llmtune.export.verify.expected_tensors import (
    Expectations,
    ExpectedDelta,
    ExpectedTensor,
    find_expected,
)
from llmtune.export.verify.module_outputs import HalfUlpSource
from llmtune.export.verify.parity import ComparedModels, measure_parity, probe_tokens
from llmtune.export.verify.recompute import Comparison, Recomputation, compare_tensor
from llmtune.export.verify.streamed_model import StreamedModel
from llmtune.export.verify.unit import Unit
from tests.export.conftest import make_adapter, make_base
from tests.export.merge_faults import Held
from tests.export.test_merge import export

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draw(
    shape: tuple[int, int], rank: int, by_input: bool, dora: bool, size: float
) -> tuple[ExpectedDelta, torch.Tensor]:
    """A matrix with a few very large rows, as trained ones have, and an adapter that moves it by
    about ``size`` of itself.
    """
    generator = torch.Generator().manual_seed(shape[0] + rank)
    stored = torch.randn(shape, generator=generator) * 0.02
    stored[:3] *= 100
    outputs, inputs = shape[::-1] if by_input else shape
    a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    b = torch.randn(outputs, rank, generator=generator) * size
    lengths = None
    if dora:
        lengths = stored.norm(dim=0 if by_input else 1) * (
            1 + 0.01 * torch.randn(outputs, generator=generator)
        )
    return ExpectedDelta(
        a=a, b=b, scale=16 / 12, by_input=by_input, lengths=lengths
    ), stored.bfloat16()


def merge(
    delta: ExpectedDelta, base: torch.Tensor, dtype: torch.dtype, size: float = 1.0
) -> torch.Tensor:
    """What the merge under test computes."""
    tensors = {"a": delta.a, "b": delta.b, "m": delta.lengths}
    magnitude = None if delta.lengths is None else "m"
    step = LowRank(
        a="a", b="b", scale=delta.scale * size, transposed=delta.by_input, magnitude=magnitude
    ).bind(lambda key: tensors[key])  # type: ignore[arg-type,return-value]
    return step(base, 0).to(dtype)


def compare(delta: ExpectedDelta, base: torch.Tensor, merged: torch.Tensor) -> Comparison:
    found = compare_tensor(
        ExpectedTensor(name="w", delta=replace(delta)),
        Held({"w": base}),
        "w",
        Held({"w": merged}),
        "w",
    )
    assert isinstance(found, Comparison)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("shape", "by_input"), [((700, 4096), False), ((4096, 700), True), ((3000, 64), True)]
)
@pytest.mark.parametrize(
    ("rank", "size"), [(64, 1e-2), (64, 1e-5), pytest.param(1, 1e-3, marks=pytest.mark.slow)]
)
def test_a_right_merge_of_real_sizes_passes_and_a_part_of_one_does_not(
    shape: tuple[int, int], by_input: bool, dora: bool, rank: int, size: float, dtype: torch.dtype
) -> None:
    delta, base = draw(shape, rank, by_input, dora, size)
    found = compare(delta, base, merge(delta, base, dtype))
    assert (found.wrong, found.leaning) == (0, False)
    assert found.elements == shape[0] * shape[1]
    short = merge(delta, base, dtype, 0.5)
    assert not torch.equal(short, merge(delta, base, dtype))
    found = compare(delta, base, short)
    assert found.wrong or found.leaning


def test_sums_in_another_order_are_right() -> None:
    """As on another machine, or on a device."""
    delta, base = draw((256, 512), 48, False, False, 1e-3)
    order = torch.randperm(48)
    other = base + (delta.b[:, order] @ delta.a[order]) * delta.scale
    for dtype in DTYPES:
        found = compare(delta, base, other.to(dtype))
        assert (found.wrong, found.leaning) == (0, False)
    assert found.ties, "in fp32 the order shows"


def test_a_missing_half_that_no_single_number_tells_is_told_by_the_lean_of_all() -> None:
    """In fp32: a change of less than one unit in the last place, half of which rounds to
    nothing.
    """
    signs = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).sign()
    delta, base = (
        ExpectedDelta(a=signs * 0.7 * 2.0**-23, b=torch.ones(64, 1), scale=1.0, by_input=False),
        torch.ones(64, 64),
    )
    right = merge(delta, base, torch.float32)
    assert not compare(delta, base, right).leaning
    lacking = compare(delta, base, merge(delta, base, torch.float32, 0.5))
    assert lacking.ties > 1000
    assert (lacking.wrong, lacking.leaning) == (0, True)
    assert "its numbers lean away from the sum" in lacking.describe()


def test_the_share_is_measured_and_what_rounding_takes_is_told_apart() -> None:
    base = torch.full((4, 64), 1.0).bfloat16()
    # bf16 has steps of 2**-7 above 1: the first half moves by a tenth of one, the second by one.
    a = torch.cat([torch.full((1, 32), 0.1), torch.ones(1, 32)], dim=1) * 2.0**-7
    delta = ExpectedDelta(a=a, b=torch.ones(4, 1), scale=1.0, by_input=False)
    found = compare(delta, base, merge(delta, base, torch.bfloat16))
    assert found.wrong == 0
    assert found.below_rounding == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert found.share == pytest.approx(1 / 1.01, rel=1e-4)
    assert found.changed == 4 * 32
    fine = compare(delta, base, merge(delta, base, torch.float32))
    assert fine.below_rounding == 0
    assert fine.share == pytest.approx(1, rel=1e-5)


def test_numbers_that_are_none_are_wrong() -> None:
    delta, base = draw((64, 64), 4, False, False, 1e-2)
    for number in (torch.nan, torch.inf):
        merged = merge(delta, base, torch.float32)
        merged[3, 4] = number
        assert compare(delta, base, merged).wrong == 1


def unknown_modules(units: list[Unit], aliases: dict[str, list[str]]) -> Expectations:
    """As of a wrapper that nobody has taught the recomputation."""
    found = find_expected(units, aliases)
    unknown = [unit for unit in units if unit.wrapped]
    names = {f"{name}.weight" for unit in unknown for name, _ in unit.inner}
    return Expectations(
        {key: value for key, value in found.tensors.items() if key not in names}, {}, unknown
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_modules_that_cannot_be_recomputed_are_asked_and_less_than_a_rounding_is_no_fault(
    kind: str, dtype: torch.dtype, tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    base = make_base(kind, tmp_path / "base", tiny_model, dtype)
    adapter = make_adapter(base, tmp_path / "adapter", fan_in_fan_out=kind == "gpt2")
    merged = export(base, adapter, tmp_path / "out")
    monkeypatch.setattr(parity, "find_expected", unknown_modules)

    def check(source: TensorSource) -> parity.Parity:
        sides = ComparedModels(
            base_folder=base,
            base=SafetensorsSource(base),
            adapter=read_adapter(adapter),
            merged_folder=merged,
            merged=source,
        )
        return measure_parity(sides, probe_tokens(None, 512, []), dtype, 10.0)

    tensors = load_file(merged / "model.safetensors")
    found = check(Held(tensors))
    assert found.agreement.modules == {}
    assert f"{len(found.output_errors)} modules compared by their outputs alone" in found.describe()
    name = next(name for name in tensors if "up_proj" in name or "c_fc.weight" in name)
    plain = load_file(base / "model.safetensors")[name]
    with pytest.raises(
        ExportError, match=r"1 of \d+ modules have other outputs: .* no rounding explains"
    ):
        check(Held({**tensors, name: plain}))
    # A hundredth of a rounding may be lost: nobody can tell.
    half = next(HalfUlpSource(Held({name: plain}), dtype).blocks(name))
    assert torch.equal(half.float(), half.float().abs())
    check(Held({**tensors, name: (tensors[name].float() + half[0, 0].float() / 100).to(dtype)}))


def test_half_units_are_half_the_way_to_the_next_number() -> None:
    numbers = torch.tensor([[1.0, 1.5, 2.0, -3.0, 0.0078125]])
    for dtype, digits in ((torch.bfloat16, 7), (torch.float16, 10), (torch.float32, 23)):
        (half,) = HalfUlpSource(Held({"w": numbers.to(dtype)}), dtype).blocks("w")
        assert torch.equal(
            half.float(), torch.tensor([[1.0, 1.0, 2.0, 2.0, 2.0**-7]]) * 2.0 ** -(digits + 1)
        )


def test_a_tied_matrix_must_be_right_under_every_name_that_a_loader_takes(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("llama-tied", tmp_path / "base", tiny_model)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    tensors = load_file(export(base, adapter, tmp_path / "out") / "model.safetensors")
    source = SafetensorsSource(base)
    reference = StreamedModel(base, source, read_adapter(adapter))
    expected = find_expected(reference.units, reference.aliases)
    assert Recomputation(source, Held(tensors), reference.aliases, {}).run(expected).problems == []
    # With a configuration that ties them, a loader takes one for both.
    tied = Recomputation(source, Held(tensors), reference.aliases, reference.aliases).run(expected)
    assert len(tied.problems) == 2
