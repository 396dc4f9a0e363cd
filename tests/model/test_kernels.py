"""Faster kernels compute what the modules of transformers and peft compute."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.model.kernels import liger as liger_file
from llmtune.model.kernels import lora_sum
from llmtune.model.kernels.liger import NoLigerKernelsError, find_liger
from llmtune.model.kernels.lora_sum import find_sums
from llmtune.model.kernels.replacement import Replacement, is_same, rounding_limit, row_difference
from llmtune.model.kernels.rms_norm import find_norms, has_one_vector, is_right
from tests.architectures.families import FAMILIES, MIXING

CPU = torch.device("cpu")
#: Without the padding token, whose embedding is zero.
IDS = 1 + torch.arange(2 * 12).view(2, 12) * 5 % 127
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Those whose norms multiply by ``1 + weight``, or subtract a mean.
OTHER_NORMS = {
    *("gemma", "gemma2", "gemma3_text", "recurrent_gemma", "cohere", "cohere2", "mpt", "dbrx"),
    *("qwen3_next", "qwen3_5_text"),
}
#: Architectures with RMSNorm as torch computes it.
RMS_NORMS = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma3n_text", "phi3", "olmo2", "olmo3", "granite"),
    *("glm", "glm4", "smollm3", "helium", "ministral", "exaone4", "arcee", "ernie4_5", "seed_oss"),
    *("hunyuan_v1_dense", "apertus", "diffllama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
    *("granitemoe", "gpt_oss", "llama4_text", "jetmoe", "deepseek_v3", "lfm2", "falcon_h1"),
    *("bamba", "jamba", "granitemoehybrid", "minimax", "mamba", "mamba2", "falcon_mamba"),
}
TRIED = [family for family in FAMILIES if family in RMS_NORMS | OTHER_NORMS]


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random weights, also in its norms."""
    numbers = {"pad_token_id": 0, **FAMILIES[family]}
    config = AutoConfig.for_model(str(numbers.pop("model_type", family)), **numbers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def logits_and_gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.backward(torch.cos(torch.arange(logits.numel()).to(logits.dtype)).view(logits.shape))
    gradients = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return [logits.detach(), *(gradient.clone() for gradient in gradients)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        apart = (one.double() - other.double()).norm()
        assert float(apart) <= limit * max(float(other.double().norm()), 1e-3)


@pytest.mark.parametrize("family", [f for f in TRIED if f not in MIXING])
def test_a_model_with_torchs_norms_is_the_same_model(family: str) -> None:
    check_family(family)


@pytest.mark.process
@pytest.mark.parametrize("family", [f for f in TRIED if f in MIXING])
def test_a_recurrent_model_with_torchs_norms_is_the_same_model(family: str) -> None:
    check_family(family)


def note_and_compute(called: list[str], one: Replacement, *inputs: Any, **named: Any) -> Any:
    called.append(one.name)
    return one.fast(*inputs, **named)


def check_family(family: str) -> None:
    model = build(family)
    names = list(model.state_dict())
    found = find_norms(model, torch.float32, CPU)
    assert bool(found) == (family in RMS_NORMS)
    assert {one.kind for one in found} <= {"RMSNorm"}
    if not found:
        return
    expected = logits_and_gradients(model)
    called: list[str] = []
    for one in found:
        one.put(partial(note_and_compute, called, one))
    assert_close(logits_and_gradients(model), expected, 2e-5)
    assert called, "a forward that nothing calls proves nothing"
    assert list(model.state_dict()) == names
    for one in found:
        one.drop()
    assert_close(logits_and_gradients(model), expected, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss", "deepseek_v3", "gemma3n_text"])
def test_each_norm_is_right_in_each_precision(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    for one in find_norms(model, dtype, CPU):
        module: Any = one.plain.__self__  # type: ignore[attr-defined]
        for scale in (1e-3, 1.0, 50.0):
            hidden = torch.randn(2, 5, *module.weight.shape) * scale
            inputs = hidden.to(dtype).requires_grad_()
            assert is_same(one.plain, one.fast, [inputs], [module.weight])
            if dtype is torch.float32:
                assert row_difference(one.fast(inputs), one.plain(inputs)) < 1e-6


class Norm(nn.Module):
    """RMSNorm, or nearly so."""

    def __init__(self, width: int, eps: float, said: float | None = None, kind: str = "rms"):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps if said is None else said
        self.true_eps = eps
        self.kind = kind

    def forward(self, hidden: Any) -> Any:
        wide, weight = hidden.float(), self.weight
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        root = (wide.pow(2).mean(-1, keepdim=True) + self.true_eps).rsqrt()
        if self.kind == "root outside":
            root = 1 / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.true_eps)
        if self.kind == "gemma":
            return (wide * root * (1 + weight.float())).to(hidden.dtype)
        if self.kind == "groups":
            half = wide.unflatten(-1, (2, -1))
            root = (half.pow(2).mean(-1, keepdim=True) + self.true_eps).rsqrt()
            return weight * (half * root).flatten(-2).to(hidden.dtype)
        return weight * (wide * root).to(hidden.dtype)


@given(
    width=st.integers(1, 40).map(lambda half: 2 * half),
    eps=st.sampled_from([1e-8, 1e-6, 1e-5, 1e-3]),
    wrong=st.sampled_from([1e-6, 1e-5, 1e-3, 0.1]),
    kind=st.sampled_from(["rms", "layer", "root outside", "gemma", "groups"]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_only_what_computes_rms_norm_is_replaced(
    width: int, eps: float, wrong: float, kind: str, dtype: torch.dtype
) -> None:
    module = Norm(width, eps, kind=kind).to(dtype)
    assert bool(find_norms(module, dtype, CPU)) == (kind == "rms")
    # A module that says another constant than it takes is not believed.
    lying = Norm(width, eps, said=wrong).to(dtype)
    assert bool(find_norms(lying, dtype, CPU)) == (wrong == eps)


def test_a_gate_or_another_dtype_is_left_to_the_module() -> None:
    class Gated(Norm):
        def forward(self, hidden: Any, gate: Any = None) -> Any:
            normed = super().forward(hidden)
            return normed if gate is None else normed * gate

    module = Gated(8, 1e-6)
    (one,) = find_norms(module, torch.float32, CPU)
    hidden, gate = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(one.fast(hidden, gate), one.plain(hidden, gate))
    assert torch.equal(one.fast(hidden, gate=gate), one.plain(hidden, gate))
    half = hidden.bfloat16()
    assert one.fast(half).dtype is one.plain(half).dtype is torch.float32
    assert not has_one_vector(nn.RMSNorm(8))
    assert not has_one_vector(nn.Linear(8, 8, bias=False))


def adapt(dtype: torch.dtype, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    bias = changes.pop("bias", False)
    layers = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Linear(20, 16, bias=bias))
    asked: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "1"], **changes}
    config = LoraConfig(init_lora_weights=False, **asked)
    return get_peft_model(layers, config).to(dtype)


@given(
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1, 8, 64]),
    bias=st.booleans(),
    rows=st.sampled_from([(5,), (2, 3), (1, 7)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    hooked=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_lora_sum_is_pefts(
    rank: int, alpha: int, bias: bool, rows: tuple[int, ...], dtype: torch.dtype, hooked: bool
) -> None:
    model = adapt(dtype, r=rank, lora_alpha=alpha, bias=bias)
    names = list(model.state_dict())
    plain = copy.deepcopy(model)
    found = find_sums(model, dtype, CPU)
    assert len(found) == 2
    for one in found:
        one.use()
    outputs: list[torch.Tensor] = []
    if hooked:
        # What a hook has seen is not written over.
        layer = model.base_model.model[0]
        layer.base_layer.register_forward_hook(lambda *a: outputs.append(a[2]))
    hidden = torch.randn(*rows, 12).to(dtype)
    results = []
    for each in (plain, model):
        inputs = hidden.clone().requires_grad_()
        with mock.patch.object(lora_sum, "add_product", wraps=lora_sum.add_product) as added:
            result = each(inputs)
        assert added.call_count == (2 if each is model else 0)
        result.backward(torch.cos(torch.arange(result.numel()).to(dtype)).view(result.shape))
        trained = [p for p in each.parameters() if p.requires_grad]
        results.append([result.detach(), inputs.grad, *(p.grad for p in trained)])
    # Two layers, and the rounding of the first goes through the second.
    assert_close(results[1], results[0], 4 * rounding_limit(dtype))
    if hooked:
        base = layer.base_layer
        assert torch.equal(outputs[0], nn.functional.linear(hidden, base.weight, base.bias))
    assert list(model.state_dict()) == names
    for one in found:
        one.drop()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_lora_sum_keeps_dropout_and_what_peft_can_do_besides() -> None:
    model = adapt(torch.float32, lora_dropout=0.5)
    plain = copy.deepcopy(model)
    for one in find_sums(model, torch.float32, CPU):
        one.use()
    hidden = torch.randn(6, 12)
    for change in ("train", "disable", "enable", "eval", "merge_adapter"):
        for each in (plain, model):
            if change in ("disable", "enable"):
                getattr(each.base_model, f"{change}_adapter_layers")()
            else:
                getattr(each, change)()
        results = []
        for each in (plain, model):
            torch.manual_seed(3)
            results.append(each(hidden))
        assert row_difference(*results) < 1e-5, change


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True, "bias": True}])
def test_variants_of_lora_keep_pefts_forward(changes: dict[str, Any]) -> None:
    assert find_sums(adapt(torch.float32, **changes), torch.float32, CPU) == []


def test_two_adapters_keep_pefts_forward() -> None:
    model = adapt(torch.float32)
    found = find_sums(model, torch.float32, CPU)
    for one in found:
        one.use()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    hidden = torch.randn(6, 12)
    assert row_difference(model(hidden), plain(hidden)) < 1e-6
    for one in found:
        one.drop()
    assert find_sums(model, torch.float32, CPU) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart_are_seen(dtype: torch.dtype) -> None:
    values = torch.randn(4, 64).to(dtype)
    assert row_difference(values, values.clone()) == 0
    changed = values.clone()
    changed[2] *= 1.05
    assert row_difference(changed, values) > rounding_limit(dtype)
    changed[2, 0] = float("nan")
    assert not row_difference(changed, values) <= rounding_limit(dtype)
    zeros = torch.zeros(2, 3, dtype=dtype)
    assert row_difference(zeros, zeros) == 0
    assert row_difference(zeros + 1, zeros) == float("inf")
    assert row_difference(values[:2], values) == float("inf")
    assert row_difference(values.double(), values) == float("inf")


class LigerNorm:
    """Binds what Liger's norms are: a function that reads attributes of the module."""

    @staticmethod
    def forward(module: Any, hidden: Any) -> Any:
        weight = module.weight + module.offset
        return nn.functional.rms_norm(hidden, weight.shape, weight, module.variance_epsilon)


def pretend_liger(
    monkeypatch: pytest.MonkeyPatch, kinds: dict[str, Callable[..., None]]
) -> dict[str, Any]:
    """Install a package with the interface of liger-kernel 0.8."""
    package: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = kinds
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return kinds


def bind(module: Any, forward: Callable[..., Any]) -> None:
    module.__dict__["forward"] = forward.__get__(module)
    module.__dict__["_get_name"] = (lambda self: "Liger").__get__(module)


def make_apply(seen: list[dict[str, Any]], wrong: str = "") -> Callable[..., None]:
    """Make a function that does what Liger's does for Llama (version 0.8.5).

    Args:
        wrong: The kernel that computes something else, or raises.
    """

    def rotate(q: Any, k: Any, cos: Any, sin: Any, *_: Any, **__: Any) -> Any:
        cos, sin = cos[:, None], sin[:, None]
        half = q.shape[-1] // 2

        def turn(x: Any) -> Any:
            turned = torch.cat([-x[..., half:], x[..., :half]], -1)
            return x.copy_(x * cos + turned * sin)  # in place, as the kernel does

        return turn(q), turn(k) * (2 if wrong == "rope" else 1)

    def run_swiglu(module: Any, x: Any) -> Any:
        if wrong == "swiglu":
            raise RuntimeError("no such kernel\nin this Triton")
        return module.down_proj(nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))

    def apply_liger_kernel_to_llama(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        from transformers.models.llama import modeling_llama

        seen.append(dict(locals()) | {"modeling_llama": None})
        file: Any = modeling_llama
        assert (rope, rms_norm, swiglu) == (True, True, True)
        assert (cross_entropy, fused_linear_cross_entropy) == (False, False)
        file.apply_rotary_pos_emb, file.LlamaRMSNorm = rotate, LigerNorm
        base = getattr(model, model.base_model_prefix, model)
        norms = [base.norm]
        for layer in base.layers:
            bind(layer.mlp, run_swiglu)
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
        for norm in norms:
            norm.offset = 1.0 if wrong == "rms_norm" else 0.0
            bind(norm, LigerNorm.forward)
        if wrong == "apply":
            raise AttributeError("no module of that name")

    return apply_liger_kernel_to_llama


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False),
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_what_liger_changes_is_found_and_taken_back(
    adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    seen: list[dict[str, Any]] = []
    pretend_liger(monkeypatch, {"llama": make_apply(seen)})
    model = with_adapters(build("llama")) if adapted else build("llama")
    names, file = list(model.state_dict()), dict(vars(modeling_llama))
    expected = logits_and_gradients(model)
    found = find_liger(model, torch.float32, CPU)
    assert {name: seen[0][name] for name in ("rope", "cross_entropy", "swiglu")} == {
        "rope": True,
        "cross_entropy": False,
        "swiglu": True,
    }
    base = model.get_base_model() if adapted else model
    assert seen[0]["model"] is base
    assert sorted(one.kind for one in found) == sorted(
        5 * ["Liger's LlamaRMSNorm"] + 2 * ["Liger's LlamaMLP"] + ["Liger's apply_rotary_pos_emb"]
    )
    assert vars(modeling_llama) == file, "nothing is changed before it was compared"
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert_close(logits_and_gradients(model), expected, 0)

    try:
        for one in found:
            one.use()
        assert modeling_llama.apply_rotary_pos_emb is not file["apply_rotary_pos_emb"]
        with torch.no_grad():
            assert_close([model(input_ids=IDS).logits], expected[:1], 2e-5)
        assert list(model.state_dict()) == names
    finally:
        for one in found:
            one.drop()
    assert vars(modeling_llama) == file


def test_a_norm_of_liger_that_computes_something_else_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_liger(monkeypatch, {"llama": make_apply([], wrong="rms_norm")})
    kinds = {one.kind for one in find_liger(build("llama"), torch.float32, CPU)}
    assert kinds == {"Liger's LlamaMLP", "Liger's apply_rotary_pos_emb"}


def test_a_model_is_as_it_was_where_liger_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model, file = build("llama"), dict(vars(modeling_llama))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(NoLigerKernelsError, match="cannot be imported: ModuleNotFoundError"):
        find_liger(model, torch.float32, CPU)
    pretend_liger(monkeypatch, {"qwen2": make_apply([])})
    with pytest.raises(NoLigerKernelsError, match="Liger has no kernels for llama"):
        find_liger(model, torch.float32, CPU)
    pretend_liger(monkeypatch, {"llama": make_apply([], wrong="apply")})
    with pytest.raises(NoLigerKernelsError, match="do not fit llama: AttributeError: no module"):
        find_liger(model, torch.float32, CPU)
    assert vars(modeling_llama) == file
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_flags_that_are_not_asked_for_are_turned_off() -> None:
    def apply(
        rope: bool = True, geglu: bool = True, layer_norm: bool = True, model: Any = None
    ) -> None:
        pass

    assert liger_file._flags(apply) == {"rope": True, "geglu": False, "layer_norm": False}


def test_a_wrong_constant_is_found() -> None:
    module = Norm(16, 1e-6)

    def with_another(module: Any, hidden: Any) -> Any:
        return nn.functional.rms_norm(hidden, (16,), module.weight, 1e-5)

    def with_the_same(module: Any, hidden: Any) -> Any:
        return nn.functional.rms_norm(hidden, (16,), module.weight, 1e-6)

    for dtype in DTYPES:
        assert not is_right(module, with_another, dtype, CPU)
        assert is_right(module, with_the_same, dtype, CPU)
