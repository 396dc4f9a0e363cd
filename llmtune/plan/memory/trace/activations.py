"""Measure activations by running a few layers on fake tensors, and scaling by the layers.

:mod:`llmtune.plan.memory.trace.fake_run` runs them.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.architecture.meta_model import set_outputs
from llmtune.plan.memory.rank_bytes import ActivationBytes, LayerBytes
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.trace.fake_run import TRACED_LAYERS, TraceSettings, trace_layers
from llmtune.plan.memory.trace.loss_bytes import converted_bytes, head_loss_bytes, loss_bytes
from llmtune.plan.memory.trace_cache import read_cached, write_cached
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.task.task import Task, find_task
from llmtune.tuner.tuner import TUNERS
from llmtune.varlen_attention import SHORT_DOCUMENT, VARLEN

#: Traces of this process, because advice plans the same model many times.
_TRACES: dict[str, dict[TraceSettings, LayerBytes]] = {}


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
        """Return the bytes of a micro-batch; one row is traced, because rows scale.

        A second row is traced too where rows share something: encoders have a mask, or DeBERTa's
        relative positions, and adapters on stacked experts make a sum once for all rows.
        """
        tuner = TUNERS.find(self.tuner.kind)
        traced = _as_short_documents(settings)
        # What is trained keeps its input in any case.
        adapts_all = tuner.has_adapter and self.tuner.target_modules == "all-linear"
        one = replace(
            traced,
            rows=1,
            zero3=settings.zero3 and not tuner.trains_all and not adapts_all,
            after_frozen=0 < self.shape.frozen_layers < self.shape.layers,
            masked=traced.masked and traced.attn_implementation in ("sdpa", "eager"),
        )
        first = further = self._remembered(one)
        if settings.bidirectional or self.tuner.target_parameters:
            two = self._remembered(replace(one, rows=2))
            further = LayerBytes(saved=two.saved - first.saved, working=two.working - first.working)
        more = traced.rows - 1
        converted = converted_bytes(
            settings.rows * settings.length, self.shape, settings.precision, settings.accelerator
        )
        return ActivationBytes(
            saved=first.saved + more * further.saved,
            working=first.working + more * further.working + converted,
            logits=self._loss_bytes(settings),
            origin=first.origin,
        )

    def of_layers(self, settings: TraceSettings, recomputed: RecomputedLayers) -> ActivationBytes:
        """Return the bytes of a micro-batch of which some layers are computed again.

        The ends are traced, all layers and none. Between them every layer that is computed again
        keeps its input in the place of all that it saves, so that ``saved`` is on a line. The
        layers that keep everything are the last ones, and are freed before one is computed again.

        Args:
            settings: Their ``gradient_checkpointing`` is not read.
        """
        of_all = replace(settings, gradient_checkpointing=True)
        if recomputed.count and not recomputed.is_partial:
            return self(of_all)
        none = self(replace(settings, gradient_checkpointing=False))
        if recomputed.count == 0:
            return none
        all_layers = self(of_all)
        spared = recomputed.share * (none.saved - all_layers.saved)
        saved = none.saved - round(spared)
        freed = saved - all_layers.saved
        return replace(
            none, saved=saved, working=max(none.working, all_layers.working - max(0, freed))
        )

    def _loss_bytes(self, settings: TraceSettings) -> int:
        """Return the peak bytes of outputs and loss of a micro-batch."""
        shape, precision = self.shape, settings.precision
        judged = settings.rows if shape.judges_rows else settings.rows * settings.length
        if shape.loss_in_head:
            return head_loss_bytes(judged, shape, precision, settings.accelerator)
        return loss_bytes(judged, shape.outputs, precision)

    def _remembered(self, settings: TraceSettings) -> LayerBytes:
        if settings not in self._done:
            self._done[settings] = self._measure(settings)
        return self._done[settings]

    def _measure(self, settings: TraceSettings) -> LayerBytes:
        # The key has the shape too, because a local folder may come to hold another model.
        key = repr((self.model, self.tuner, settings, self.shape))
        stored = read_cached(self.cache_dir, "traces", key)
        if stored is not None:
            return LayerBytes(saved=stored["saved"], working=stored["working"])
        traced = self._trace(settings)
        if traced.origin == "traced":
            values = {"saved": traced.saved, "working": traced.working}
            write_cached(self.cache_dir, "traces", key, values)
        return traced

    def _trace(self, settings: TraceSettings) -> LayerBytes:
        shape, task = self.shape, self._task()
        if self._architecture is None:
            self._architecture = load_architecture(self.model)
            set_outputs(self._architecture, find_task(self.model.task).default_labels.names)
        trained = [tensor.name for tensor in shape.tensors if tensor.trained]
        try:
            trace = trace_layers(self._architecture, self.tuner, settings, trained, task)
        except Exception as error:
            # Some architectures do what fake tensors do not support.
            logging.getLogger(__name__).info(
                "activations estimated, because the trace failed: %s", error
            )
            return estimate(shape, settings)
        # Layers before everything that is trained keep nothing.
        saved = max(0, trace.held + trace.layer * (shape.reached_layers - TRACED_LAYERS))
        return LayerBytes(saved=saved, working=max(0, trace.peak - trace.held))

    def _task(self) -> Task | None:
        """The task whose head is traced; the head of a language model is counted by its loss."""
        task = find_task(self.model.task)
        return task if self.shape.trainable and task.default_labels.names else None


def _as_short_documents(settings: TraceSettings) -> TraceSettings:
    """Describe rows of a CPU's kernel as the documents of which it keeps most.

    It keeps the products of two tokens of a document, unless that is long
    (:mod:`llmtune.varlen_attention`).
    """
    if settings.accelerator != "cpu" or settings.attn_implementation != VARLEN:
        return settings
    length = min(settings.length, SHORT_DOCUMENT)
    rows = settings.rows * math.ceil(settings.length / length)
    return replace(settings, rows=rows, length=length, attn_implementation="eager", masked=False)


def estimate(shape: ModelShape, settings: TraceSettings) -> LayerBytes:
    """Estimate without a trace: ``10 hidden + 5 intermediate`` elements per token and layer.

    The factors were fitted to a Llama layer.
    """
    tokens = settings.rows * settings.length
    size = configured_dtype(settings.precision.value).itemsize
    layer = (10 * shape.hidden_size + 5 * shape.intermediate_size) * size * tokens
    inputs = shape.hidden_size * size * tokens * shape.layers
    # Experts with adapters: a layer's adapted weights, and their gradient, whatever the tokens.
    stacks = shape.adapted_stacks * size
    of_layer = stacks // shape.layers
    if settings.gradient_checkpointing:
        working = layer + 2 * of_layer
        return LayerBytes(saved=inputs, working=working, origin="estimated")
    return LayerBytes(
        saved=layer * shape.layers + stacks, working=layer // 2 + of_layer, origin="estimated"
    )
