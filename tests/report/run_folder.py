"""A run folder as a run would leave it, with texts and numbers that a test chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLAN = {
    "world_size": 2,
    "hardware": {"accelerator": "cpu", "device_count": 1},
    "shape": {"parameters": 1000, "trainable_parameters": 10},
    "placement": {"zero_stage": 2, "optimizer": "none", "param": "none"},
    "memory": {"device": {"weights": 600}, "host": {"runtime": 400}},
    "tokens_per_second": 100.0,
    "steps": {"total_steps": 8},
    "data": {
        "train": {"rows": 12, "documents": 12, "tokens": 600, "trained_tokens": 150},
        "eval": {"rows": 3, "documents": 3, "tokens": 100, "trained_tokens": 30},
    },
}


def records(steps: int = 8, loss: float = 2.0) -> list[dict[str, Any]]:
    """Lines of a metrics file: a step each, and an evaluation after every fourth."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": loss, "eval_accuracy": 0.25}]
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "loss": loss / step,
                "grad_norm": 1.5,
                "learning_rate": 1e-4,
                "tokens": 50,
                "tokens_per_second": 50.0,
                "seconds": 1.0,
                "memory_bytes": 500,
                "forward_seconds": 0.25,
                "backward_seconds": 0.75,
            }
        )
        if step % 4 == 0:
            lines.append({"step": step, "eval_loss": loss / step, "eval_accuracy": 0.5})
    return lines


def make_run(folder: Path, text: str = "plain", **files: Any) -> Path:
    """Make a run folder in which every place for a text holds ``text``.

    Args:
        files: Name of a file without its ending -> its value instead; None leaves it out.
    """
    folder.mkdir(parents=True)
    failure = {"candidate": {"zero_stage": 1}, "time": 10.0, "phase": text, "step": 2}
    plan = {
        **PLAN,
        "run_name": text,
        "notes": [text],
        "history": [{**failure, "pool": text, "message": text, "rank": 0, "peak_bytes": 1}],
    }
    values: dict[str, Any] = {
        "plan": plan,
        "config": {"model": {"name_or_path": text}, "tuner": {"kind": text}, text or "none": text},
        "environment": {"torch": text},
        "samples": [{"prompt": text, "expected": text, "before": text, "after": text}],
        "data_examples": {"rows": [{"from": text, "pieces": [[text, True], [text, False]]}]},
        "confusion_matrix": {
            "version": 1,
            "kind": "classes",
            "names": [text, f"{text}2"],
            "counts": [[3, 1], [0, 2]],
        },
        "time": {"seconds": {"forward": 2.0, "backward": 3.0}},
        "ended": {"outcome": "failed", "time": 30.0, "message": text},
    }
    values |= files
    for name, value in values.items():
        ending = "yaml" if name == "config" else "json"
        if value is not None:
            (folder / f"{name}.{ending}").write_text(json.dumps(value))
    lines = [{**record, f"eval_{text}": 0.5} for record in records()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    restart = {"time": 20.0, "reason": text, "step": 3, "resumed_from": text}
    (folder / "restarts.jsonl").write_text(json.dumps(restart) + "\n")
    return folder
