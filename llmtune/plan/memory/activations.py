"""Measure activations by running a few layers on fake tensors, and scaling by the layers.

``FakeTensorMode`` runs every operation without memory or arithmetic; ``MemTracker`` records what
would be allocated. Parameters' gradients are dropped as soon as they are made, because they are
counted with ZeRO's states.
"""

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

#: The first layer's input is not an intermediate result; from the second layer on each adds the
#: same.
TRACED_LAYERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBytes:
    """Bytes of one micro-batch on one rank."""

    saved: int
    """Held from the forward pass to the backward pass, over all layers."""
    working: int
    """Peak of one layer's backward pass, recomputed or not, beyond ``saved``."""
    logits: int
    """Peak of head and loss beyond ``saved``, forward and backward."""
    origin: str = "traced"
    """``traced``, or ``estimated`` if the architecture could not be run on fake tensors."""


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
    """Documents share a row: attention keeps a mask, and keys and values repeated per head."""


#: Traces of this process, because advice plans the same model many times.
_TRACES: dict[str, dict[TraceSettings, ActivationBytes]] = {}


class ActivationModel:
    """Traces one model and tuner on demand, and caches the results."""

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
        """Return the bytes of a micro-batch; one row is traced, because rows scale."""
        tuner = TUNERS.find(self.tuner.kind)
        # What is trained keeps its input in any case.
        adapts_all = tuner.has_adapter and self.tuner.target_modules == "all-linear"
        one = TraceSettings(
            rows=1,
            length=settings.length,
            gradient_checkpointing=settings.gradient_checkpointing,
            attn_implementation=settings.attn_implementation,
            precision=settings.precision,
            zero3=settings.zero3 and not tuner.trains_all and not adapts_all,
            masked=settings.masked and settings.attn_implementation in ("sdpa", "eager"),
        )
        if one not in self._done:
            self._done[one] = self._measure(one)
        of_row, rows = self._done[one], settings.rows
        return ActivationBytes(
            saved=of_row.saved * rows,
            working=of_row.working * rows,
            logits=of_row.logits * rows,
            origin=of_row.origin,
        )

    def _measure(self, settings: TraceSettings) -> ActivationBytes:
        # The key has the shape too, because a local folder may come to hold another model.
        key = repr((self.model, self.tuner, settings, self.shape))
        stored = read_cached(self.cache_dir, "traces", key)
        if stored is not None:
            return ActivationBytes(
                saved=stored["saved"], working=stored["working"], logits=stored["logits"]
            )
        traced = self._trace(settings)
        if traced.origin == "traced":
            values = {"saved": traced.saved, "working": traced.working, "logits": traced.logits}
            write_cached(self.cache_dir, "traces", key, values)
        return traced

    def _trace(self, settings: TraceSettings) -> ActivationBytes:
        logits = loss_bytes(settings.length, self.shape.vocab_size, settings.precision)
        if self._architecture is None:
            self._architecture = load_architecture(self.model)
        try:
            trace = trace_layers(self._architecture, self.tuner, settings)
        except Exception as error:
            # Some architectures do what fake tensors do not support.
            logging.getLogger(__name__).info(
                "activations estimated, because the trace failed: %s", error
            )
            return estimate(self.shape, settings, logits)
        saved = trace.held + trace.layer * (self.shape.layers - TRACED_LAYERS)
        return ActivationBytes(saved=saved, working=max(0, trace.peak - trace.held), logits=logits)


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes that a run of :data:`TRACED_LAYERS` layers allocated."""

    held: int
    """At the end of the forward pass."""
    layer: int
    """The share of one layer."""
    peak: int
    """At the peak of forward and backward pass."""


def trace_layers(architecture: Any, tuner: TunerConfig, settings: TraceSettings) -> Trace:
    """Run the forward and the backward pass of a model of few layers on fake tensors.

    The inputs are hidden states, so that embeddings are left out; :func:`loss_bytes` counts the
    head.
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
    model = _build(architecture, tuner, settings, TRACED_LAYERS, dtype)
    after: list[int] = []
    with hold_interruptions(), FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(model)
        hidden = architecture.get_text_config().hidden_size
        inputs = torch.empty(
            settings.rows, settings.length, hidden, dtype=dtype, requires_grad=True
        )

        # One forward and one backward pass, with a snapshot after each layer.
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
    # The output and its gradient are counted with the head, which has them whatever the layers do.
    return Trace(held - own, after[2] - after[1], peak - own)


def _layers(model: Any) -> Any:
    """The module list of the layers: the one that holds most modules."""
    from torch import nn

    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == TRACED_LAYERS
    ]
    return max(lists, key=lambda module: sum(1 for _ in module.modules()))


def loss_bytes(tokens: int, vocab_size: int, precision: Precision) -> int:
    """Return the peak bytes of logits and loss.

    These are the logits in the training dtype, and in fp32 the log-probabilities and two gradients
    of them. Follows ``model/loss.py``: cross entropy over all positions in fp32, and its backward
    pass.
    """
    return tokens * vocab_size * (configured_dtype(precision.value).itemsize + 12)


def estimate(shape: ModelShape, settings: TraceSettings, logits: int) -> ActivationBytes:
    """Estimate without a trace: ``10 hidden + 5 intermediate`` elements per token and layer.

    The factors were fitted to a Llama layer.
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
    text = config.get_text_config()
    text.num_hidden_layers = layers
    # One entry per layer, where an architecture mixes kinds of attention.
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[:layers])
    # A small vocabulary, because embeddings are not part of the trace.
    text.vocab_size, text.pad_token_id = 8, None
    kernel = settings.attn_implementation
    if kernel != "eager" and not settings.masked:
        kernel = _unmasked()
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


def _with_adapters(model: Any, tuner: TunerConfig, dtype: Any) -> Any:
    """Freeze the model, and add LoRA layers that compute what peft's do.

    Importing peft would take longer than the trace.
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
            """Compute the adapted layer."""
            update = self.up(self.down(self.dropout(inputs)))
            # The value of the scale does not matter for memory.
            return self.base(inputs) + update * 2.0

    model.requires_grad_(False)
    targets = tuner.target_modules
    if targets == "all-linear":
        layers = choose_layers(model, tuner).layers
    else:
        # The head, which may be among them, is not part of the trace.
        endings = tuple(f".{ending}" for ending in targets)
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
