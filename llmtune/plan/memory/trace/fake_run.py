"""Run a few layers of a model on fake tensors, and record what they would allocate.

``FakeTensorMode`` runs every operation without memory or arithmetic; ``MemTracker`` records what
would be allocated. Parameters' gradients are dropped as soon as they are made, because they are
counted with ZeRO's states. The fake tensors are those of a CPU; ``gpu_dropout`` replaces the
operations of which a GPU keeps less.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.schema import Precision
from llmtune.plan.memory.trace.fake_stacks import adapt_stacks, any_dtype
from llmtune.process import hold_interruptions
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.tuner.adapted_layers import linear_layers, matrix_sides
from llmtune.tuner.lora_settings import lora_rank
from llmtune.tuner.tuner import TUNERS

if TYPE_CHECKING:
    from llmtune.task.task import Task

#: The first layer's input is not an intermediate result; from the second layer on each adds the
#: same.
TRACED_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """The settings on which the activations of a micro-batch depend."""

    rows: int
    length: int
    gradient_checkpointing: bool
    attn_implementation: str
    precision: Precision
    zero3: bool
    """Under ZeRO 3 DeepSpeed's linear function keeps its input, even if the weight is frozen."""
    masked: bool = False
    """Attention gets a mask, because documents share a row, or tokens attend to later ones.

    It keeps the mask, and keys and values repeated per head.
    """
    bidirectional: bool = False
    """Tokens attend to later ones, so that the mask tells where padding is."""
    after_frozen: bool = False
    """Frozen layers come before, so that the input needs no gradient."""
    accelerator: str = "cuda"
    """Dropout keeps more on a CPU."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes that a run of :data:`TRACED_LAYERS` layers allocated."""

    held: int
    """Bytes at the end of the forward pass."""
    layer: int
    """The share of one layer."""
    peak: int
    """Bytes at the peak of forward and backward pass."""


def trace_layers(
    architecture: Any,
    tuner: TunerConfig,
    settings: TraceSettings,
    trained: Sequence[str],
    task: Task | None = None,
) -> Trace:
    """Run the forward and the backward pass of a model of few layers on fake tensors.

    The inputs are vectors, so that the table of embeddings is left out.

    Args:
        trained: Names of the trained parameters of the whole model.
        task: Its head is run too; None leaves the head to the caller.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    class PeakTracker(MemTracker):
        """Records only the model's peak; each module's would take half of a trace's time."""

        def _update_peak_stats(self, *args: Any) -> None:
            modules, self.memory_tracking = self.memory_tracking, {}  # type: ignore[assignment]
            super()._update_peak_stats(*args)
            self.memory_tracking = modules

    # The model and its inputs, on fake tensors.
    dtype = configured_dtype(settings.precision.value)
    model = _build(architecture, tuner, settings, dtype, trained, task)
    after: list[int] = []
    on_gpu = settings.accelerator == "cuda"
    kernels = gpu_dropout() if on_gpu else contextlib.nullcontext()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with hold_interruptions(), fake, kernels, any_dtype():
        _to_fake(model)
        named = _make_inputs(architecture.get_text_config(), settings, dtype)

        # One forward and one backward pass, with a snapshot after each layer.
        tracker = PeakTracker()
        tracker.track_external(model, *named.values())
        for layer in _layers(model):
            layer.register_forward_hook(
                lambda *_: after.append(_activation_bytes(tracker.get_tracker_snapshot("current")))
            )
        with tracker:
            output = model(**named)
            output = output.logits if task is not None else output.last_hidden_state
            held = _activation_bytes(tracker.get_tracker_snapshot("current"))
            gradient = torch.empty_like(output)
            output.backward(gradient)
            named["inputs_embeds"].grad = None
        peak = _activation_bytes(tracker.get_tracker_snapshot("peak"))
    # The output and its gradient are counted with the loss, which has them whatever the layers do.
    own = output.numel() * dtype.itemsize
    return Trace(held - own, after[2] - after[1], peak - own)


