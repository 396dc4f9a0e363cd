"""Activations, by running a few layers of the model on fake tensors and scaling by layers.

``FakeTensorMode`` runs every operation without memory or arithmetic; ``MemTracker`` books what
would be allocated. Parameters' gradients are dropped as soon as they are made: where they live is
ZeRO's affair and is counted there.
"""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.schema import Precision
from llmtune.plan.memory.model_shape import ModelShape, load_architecture
from llmtune.plan.memory.trace_cache import read_cached, write_cached
from llmtune.process import hold_interruptions
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.tuner.adapted_layers import choose_layers, linear_layers, matrix_sides
from llmtune.tuner.lora_settings import lora_rank
from llmtune.tuner.tuner import TUNERS, mark_trained

#: After the first layer, its input is no intermediate result; from the second on, each adds the
#: same.
TRACED_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBytes:
    """Of one micro-batch on one rank."""

    saved: int
    """Held from the forward pass to the backward pass, over all layers."""
    working: int
    """Most that the backward pass of one layer, recomputed or not, has on top of that."""
    logits: int
    """Most that head and loss have on top of it, forward and backward."""
    origin: str = "traced"
    """``traced``, or ``estimated`` where the architecture could not be run on fake tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """What the activations of a micro-batch depend on."""

    rows: int
    length: int
    gradient_checkpointing: bool
    attn_implementation: str
    precision: Precision
    zero3: bool
    """Under ZeRO 3 DeepSpeed's linear function keeps its input, also where the weight is frozen."""
    masked: bool = False
    """Documents that share a row: attention then keeps a mask, and keys and values repeated for
    every head.
    """


#: Traces of this process: the search for what would make a job fit plans the same model many times.
_TRACES: dict[str, dict[TraceSettings, ActivationBytes]] = {}


class ActivationModel:
    """Traces on demand and remembers, for one model and tuner."""

    def __init__(
        self,
        model: ModelConfig,
        tuner: TunerConfig,
        shape: ModelShape,
        cache_dir: Path | None = None,
    ):
        self.cache_dir = cache_dir
        self.model = model
        self.tuner = tuner
        self.shape = shape
        self._architecture: Any = None
        self._done = _TRACES.setdefault(repr((model, tuner)), {})

    def __call__(self, settings: TraceSettings) -> ActivationBytes:
        """Bytes of a micro-batch; rows scale, so that one row is traced."""
        tuner = TUNERS.find(self.tuner.kind)
        one = TraceSettings(
            rows=1,
            length=settings.length,
            gradient_checkpointing=settings.gradient_checkpointing,
            attn_implementation=settings.attn_implementation,
            precision=settings.precision,
            # What is trained keeps its input anyway.
            zero3=settings.zero3
            and not tuner.trains_all
            and not (tuner.has_adapter and self.tuner.target_modules == "all-linear"),
            masked=settings.masked and settings.attn_implementation in ("sdpa", "eager"),
        )
        if one not in self._done:
            self._done[one] = self._measure(one)
        found, rows = self._done[one], settings.rows
        return ActivationBytes(
            saved=found.saved * rows,
            working=found.working * rows,
            logits=found.logits * rows,
            origin=found.origin,
        )

    def _measure(self, settings: TraceSettings) -> ActivationBytes:
        # The shape too: a local folder may hold another model tomorrow.
        key = repr((self.model, self.tuner, settings, self.shape))
        stored = read_cached(self.cache_dir, "traces", key)
        if stored is not None:
            return ActivationBytes(
                saved=stored["saved"], working=stored["working"], logits=stored["logits"]
            )
        found = self._trace(settings)
        if found.origin == "traced":
            values = {"saved": found.saved, "working": found.working, "logits": found.logits}
            write_cached(self.cache_dir, "traces", key, values)
        return found

    def _trace(self, settings: TraceSettings) -> ActivationBytes:
        logits = loss_bytes(settings.length, self.shape.vocab_size, settings.precision)
        if self._architecture is None:
            self._architecture = load_architecture(self.model)
        try:
            trace = trace_layers(self._architecture, self.tuner, settings)
        except Exception as error:
            # Any of the hundreds of architectures may do something that fake tensors cannot.
            logging.getLogger(__name__).info(
                "activations estimated, because the trace failed: %s", error
            )
            return estimate(self.shape, settings, logits)
        saved = trace.held + trace.layer * (self.shape.layers - TRACED_LAYERS)
        return ActivationBytes(saved=saved, working=max(0, trace.peak - trace.held), logits=logits)


@dataclass(frozen=True, slots=True)
class Trace:
    """What a run of :data:`TRACED_LAYERS` allocated, in bytes."""

    held: int
    """At the end of the forward pass."""
    layer: int
    """Of that, by one layer."""
    peak: int
    """At the worst moment of forward and backward."""


