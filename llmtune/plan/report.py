"""Text about the ladder's choice: why it was made, and what to do where nothing fits."""

from llmtune.config.schema import Config
from llmtune.plan.advice import find_smallest_change
from llmtune.plan.ladder import Candidate, Ladder
from llmtune.plan.memory.model_shape import ModelShape
from llmtune.plan.memory.peak_memory import USABLE_SHARE
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_bytes, format_count


def describe_misfit(config: Config, ladder: Ladder) -> str:
    """Say what is missing on every rung, and the smallest change under which the job fits."""
    shape = ladder.shape
    tuner = TUNERS.find(config.tuner.kind).describe(config.tuner)
    lines = [
        (
            f"{config.model.name_or_path} does not fit: {format_count(shape.parameters)}"
            f" parameters, {tuner} ({format_count(shape.trainable_parameters)} trainable),"
            f" {counted(ladder.world_size, 'rank')}, {config.precision.value}, rows of"
            f" {config.data.max_seq_length} tokens"
        ),
        (
            f"  has            {ladder.hardware.describe()}, of which {USABLE_SHARE:.0%} may be"
            " planned"
        ),
    ]
    lines += [f"  {rung.name:<14} {rung.reason}" for rung in ladder.rungs]
    lines.append(f"Try: {find_smallest_change(config, ladder)}")
    return "\n".join(lines)


def describe_choice(config: Config, ladder: Ladder, candidate: Candidate) -> list[str]:
    """Say where placement, micro-batch size and checkpointing came from, one line each."""
    notes = []
    if config.zero.stage == "auto" or config.offload.optimizer.value == "auto":
        notes.append(f"placement: {_describe_placement(config, ladder, candidate)}")
    if config.train.gradient_checkpointing == "auto":
        state = "on" if candidate.gradient_checkpointing else "off"
        saved = format_bytes(candidate.memory.device.activations)
        notes.append(
            f"gradient checkpointing: {state} (activations of a micro-batch: {saved} per rank)"
        )
    notes += _describe_adapters(config, ladder.shape)
    if ladder.activations_origin != "traced":
        notes.append("activations: a rough estimate, because this architecture could not be traced")
    return notes


def _describe_placement(config: Config, ladder: Ladder, candidate: Candidate) -> str:
    rung, stage = candidate.placement.rung, candidate.placement.zero_stage
    if candidate is not ladder.chosen:
        return f"{rung}, ZeRO {stage} (further down the ladder, because memory ran out)"
    if config.offload.optimizer.value != "auto":
        return f"{rung} as set, with ZeRO {stage}"
    fitting = sum(1 for other in ladder.rungs if other.candidate and other.candidate.fits)
    if fitting < 2:
        return f"{rung}, ZeRO {stage} (the only one that fits)"
    return f"{rung}, ZeRO {stage} (the fastest of {fitting} that fit)"


def _describe_adapters(config: Config, shape: ModelShape) -> list[str]:
    """Say what ``all-linear`` reaches, where that is not every linear layer."""
    if config.tuner.target_modules != "all-linear" or not shape.adapted:
        return []
    if not shape.stacked_parameters and not shape.left_alone:
        return []
    text = f"tuner.target_modules=all-linear: adapters on {', '.join(shape.adapted)}"
    if shape.left_alone:
        text += f"; none on {', '.join(shape.left_alone)}"
    if shape.stacked_parameters:
        share = shape.stacked_parameters / shape.parameters
        text += (
            "; none on the router and the experts, whose stacked tensors are no linear layers"
            f" ({share:.0%} of the model)"
        )
    return [text]
