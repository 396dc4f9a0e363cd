"""TRL for ``training.py``: how its environment is made, and one run of its ``SFTTrainer``.

    PEER_PYTHON training_peers.py JOB.json      # train once, print the numbers as JSON

It imports nothing of llmtune. Everything that is not in the job is TRL's default.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

#: torch comes first and alone, so that the build that pip finds by itself stays.
INSTALLS = (
    ["torch==2.13.0"],
    ["torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets"],
    ["--no-deps", "trl==1.16.0"],
)


def make_environment(folder: Path) -> str:
    """Make TRL's environment where it is not there; return its interpreter."""
    python = folder / "trl" / "bin" / "python"
    if not python.exists() or not _imports(python):
        venv.EnvBuilder(with_pip=True, clear=True).create(folder / "trl")
        for arguments in INSTALLS:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    return str(python)


def _imports(python: Path) -> bool:
    command = [str(python), "-c", "from trl import SFTTrainer"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says, and take the loss of the held-out rows."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(job["threads"])
    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        """Times the steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Begin a step."""
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """End a step."""
            seconds.append(time.perf_counter() - self.began)

    rows = {
        split: load_dataset("json", data_files=job[split], split="train")
        for split in ("train", "eval")
    }
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(
            output_dir=job["output"],
            max_steps=job["steps"],
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=job["rows"] // job["micro_batch"],
            per_device_eval_batch_size=4,
            learning_rate=job["rate"],
            lr_scheduler_type="constant",
            max_length=job["length"],
            packing=job["packed"],
            eval_packing=False,
            bf16=job["precision"] == "bf16",
            model_init_kwargs={"dtype": "bfloat16" if job["precision"] == "bf16" else "float32"},
            gradient_checkpointing=False,
            max_grad_norm=1.0,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def count(examples: list[dict[str, Any]]) -> Any:
        """Count the tokens of a micro-batch before it is padded."""
        tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = count
    trainer.train()
    per_step = job["rows"] // job["micro_batch"]
    trainer.data_collator = collate
    return {
        "seconds": seconds,
        "tokens": [
            sum(tokens[step * per_step : (step + 1) * per_step]) for step in range(job["steps"])
        ],
        "held_out": trainer.evaluate()["eval_loss"],
    }


if __name__ == "__main__":
    found = train(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(found))