def _make_inputs(text: Any, settings: TraceSettings, dtype: Any) -> dict[str, Any]:
    """Make the inputs of a model by their names."""
    import torch

    # ELECTRA's embeddings are narrower than its layers.
    width = getattr(text, "embedding_size", None) or text.hidden_size
    shape = (settings.rows, settings.length, width)
    inputs = torch.empty(shape, dtype=dtype, requires_grad=not settings.after_frozen)
    named = {"inputs_embeds": inputs}
    if settings.bidirectional:
        named["attention_mask"] = torch.ones(shape[:2], dtype=torch.long)
    return named


def _layers(model: Any) -> Any:
    """The module list of the layers: the one that holds most modules."""
    from torch import nn

    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == TRACED_LAYERS
    ]
    return max(lists, key=lambda module: sum(1 for _ in module.modules()))


def _build(
    architecture: Any,
    tuner: TunerConfig,
    settings: TraceSettings,
    dtype: Any,
    trained: Sequence[str],
    task: Task | None,
) -> Any:
    import torch
    import transformers

    config = copy.deepcopy(architecture)
    text = config.get_text_config()
    text.num_hidden_layers = TRACED_LAYERS
    # One entry per layer, where an architecture mixes kinds of attention.
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[:TRACED_LAYERS])
    # A small vocabulary, because embeddings are not part of the trace. RoBERTa's positions begin
    # after the number of its padding token.
    text.vocab_size = 8
    if text.pad_token_id is not None and text.pad_token_id >= text.vocab_size:
        text.pad_token_id = None
    config.use_cache = text.use_cache = False
    kernel = settings.attn_implementation
    if kernel != "eager" and not settings.masked:
        kernel = _unmasked()
    kind = TUNERS.find(tuner.kind)
    model_class = task.model_class if task is not None else "AutoModel"
    with torch.device("meta"):
        model = getattr(transformers, model_class).from_config(
            config, dtype=dtype, attn_implementation=kernel
        )
        if kind.has_adapter:
            model = _with_adapters(model, tuner, dtype, trained)
        elif not kind.trains_all:
            _freeze_others(model, trained)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if settings.zero3:
        _keep_linear_inputs(model)
    return model


def _freeze_others(model: Any, trained: Sequence[str]) -> None:
    """Freeze what is frozen in every layer of the whole model.

    Names are compared without the numbers of layers, and without the prefix that the body has in a
    language model. Layers that no gradient reaches are left to the caller.
    """
    endings = {f".{_unnumbered(name)}" for name in trained}
    for name, parameter in model.named_parameters():
        if not any(ending.endswith(f".{_unnumbered(name)}") for ending in endings):
            parameter.requires_grad_(False)


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


