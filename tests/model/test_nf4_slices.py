"""Weights in NF4: slices of any ranks join to bitsandbytes' bits, and the layer computes its
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.schema import Precision
from llmtune.errors import ConfigError
from llmtune.model.build import WeightsTo, build_model
from llmtune.model.nf4 import nf4_slices
from llmtune.model.nf4.nf4_linear import Nf4Linear
from llmtune.model.nf4.nf4_model import In4Bits
from llmtune.model.nf4.nf4_slices import Nf4Weight, load_bitsandbytes
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.tuner.nf4_layout import Nf4Layout
from llmtune.tuner.tuner import TUNERS
from tests.export.conftest import make_base

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def join_slices(weight: Tensor, layout: Nf4Layout, ranks: int) -> Tensor:
    """The parameter as the ranks of ZeRO 3 fill it, each with its slice, which is padded."""
    flat = weight.reshape(-1)
    found: dict[int, Tensor] = {}
    numel = layout.stored_numel(weight.dtype.itemsize)
    size = -(-numel // ranks)
    read: list[tuple[int, int]] = []

    def read_flat(start: int, count: int) -> Tensor:
        read.append((start, count))
        return flat[start : start + count]

    def quantize(rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        start = rank * size
        slices = Nf4Weight(
            layout=layout,
            read=read_flat,
            dtype=weight.dtype,
            device=torch.device("cpu"),
            gather=gather,
        )
        return slices.read_stored(start, max(0, min(size, numel - start)))

    def note(rank: int, scales: Tensor) -> Tensor:
        found[rank] = scales
        return torch.ones(layout.blocks)

    # What each rank has to tell the others, and then what all of them heard.
    for rank in range(ranks):
        quantize(rank, partial(note, rank))
    heard = torch.cat([found[rank] for rank in range(ranks)])
    assert len(heard) == layout.blocks
    pieces = []
    for rank in range(ranks):
        read.clear()
        pieces.append(quantize(rank, lambda _: heard))
        # No more than the blocks of its slice.
        share = 2 * size * weight.dtype.itemsize
        assert sum(count for _, count in read) <= min(layout.numel, share + 2 * 64)
    return torch.cat(pieces)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 90),
    inputs=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    ranks=st.integers(1, 4),
    double_quant=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_slices_of_all_ranks_are_what_bitsandbytes_makes_of_the_whole_weight(
    outputs: int, inputs: int, dtype: torch.dtype, ranks: int, double_quant: bool, seed: int
) -> None:
    functional = load_bitsandbytes()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    layer = Nf4Linear(
        inputs, outputs, False, double_quant=double_quant, transposed=False, dtype=dtype
    )
    layer.weight.data.copy_(join_slices(weight, layer.matrix.layout, ranks))

    expected, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    codes, found = layer.matrix.unpack(layer.weight, (outputs, inputs))
    assert torch.equal(codes, expected)
    assert torch.equal(found.absmax, state.absmax)
    if double_quant:
        assert torch.equal(found.offset, state.offset)
        assert torch.equal(found.state2.absmax, state.state2.absmax)
        assert torch.equal(found.state2.code, state.state2.code)

    # The values: by blocks, because bitsandbytes' CPU kernel is wrong for other rows.
    numel = outputs * inputs
    scales = state.absmax
    if double_quant:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    table = functional.get_4bit_type("nf4", device="cpu")
    pairs = torch.stack([expected.view(-1) >> 4, expected.view(-1) & 15], dim=1).reshape(-1)
    by_hand = table[pairs[:numel].long()] * scales.repeat_interleave(64)[:numel]
    found_values = layer.matrix.dequantize(layer.weight)
    assert found_values.shape == (outputs, inputs)
    assert torch.equal(found_values.reshape(-1), by_hand.to(dtype))


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 96, dtype=torch.bfloat16)
    layout = Nf4Layout(weight.numel(), True)
    whole = join_slices(weight, layout, 3)
    monkeypatch.setattr(nf4_slices, "CHUNK_ELEMENTS", 128)
    assert torch.equal(join_slices(weight, layout, 3).view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("inputs", [64, 192, 48, 65])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_and_its_gradient_are_those_of_the_dequantized_weight(
    inputs: int, bias: bool, dtype: torch.dtype
) -> None:
    layer = Nf4Linear(inputs, 24, bias, double_quant=True, transposed=False, dtype=dtype)
    weight = torch.randn(24, inputs).to(dtype)
    layer.weight.data.copy_(join_slices(weight, layer.matrix.layout, 1))
    if bias:
        layer.bias.data.normal_()
    plain = torch.nn.Linear(inputs, 24, bias, dtype=dtype)
    plain.load_state_dict({"weight": layer.matrix.dequantize(layer.weight)}, strict=False)
    if bias:
        plain.bias.data.copy_(layer.bias.data)
    values = torch.randn(2, 5, inputs).to(dtype)
    results = []
    for module in (layer, plain):
        given_values = values.clone().requires_grad_()
        product = module(given_values)
        (product.float() ** 2).sum().backward()
        results.append((product, given_values.grad, module.bias.grad if bias else None))
    for ours, theirs in zip(*results, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)
    assert layer.weight.grad is None


def test_the_backward_pass_reads_the_parameter_again_as_zero_3_gathers_it() -> None:
    """Between the passes ZeRO 3 takes what a parameter holds; nothing else may have kept it."""
    layer = Nf4Linear(64, 8, False, double_quant=True, transposed=False, dtype=torch.float32)
    weight = torch.randn(8, 64)
    layer.weight.data.copy_(join_slices(weight, layer.matrix.layout, 1))
    held, expected = layer.weight.data, layer.matrix.dequantize(layer.weight)
    values = torch.randn(3, 64, requires_grad=True)
    product = layer(values)
    layer.weight.data = torch.empty(0)
    layer.weight.data = held.clone()
    held.zero_()
    product.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, expected.sum(0).expand(3, 64))


@settings(max_examples=100, deadline=None)
@given(numel=st.integers(1, 10**7), double_quant=st.booleans())
def test_the_parts_of_a_buffer_do_not_overlap(numel: int, double_quant: bool) -> None:
    layout = Nf4Layout(numel, double_quant)
    blocks = math.ceil(numel / 64)
    assert layout.code_bytes == math.ceil(numel / 2) <= layout.scales_start
    assert layout.scales_start % 4 == layout.mean_start % 4 == 0
    if double_quant:
        assert layout.mean_start - layout.scales_start == 4 * math.ceil(blocks / 256)
        assert layout.bytes_start == layout.mean_start + 4
        assert layout.nbytes == layout.bytes_start + blocks
    else:
        assert layout.nbytes == layout.scales_start + 4 * blocks
    assert layout.nbytes <= 4 * layout.stored_numel(4) < layout.nbytes + 4


def load_in_4_bits(folder: Path, precision: Precision = Precision.fp32) -> Any:
    """A model in 4 bits, of one rank without ZeRO."""
    in_4_bits = In4Bits(True, torch.device("cpu"), lambda scales: scales)
    config = ModelConfig(name_or_path=str(folder))
    return build_model(folder, config, precision, "eager", WeightsTo(in_4_bits=in_4_bits))


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_a_model_has_the_layers_and_the_bits_that_transformers_loads(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """GPT-2's weights lie the other way round in its files."""
    from tests.export.test_nf4 import load_in_4bit

    base = make_base(kind, tmp_path / "base", tiny_model) if kind != "tied" else tiny_model
    expected = load_in_4bit(base, torch.float32, torch.float32)
    model = load_in_4_bits(base)
    layers = 0
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear):
            layers += 1
            theirs = expected.get_submodule(name)
            codes, state = module.matrix.unpack(module.weight, module.matrix.shape)
            assert torch.equal(codes, theirs.weight.data), name
            assert torch.equal(state.absmax, theirs.weight.quant_state.absmax), name
    assert layers == sum(type(m).__name__ == "Linear4bit" for m in expected.modules()) > 0
    others = {name for name, _ in model.named_parameters()} - {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Nf4Linear)
    }
    for name in others:
        assert torch.equal(model.get_parameter(name), expected.get_parameter(name)), name
    if kind != "tied":
        # Rows of 48 numbers, for which bitsandbytes' CPU kernel takes wrong scales.
        return
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_says_how_the_weights_lie_in_the_files(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The adapter's own layers have them the other way round, for GPT-2."""
    base = make_base(kind, tmp_path / "base", tiny_model)
    config = TunerConfig(kind="qlora", lora_r=4)
    wrapped = TUNERS.find("qlora").attach(load_in_4_bits(base), config, str(base), 1)
    assert wrapped.peft_config["default"].fan_in_fan_out is (kind == "gpt2")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("double_quant", ["true", "false"])
def test_the_plan_counts_the_bytes_that_are_there(
    precision: str, double_quant: str, tiny_model: Path
) -> None:
    config = compose_config(
        [
            *(f"model.name_or_path={tiny_model}", "data.train=a.jsonl", "tuner=qlora"),
            f"tuner.bnb_4bit_use_double_quant={double_quant}",
        ]
    ).config
    in_4_bits = In4Bits(double_quant == "true", torch.device("cpu"), lambda scales: scales)
    model = build_model(
        tiny_model,
        config.model,
        Precision(precision),
        "eager",
        WeightsTo(in_4_bits=in_4_bits),
    )
    size = 4 if precision == "fp32" else 2
    shape = resolve_shape(config.model, config.tuner)
    assert shape.weight_bytes(size) == size * sum(p.numel() for p in model.parameters())
    for tensor in shape.tensors:
        if not tensor.adapter:
            assert tensor.stored_numel(size) == model.get_parameter(tensor.name).numel()


def test_what_is_in_4_bits_already_is_not_quantized_again(tiny_model: Path, tmp_path: Path) -> None:
    from tests.export.test_nf4 import load_in_4bit

    load_in_4bit(tiny_model, torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"quantizes a model in 16 bits; take tuner=lora"):
        load_in_4_bits(tmp_path)
