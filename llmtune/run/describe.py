"""Describe a run on the page before step 1: the derived numbers and where they come from."""

from dataclasses import asdict

from llmtune.config.best_model import resolve_best_model
from llmtune.config.groups.data import name_data
from llmtune.config.schema import Config
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.length.duration import predict_duration
from llmtune.plan.plan import Plan
from llmtune.plan.prepared_data import PreparedData
from llmtune.plan.steps import evaluation_interval, save_interval
from llmtune.run.adapter import describe_adapter
from llmtune.train.request import RunRequest
from llmtune.train.schedule import SCHEDULES
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_bytes, format_count


def describe(request: RunRequest) -> dict[str, str]:
    """Return the rows of the page: a title and its text each."""
    config, plan, data, steps = request.config, request.plan, request.data, request.steps
    shape = plan.shape
    tuner = TUNERS.find(config.tuner.kind).describe(config.tuner)
    optimizer = find_optimizer(config.optim)
    rows = {
        "model": f"{config.model.name_or_path} from {request.model_folder}",
        "parameters": (
            f"{format_count(shape.parameters)}, of which {tuner} trains "
            f"{format_count(shape.trainable_parameters)}"
        ),
        "data": describe_data(config, data),
        "hardware": plan.hardware.describe(),
        "batch": describe_batch(request),
        "steps": f"{steps.total_steps}, {steps.warmup_steps} of them warm-up ({steps.origin})",
        "planned time": describe_time(request),
        "evaluations": describe_evaluations(request),
        "checkpoints": describe_checkpoints(request),
        "learning rate": describe_rate(request),
        "optimizer": optimizer.describe(asdict(config.optim)),
        "precision": f"{config.precision.value}; {optimizer.describe_storage()}",
        "placement": plan.placement.describe(),
        "memory": describe_memory(plan),
        "derived": "; ".join(plan.notes),
        "run folder": str(request.run_folder),
    }
    if config.tuner.adapter_path is not None:
        rows["adapter"] = describe_adapter(config.tuner)
    if request.resume_from:
        rows["resuming"] = str(request.resume_from)
    return rows


def describe_time(request: RunRequest) -> str:
    """Describe how long the steps take, as planned."""
    plan, steps = request.plan, request.steps
    schedule = BatchSchedule.from_config(request.config.train, plan.batch.global_batch_size)
    sizes = schedule.steps_by_rows(steps.total_steps, request.row_length)
    rows = sum(size * count for size, count in sizes)
    time = predict_duration(
        plan.tokens_per_second,
        plan.world_size,
        request.config.hardware.gpu_hour_price,
        steps.total_steps,
        rows * request.row_length / steps.total_steps,
    )
    return time.describe(plan.hardware.accelerator)


def describe_batch(request: RunRequest) -> str:
    """Describe the rows per step, and how they grow."""
    batch, steps = request.plan.batch, request.steps
    schedule = BatchSchedule.from_config(request.config.train, batch.global_batch_size)
    text = batch.describe()
    for start, rows in schedule.entries[1:]:
        text += f"; {batch.resized(rows).describe()} after {schedule.describe_start(start)}"
        if not schedule.counts_tokens and start >= steps.total_steps:
            text += " (not reached)"
    return text


def describe_rate(request: RunRequest) -> str:
    """Describe the peak learning rate and its schedule."""
    config = request.config
    shape = SCHEDULES.find(config.schedule.lr_scheduler_type).describe(config.schedule)
    text = f"{request.plan.learning_rate:g}, {shape}"
    schedule = BatchSchedule.from_config(config.train, request.plan.batch.global_batch_size)
    factor = schedule.rate_factor(schedule.largest)
    if factor == 1:
        return text
    return (
        f"{text}; times {factor:g} at {schedule.largest} rows per step ({schedule.scaling.value})"
    )


def describe_evaluations(request: RunRequest) -> str:
    """Describe how often the run evaluates, and when it ends early."""
    train, best = request.config.train, resolve_best_model(request.config)
    if not request.evaluates:
        return "none"
    interval = evaluation_interval(train, request.steps)
    text = f"{interval.describe()}, at step 0 and at the end"
    if best is not None and best.patience is not None:
        text += (
            f"; the run ends after {counted(best.patience, 'evaluation')} in a row in which"
            f" {best.metric} does not improve"
        )
        if best.threshold:
            text += f" by more than {best.threshold:g}"
    return text


def describe_checkpoints(request: RunRequest) -> str:
    """Describe how often checkpoints are saved, which are kept, and which one is published."""
    train, best = request.config.train, resolve_best_model(request.config)
    text = save_interval(train, request.steps).describe()
    if best is not None and best.is_saved:
        text += f", at each new best {best.metric}"
    text += ", and at the end"
    limit = train.save_total_limit
    text += "; all are kept" if limit is None else f"; kept: the newest {limit}"
    if limit is not None and best is not None and best.is_saved:
        text += " and the best"
    if best is not None and best.load_at_end:
        text += "; the best is published"
    return text


def describe_data(config: Config, data: PreparedData) -> str:
    """Describe rows and tokens, what was left out, and what is held out."""
    train, held_out = data.train, data.eval
    if config.data.streaming:
        text = f"streamed from {name_data(config.data.train)}"
    else:
        rows = f"{name_data(config.data.train)}: {train.rows} rows"
        if train.packing_efficiency is not None:
            rows += f" of {train.documents} packed (filled to {train.packing_efficiency:.1%})"
        text = (
            f"{rows}, {format_count(train.tokens)} tokens, {format_count(train.supervised_tokens)}"
            " trained"
        )
    counts = {
        "dropped as over-long": train.dropped,
        "truncated": train.truncated,
        "skipped": train.skipped,
    }
    counts["left out because a held-out row is the same"] = train.duplicates_of_eval
    text += "".join(f", {count} {what}" for what, count in counts.items() if count)
    if held_out is None:
        return f"{text}; held out: none"
    origin = f" of {name_data(config.data.eval)}" if config.data.eval is not None else ""
    return f"{text}; held out: {held_out.rows} rows{origin}" + (
        f", {held_out.dropped} dropped" if held_out.dropped else ""
    )


def describe_memory(plan: Plan) -> str:
    """Describe the planned peak memory per rank."""
    memory = plan.memory
    if plan.hardware.accelerator == "cpu":
        text = f"about {format_bytes(memory.device.total + memory.host.total)} per rank at its peak"
    else:
        host = format_bytes(memory.host.total)
        text = (
            f"about {format_bytes(memory.device.total)} per GPU at its peak, {host} of host memory"
            " per rank"
        )
    if memory.nvme:
        text += (
            f", {format_bytes(memory.nvme)} on NVMe, {format_bytes(memory.nvme_written_per_step)}"
            " written per step"
        )
    return text