def trace_layers(architecture: Any, tuner: TunerConfig, settings: TraceSettings) -> Trace:
    """Run the forward and the backward pass of a model of few layers on fake tensors.

    Embeddings are left out by feeding hidden states in; the head is :func:`loss_bytes`' affair.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    class PeakTracker(MemTracker):
        """Books the whole's peak, and not each module's, which takes half of the time of a
        trace.
        """

        def _update_peak_stats(self, *args: Any) -> None:
            modules, self.memory_tracking = self.memory_tracking, {}  # type: ignore[assignment]
            super()._update_peak_stats(*args)
            self.memory_tracking = modules

    dtype = configured_dtype(settings.precision.value)
    model = _build(architecture, tuner, settings, TRACED_LAYERS, dtype)
    after: list[int] = []
    with hold_interruptions(), FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(model)
        hidden = architecture.get_text_config().hidden_size
        inputs = torch.empty(
            settings.rows, settings.length, hidden, dtype=dtype, requires_grad=True
        )
        tracker = PeakTracker()
        tracker.track_external(model, inputs)
        for layer in _layers(model):
            layer.register_forward_hook(
                lambda *_: after.append(_activation_bytes(tracker.get_tracker_snapshot("current")))
            )
        with tracker:
            output = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            held = _activation_bytes(tracker.get_tracker_snapshot("current"))
            gradient = torch.empty_like(output)
            output.backward(gradient)
            inputs.grad = None
        peak = _activation_bytes(tracker.get_tracker_snapshot("peak"))
    own = settings.rows * settings.length * hidden * dtype.itemsize
    # The output and the gradient that is fed in belong to the head: it has them whatever the layers
    # do.
    return Trace(held - own, after[2] - after[1], peak - own)


def _layers(model: Any) -> Any:
    """The layers: the children of the module list that holds most."""
    from torch import nn

    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == TRACED_LAYERS
    ]
    return max(lists, key=lambda module: sum(1 for _ in module.modules()))


def loss_bytes(tokens: int, vocab_size: int, precision: Precision) -> int:
    """Peak of logits and loss: the logits in the training dtype; in fp32 the log-probabilities and
    two gradients of them.

    Follows ``model/loss.py``: cross entropy over all positions in fp32, and its backward pass.
    """
    return tokens * vocab_size * (configured_dtype(precision.value).itemsize + 12)


def estimate(shape: ModelShape, settings: TraceSettings, logits: int) -> ActivationBytes:
    """Without a trace: ``10 hidden + 5 intermediate`` a token and layer, fitted to a Llama
    layer.
    """
    tokens = settings.rows * settings.length
    size = configured_dtype(settings.precision.value).itemsize
    layer = (10 * shape.hidden_size + 5 * shape.intermediate_size) * size * tokens
    inputs = shape.hidden_size * size * tokens * shape.layers
    if settings.gradient_checkpointing:
        return ActivationBytes(saved=inputs, working=layer, logits=logits, origin="estimated")
    return ActivationBytes(
        saved=layer * shape.layers, working=layer // 2, logits=logits, origin="estimated"
    )


def _build(
    architecture: Any, tuner: TunerConfig, settings: TraceSettings, layers: int, dtype: Any
) -> Any:
    import torch
    from transformers import AutoModel

    config = copy.deepcopy(architecture)
    numbers = config.get_text_config()
    numbers.num_hidden_layers = layers
    # One entry a layer, where an architecture mixes kinds of attention.
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(numbers, name, None), list):
            setattr(numbers, name, getattr(numbers, name)[:layers])
    # A vocabulary that costs nothing: embeddings are not part of the trace.
    numbers.vocab_size, numbers.pad_token_id = 8, None
    kernel = (
        settings.attn_implementation
        if settings.masked or settings.attn_implementation == "eager"
        else _unmasked()
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation=kernel)
        kind = TUNERS.find(tuner.kind)
        mark_trained(kind, model)
        if kind.has_adapter:
            model = _with_adapters(model, tuner, dtype)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if settings.zero3:
        _keep_linear_inputs(model)
    return model


def _unmasked() -> str:
    """SDPA without a mask, and what flash attention keeps: on fake tensors transformers would make
    a mask in any case.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "llmtune_unmasked"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, lambda *_args, **_kwargs: None)
    return name


def _to_fake(model: Any) -> None:
    """Put fake tensors in the place of meta ones, on which MemTracker books nothing."""
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


def _with_adapters(model: Any, tuner: TunerConfig, dtype: Any) -> Any:
    """Freeze the model and put in what peft computes for a LoRA layer; importing peft takes longer
    than the trace.
    """
    from torch import nn

    class Adapted(nn.Module):
        """``base(x) + B(A(dropout(x))) * scale``."""

        def __init__(self, base: nn.Module, rank: int):
            super().__init__()
            inputs, outputs = matrix_sides(base)
            self.base = base
            self.dropout = nn.Dropout(tuner.lora_dropout) if tuner.lora_dropout else nn.Identity()
            self.down = nn.Linear(inputs, rank, bias=False, dtype=dtype)
            self.up = nn.Linear(rank, outputs, bias=False, dtype=dtype)

        def forward(self, inputs: Any) -> Any:
            """The adapted layer."""
            update = self.up(self.down(self.dropout(inputs)))
            # The scale's size takes no memory.
            return self.base(inputs) + update * 2.0

    model.requires_grad_(False)
    wanted = tuner.target_modules
    if wanted == "all-linear":
        layers = choose_layers(model, tuner).layers
    else:
        # The head, which may be among them, is not part of the trace.
        endings = tuple(f".{ending}" for ending in wanted)
        layers = {
            name: module
            for name, module in linear_layers(model).items()
            if f".{name}".endswith(endings)
        }
    for name, module in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapted(module, lora_rank(tuner, name)))
    return model


def _keep_linear_inputs(model: Any) -> None:
    """Make linear layers keep what DeepSpeed's ``LinearFunctionForZeroStage3`` keeps: input and
    weight.
    """
    import torch
    from torch import nn

    class KeepInput(torch.autograd.Function):
        """A frozen linear layer that holds on to its input."""

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
    """All that is neither a parameter nor a buffer nor given from outside."""
    (values,) = snapshot.values()
    names = {getattr(key, "value", str(key)): value for key, value in values.items()}
    return sum(value for name, value in names.items() if name in ("Activation", "Temp", "Gradient"))