@contextlib.contextmanager
def gpu_dropout() -> Iterator[None]:
    """Let dropout keep what it keeps on a GPU.

    On a CPU dropout keeps a mask in the dtype of its input, on a GPU one byte per element
    (``aten/src/ATen/native/Dropout.cpp``). SDPA with dropout keeps all products of two tokens on a
    CPU, and the state of the random numbers in the kernels of a GPU.

    The functions are replaced, because a mode of torch ends before layers are recomputed.
    """
    import torch
    from torch.nn import functional

    attend, drop = functional.scaled_dot_product_attention, functional.dropout

    def attend_without_dropout(*args: Any, **named: Any) -> Any:
        return attend(*args, **{**named, "dropout_p": 0.0})

    def keep_bytes(inputs: Any, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> Any:
        return torch.native_dropout(inputs, p, True)[0] if training and p > 0 else inputs

    replaced: Any = functional
    replaced.scaled_dot_product_attention, replaced.dropout = attend_without_dropout, keep_bytes
    try:
        yield
    finally:
        replaced.scaled_dot_product_attention, replaced.dropout = attend, drop


def _unmasked() -> str:
    """Register SDPA without a mask, which keeps what FlashAttention keeps.

    On fake tensors transformers would make a mask in any case.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "llmtune_unmasked"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, lambda *_args, **_kwargs: None)
    return name


def _to_fake(model: Any) -> None:
    """Replace meta tensors by fake ones, because MemTracker ignores meta tensors."""
    import torch
    from torch import nn

    for module in model.modules():
        for name, tensor in list(module._buffers.items()):
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in list(module._parameters.items()):
            if tensor is None:
                continue
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if tensor.requires_grad:
                module._parameters[name] = nn.Parameter(fake)
                module._parameters[name].register_post_accumulate_grad_hook(_drop_gradient)
            else:
                # MemTracker hooks the gradient of every parameter, and frozen ones have none.
                del module._parameters[name]
                module._buffers[name] = fake


def _with_adapters(model: Any, tuner: TunerConfig, dtype: Any, trained: Sequence[str]) -> Any:
    """Freeze the model, and add LoRA layers that compute what peft's do.

    Importing peft would take longer than the trace.
    """
    import torch
    from torch import nn

    is_quantized = TUNERS.find(tuner.kind).is_quantized

    class Adapted(nn.Module):
        """``base(x) + B(A(dropout(x))) * scale``."""

        def __init__(self, base: nn.Module, rank: int):
            super().__init__()
            inputs, outputs = matrix_sides(base)
            self.base = base
            self.dropout = nn.Dropout(tuner.lora_dropout) if tuner.lora_dropout else nn.Identity()
            self.down = nn.Linear(inputs, rank, bias=False, dtype=dtype)
            self.up = nn.Linear(rank, outputs, bias=False, dtype=dtype)
            if tuner.use_dora:
                self.lengths = nn.Parameter(torch.empty(outputs, dtype=dtype))

        def forward(self, inputs: Any) -> Any:
            """Compute the adapted layer."""
            dropped = self.dropout(inputs)
            if tuner.use_dora:
                return self._with_lengths(inputs, dropped)
            # The value of the scale does not matter for memory.
            return self.base(inputs) + self.up(self.down(dropped)) * 2.0

        def _with_lengths(self, inputs: Any, dropped: Any) -> Any:
            """Compute what peft's ``DoraLinearLayer.forward`` does, with the same matrices."""
            base: Any = self.base
            result = base(inputs)
            eye = torch.eye(self.down.weight.shape[1], dtype=dtype)
            product = self.up(self.down(eye)).T.detach()
            weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
            # A weight in 4 bits is dequantized once more.
            weight = weight.clone() if is_quantized else weight
            norms = torch.linalg.norm(weight.detach() + product * 2.0, dim=1).to(dtype)
            factor = (self.lengths / norms).view(1, -1)
            plain = result
            if tuner.lora_dropout:
                plain = nn.functional.linear(dropped, weight)
            elif base.bias is not None:
                plain = result - base.bias
            update = self.up(self.down(dropped))
            return result + (factor - 1) * plain + factor * update * 2.0

    _freeze_others(model, trained)
    adapted = {
        f".{_unnumbered(name.partition('.lora_A.')[0])}" for name in trained if ".lora_A." in name
    }
    for name, module in linear_layers(model).items():
        if any(layer.endswith(f".{_unnumbered(name)}") for layer in adapted):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapted(module, lora_rank(tuner, name)))
    adapt_stacks(model, tuner, dtype)
    return model


def _keep_linear_inputs(model: Any) -> None:
    """Make linear layers keep input and weight, as in DeepSpeed's ``zero/linear.py``.

    The function is ``LinearFunctionForZeroStage3``.
    """
    import torch
    from torch import nn

    class KeepInput(torch.autograd.Function):
        """A frozen linear layer that keeps its input."""

        @staticmethod
        def forward(ctx: Any, inputs: Any, weight: Any) -> Any:
            ctx.save_for_backward(inputs, weight)
            return inputs.matmul(weight.t())

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            _, weight = ctx.saved_tensors
            return gradient.matmul(weight), None

    for module in model.modules():
        if (
            isinstance(module, nn.Linear)
            and not module.weight.requires_grad
            and getattr(module, "bias", None) is None
        ):
            linear: Any = module
            linear.forward = functools.partial(_apply_kept, KeepInput, linear)


def _apply_kept(function: Any, linear: Any, inputs: Any) -> Any:
    return function.apply(inputs, linear.weight)


def _drop_gradient(parameter: Any) -> None:
    parameter.grad = None


def _activation_bytes(snapshot: dict[Any, dict[Any, int]]) -> int:
    """Bytes of all that is not a parameter, a buffer or an input."""
    (values,) = snapshot.values()
    names = {getattr(key, "value", str(key)): value for key, value in values.items()}
    return sum(value for name, value in names.items() if name in ("Activation", "Temp", "Gradient"))
