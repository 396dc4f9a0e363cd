"""Build every object of a run, in the order of their dependencies, and run the training loop."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmtune.checkpoint.mirror import Mirror
from llmtune.checkpoint.resume_best import resume_best
from llmtune.checkpoint.retention import Retention, list_checkpoints
from llmtune.checkpoint.save import load_checkpoint
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.checkpoint.weight_files import WeightFiles
from llmtune.config.best_model import BestModel, resolve_best_model
from llmtune.config.cache_folder import find_cache
from llmtune.config.schema import Precision
from llmtune.config.stored import to_plain
from llmtune.cpu_products import multiply_in_fp32
from llmtune.data.prepared_data import open_rows
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.engine.distributed import Rank, gather_rows
from llmtune.engine.head_exchange import exchanging_heads
from llmtune.engine.neftune import add_noise
from llmtune.engine.partitions import gather_for_readers
from llmtune.engine.train_module import TrainModule, zero_init
from llmtune.errors import StoppedError
from llmtune.model.build import WeightsTo, build_model, recompute_layers
from llmtune.model.compiled_layers import compile_layers
from llmtune.model.nf4.nf4_model import In4Bits
from llmtune.model.tokenizer import load_tokenizer
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.plan.abilities import compiles_layers
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.param_groups import groups_of_model
from llmtune.plan.steps import evaluation_interval, save_interval
from llmtune.report.refresh import ReportRefresher, write_report_now
from llmtune.storage import layout
from llmtune.storage.signature import read_signer
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.task.objective import Objective
from llmtune.task.task import find_task
from llmtune.track.console import Console, ProgressLine
from llmtune.track.hints import Hints, make_reader
from llmtune.track.metrics import MetricsFile
from llmtune.track.plan_check import PlanCheck
from llmtune.track.service import TrackedRun, open_services
from llmtune.track.tracker import Outcome, Tracker, Trackers
from llmtune.track.utilization import find_utilization
from llmtune.train.adapters.attach import attach_tuner
from llmtune.train.builders.batches import build_collator, build_loader
from llmtune.train.checkpointing import CheckpointSaver, SaveSettings
from llmtune.train.divergence import DivergenceMonitor
from llmtune.train.hooks.build_hooks import build_hooks
from llmtune.train.hooks.evaluation import Evaluator
from llmtune.train.hooks.gradient_check import GradientCheck
from llmtune.train.hooks.kernel_check import use_kernels
from llmtune.train.hooks.packing_probe import check_module
from llmtune.train.hooks.rank_seconds import RankSeconds
from llmtune.train.hooks.step_profile import StepProfile
from llmtune.train.line_sums import LineSums
from llmtune.train.loop import Job, run
from llmtune.train.model_files import render_model_files, resolve_weight_files
from llmtune.train.request import RunRequest
from llmtune.train.run_folder import describe_environment, fingerprint
from llmtune.train.stop_request import Stop
from llmtune.train.training_state import TrainingState
from llmtune.tuner.head import Head
from llmtune.tuner.tuner import TUNERS

#: Longest wait at the end for copies to ``checkpoint.mirror``; shorter after a stop, because the
#: user or the scheduler is waiting.
MIRROR_SECONDS = 3600.0
MIRROR_SECONDS_AFTER_STOP = 20.0


def run_job(request: RunRequest, rank: Rank, console: Console) -> None:
    """Build the job, train, and publish the result. Called on every rank.

    Raises:
        StoppedError: A stop was requested; the state was saved.
    """
    stop = Stop(rank, request.run_folder)
    with exchanging_heads(rank, request.plan.batch.sequence_parallel_size):
        _run_job(request, rank, console, stop)


def _run_job(request: RunRequest, rank: Rank, console: Console, stop: Stop) -> None:
    try:
        job = build_job(request, rank, console, stop)
        # Thousands of modules with their hooks live until the end. Each collection would look
        # through them, which takes a tenth of a second.
        gc.collect()
        gc.freeze()
        outcome = Outcome.failed
        try:
            run(job)
            rank.phases.enter("finish")
            job.saver.close(MIRROR_SECONDS)
            outcome = Outcome.finished
        except StoppedError:
            outcome = Outcome.stopped
            rank.phases.enter("finish")
            job.saver.close(MIRROR_SECONDS_AFTER_STOP)
            raise
        finally:
            job.trackers.finish(outcome, rank.phases.beat, lambda: stop.is_signaled)
    except Exception:
        # Record the memory in use now, in case it has run out.
        rank.phases.beat()
        raise


def build_job(request: RunRequest, rank: Rank, console: Console, stop: Stop) -> Job:
    """Build all parts of a run."""
    config, plan = request.config, request.plan
    template = load_chat_template(config.data.chat_template)
    tokenizer = load_tokenizer(request.model_folder, config.model, template)
    module = build_module(request, rank)
    best = resolve_best_model(config)
    stored = request.resume_from
    state = None if stored is None else load_checkpoint(module, stored)
    start = resume_at(state, best, request.run_folder) if state else TrainingState()

    collator = build_collator(request, rank, module.model, tokenizer)
    dtype, vocabulary = configured_dtype(config.precision.value), plan.shape.vocab_size
    use_kernels(module, config.model, vocabulary, dtype, collator.masked, console.say)
    if config.data.packing or collator.flat:
        name, packed = config.model.name_or_path, config.data.packing
        check_module(module, collator, vocabulary, dtype, name, packed)
    evaluator = Evaluator(
        module=module,
        rows=open_rows(request.data, "eval") if request.evaluates else None,
        batch_size=request.eval_batch_size,
        collator=collator,
        max_rows=request.eval_max_rows,
        task=find_task(config.model.task),
        labels=request.labels,
        run=request.run_folder,
    )
    loader = build_loader(request, rank, tokenizer, collator)
    profile = StepProfile(config.profile, request, rank, console)
    return Job(
        rank=rank,
        module=module,
        loader=loader,
        steps=request.steps,
        batches=BatchSchedule.from_config(config.train, plan.batch.global_batch_size),
        train=config.train,
        learning_rate=plan.learning_rate,
        schedule=config.schedule,
        seed=config.seed,
        evaluations=evaluation_interval(config.train, request.steps),
        saves=save_interval(config.train, request.steps),
        best=best,
        evaluator=evaluator,
        saver=build_saver(request, module, tokenizer, state, console),
        divergence=DivergenceMonitor(
            module=module,
            loader=loader,
            on_nan=config.train.on_nan,
            run=request.run_folder,
            say=console.say,
        ),
        trackers=build_trackers(request, rank, console, start.step),
        hooks=[profile, *build_hooks(request, rank, console, module, tokenizer)],
        trace_step=profile.step,
        stop=stop,
        start=start,
        ranks=RankSeconds(rank),
        utilization=find_utilization(plan, request.row_length, config.precision),
        gradients=GradientCheck(module, console.say),
    )


def resume_at(state: TrainerState, best: BestModel | None, run: Path) -> TrainingState:
    """Return the loop's state at a checkpoint.

    Args:
        run: The run folder, whose checkpoints count where the best is chosen by a new rule.
    """
    return TrainingState(
        step=state.step,
        tokens=state.tokens,
        skipped=state.skipped,
        data_position=state.data_position,
        evaluation_due=state.evaluation_due,
        best=resume_best(best, state, list_checkpoints(run)),
        line=LineSums.from_dict(state.line),
    )


def build_saver(
    request: RunRequest,
    module: TrainModule,
    tokenizer: Any,
    state: TrainerState | None,
    console: Console,
) -> CheckpointSaver:
    """Build what saves checkpoints: their content, which are kept, and where they are copied to.

    Args:
        state: The trainer's state in ``request.resume_from``.
    """
    run, checkpoint = request.run_folder, request.config.checkpoint
    checkpoint_shards = request.config.export.max_shard_bytes
    weights = resolve_weight_files(request.config.tuner.kind, module.model, checkpoint_shards)

    # Rank 0 alone writes the small files, and copies checkpoints to the mirror.
    model_files: dict[str, bytes] = {}
    mirror: Mirror | None = None
    if module.rank.is_first:
        model_files = {
            **render_model_files(module.model, tokenizer, weights, run),
            **weights.index(module),
        }
        if checkpoint.mirror is not None:
            mirror = Mirror(checkpoint.mirror, request.run_name, console.say, request.run_id)
    start = None
    if request.resume_from is not None and state is not None:
        start = (request.resume_from, state)
    return CheckpointSaver(
        module=module,
        settings=build_save_settings(request, module.rank, weights),
        model_files=model_files,
        start=start,
        say=console.say,
        mirror=mirror,
    )


def build_save_settings(request: RunRequest, rank: Rank, weights: WeightFiles) -> SaveSettings:
    """Collect what decides when checkpoints are saved, and what their manifests say."""
    config, plan, run = request.config, request.plan, request.run_folder
    checkpoint, best = config.checkpoint, resolve_best_model(config)
    planned_host_bytes = plan.memory.host.total
    if plan.hardware.accelerator == "cpu":
        planned_host_bytes += plan.memory.device.total
    return SaveSettings(
        run=run,
        weights=weights,
        retention=Retention(
            limit=config.train.save_total_limit,
            every=checkpoint.keep_every,
            best=best,
        ),
        saves=save_interval(config.train, request.steps),
        evaluations=evaluation_interval(config.train, request.steps),
        background=checkpoint.background,
        on_disk_low=checkpoint.on_disk_low,
        best=best,
        data_fingerprint=request.data.fingerprint,
        planned_host_bytes=planned_host_bytes,
        about={
            "run_name": request.run_name,
            "config_fingerprint": fingerprint(config),
            "data_fingerprint": request.data.fingerprint,
            "world_size": rank.world_size,
            "zero_stage": plan.placement.zero_stage,
            "placement": plan.placement.rung,
            "versions": describe_environment(),
        },
        signer=read_signer(checkpoint.sign) if rank.is_first else None,
    )


def build_module(request: RunRequest, rank: Rank) -> TrainModule:
    """Build the model with its adapters, and DeepSpeed's engine around it.

    The weights are those of the base, or of the checkpoint that is resumed.
    """
    rank.phases.enter("load")
    config, plan = request.config, request.plan
    if rank.device.type == "cpu" and config.precision is not Precision.fp32:
        multiply_in_fp32()
    tuner = TUNERS.find(config.tuner.kind)

    # Weights go to slices under ZeRO 3, else straight to the GPU or to the host.
    weights = WeightsTo(rank=rank.rank)
    if plan.placement.zero_stage == 3:
        weights = replace(weights, partitioned=lambda: zero_init(plan.deepspeed))
    elif rank.device.type != "cpu" and not tuner.has_adapter:
        # Adapters are drawn on the host, so that every rung begins with the same ones.
        weights = replace(weights, device_map={"": str(rank.device)})
    if tuner.is_quantized:
        double_quant = config.tuner.bnb_4bit_use_double_quant
        in_4_bits = In4Bits(double_quant, rank.device, partial(gather_rows, rank=rank))
        weights = replace(weights, in_4_bits=in_4_bits)

    # A full fine-tuning resumes from the weights of the checkpoint, an adapter from its base.
    folder = request.model_folder
    if request.resume_from is not None and not tuner.has_adapter:
        folder = request.resume_from
    kernel = plan.attn_implementation
    model = build_model(folder, config.model, config.precision, kernel, weights)
    task = find_task(config.model.task)
    head = Head(modules=tuple(task.head_modules(model)), peft_type=task.peft_type)
    model = attach_tuner(model, request, rank, head)
    recompute_layers(model, plan.recomputed)
    if (alpha := config.train.neftune_noise_alpha) is not None:
        add_noise(model, alpha)
    if compiles_layers(config.train, plan.placement.zero_stage):
        compile_layers(model)
    smoothing = config.train.label_smoothing
    module = TrainModule(
        model,
        plan.deepspeed,
        rank,
        Objective.of_model(model, task, request.labels, smoothing),
        optimizer=find_optimizer(config.optim),
        group_of=groups_of_model(config.optim, config.tuner, model, head.modules),
        seed=config.seed,
    )
    gather_for_readers(tuner.find_read_elsewhere(model))
    return module


def build_trackers(request: RunRequest, rank: Rank, console: Console, first_step: int) -> Trackers:
    """Build what receives the records: on rank 0 a file, the console and the chosen services."""
    if not rank.is_first:
        return Trackers([])
    cache, writes_report = find_cache(request.config.paths), request.config.report.write
    run = TrackedRun(
        config=request.config.tracker,
        folder=request.run_folder,
        name=request.run_name,
        settings=to_plain(request.config),
        plan=request.plan.to_dict(),
        first_step=first_step,
        say=console.say,
        write_report=partial(write_report_now, request.run_folder, cache)
        if writes_report
        else lambda: None,
    )
    metrics = MetricsFile(request.run_folder / layout.METRICS)
    progress = ProgressLine(console, request.steps.total_steps)
    hints = Hints(console.say, make_reader(request.plan.hardware.accelerator).read)
    check = PlanCheck(request.plan, request.config.precision, cache, console.say)
    trackers: list[Tracker] = [metrics, progress, check, hints, *open_services(run)]
    if writes_report:
        trackers.append(ReportRefresher(request.run_folder, cache, console.say))
    return Trackers(trackers, console.say)
