"""Build the hooks of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtune.data.prepared_data import read_samples
from llmtune.model.compiled_layers import find_layers
from llmtune.plan.abilities import compiles_layers
from llmtune.task.task import find_task
from llmtune.train.hooks.compile_report import CompileReport
from llmtune.train.hooks.confusion_plot import ConfusionPlot
from llmtune.train.hooks.data_examples import DataExamples
from llmtune.train.hooks.loss_plot import LossPlot
from llmtune.train.hooks.samples import SampleAnswers, samples_reason_to_skip
from llmtune.train.hooks.time_table import TimeTable

if TYPE_CHECKING:
    from llmtune.engine.distributed import Rank
    from llmtune.engine.train_module import TrainModule
    from llmtune.track.console import Console
    from llmtune.train.loop import Hook
    from llmtune.train.request import RunRequest


def build_hooks(
    request: RunRequest, rank: Rank, console: Console, module: TrainModule, tokenizer: Any
) -> list[Hook]:
    """Build the hooks of this run, in the order in which they show what they have."""
    config, plan = request.config, request.plan
    hooks: list[Hook] = [
        LossPlot(request.run_folder, request.run_name, rank),
        ConfusionPlot(request.run_folder, rank),
    ]
    if config.report.write and not config.data.streaming:
        examples = DataExamples(
            run=request.run_folder,
            rank=rank,
            data=request.data,
            tokenizer=tokenizer,
            say=console.say,
        )
        hooks.append(examples)
    if find_task(config.model.task).generates:
        prompts = read_samples(request.data)
        reason = samples_reason_to_skip(
            config.train.sample_answers,
            plan.shape.parameters,
            plan.placement.zero_stage == 3,
            len(prompts),
        )
        if reason is not None:
            console.say(f"no sample answers: {reason}")
        else:
            samples = SampleAnswers(
                module=module,
                tokenizer=tokenizer,
                prompts=prompts,
                run=request.run_folder,
                console=console,
            )
            hooks.append(samples)
    if compiles_layers(config.train, plan.placement.zero_stage):
        hooks.append(CompileReport(len(find_layers(module.model)), rank, console))
    # Behind the others, whose time it counts.
    return [*hooks, TimeTable(request.run_folder, rank, plan, console)]
