"""Record answers to held-out prompts before and after training, for people to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.data.prepared_data import SamplePrompt
from llmtune.engine.train_module import TrainModule
from llmtune.model.generate import generate
from llmtune.security.redaction import redact_values
from llmtune.storage import layout
from llmtune.storage.atomic import read_json, write_atomically
from llmtune.track.console import Console
from llmtune.train.training_state import TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 48

#: Above this, generating with gathered or offloaded weights takes minutes, because every token
#: moves all weights.
LARGE_MODEL_PARAMETERS = 1_000_000_000


class SampleAnswers:
    """Answer three prompts before and after training, and show the answers side by side."""

    def __init__(
        self,
        module: TrainModule,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[SamplePrompt],
        run: Path,
        console: Console,
    ):
        self.module = module
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.path = run / layout.SAMPLES
        self.console = console

    def on_start(self, progress: TrainingState) -> None:
        """Answer before the first step of a new run; a resumed one has its answers on disk."""
        if progress.step == 0:
            self._record("before")

    def on_end(self, progress: TrainingState) -> None:
        """Answer again, with the weights of the last step, and show both."""
        self._record("after")
        if self.module.rank.is_first:
            samples = json.loads(self.path.read_text())
            rows = [[s["prompt"], s.get("before", "(not recorded)"), s["after"]] for s in samples]
            self.console.table(
                "Held-out prompts",
                ["prompt", "before training", f"after step {progress.step}"],
                rows,
            )

    def _record(self, moment: str) -> None:
        answers = self._answers()
        if not self.module.rank.is_first:
            return
        blank = [
            {"prompt": p.messages[-1]["content"], "expected": p.expected} for p in self.prompts
        ]
        samples = (read_json(self.path) if moment == "after" else None) or blank
        for sample, text in zip(samples, answers, strict=True):
            sample[moment] = text
        write_atomically(
            self.path, json.dumps(redact_values(samples), ensure_ascii=False, indent=1)
        )

    def _answers(self) -> list[str]:
        """Generate the answers, on rank 0 alone unless a forward pass gathers weights (ZeRO 3)."""
        sharded = self.module.zero_stage == 3
        if not (sharded or self.module.rank.is_first):
            return []
        texts = [prompt.text for prompt in self.prompts]
        device = self.module.rank.device
        with self.module.rank.phases.within("answer"):
            return generate(
                self.module.model,
                self.tokenizer,
                texts,
                MAX_NEW_TOKENS,
                device=device,
                synced_ranks=sharded,
            )


def samples_reason_to_skip(
    setting: bool | str, parameters: int, sharded_or_offloaded: bool, prompts: int
) -> str | None:
    """Say why no samples are taken; None where they are.

    Args:
        setting: ``train.sample_answers``; ``auto`` leaves out models that generation would gather
            token by token.
    """
    if setting is False:
        return "train.sample_answers is false"
    if prompts == 0:
        return "nothing is held out"
    if setting == "auto" and sharded_or_offloaded and parameters > LARGE_MODEL_PARAMETERS:
        return "the model is sharded or offloaded, and generation would gather it for every token"
    return None
