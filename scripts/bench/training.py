"""Train SmolLM2-135M with LoRA in llmtune and in TRL's SFTTrainer, on the same rows, in one run.

    DS_ACCELERATOR=cpu python scripts/bench/training.py --peers /tmp/peers [--packed]

Both train adapters of rank 16 on all linear layers, 8 rows a step, and then take the loss of the
same held-out rows. The rows are the docstrings of Python's library as questions and answers, of
which the answers are trained. Runs alternate. Prints the median of the seconds of a step (but for
the first two), the tokens of a second (padding not counted), and the held-out loss; ``--json FILE``
writes the numbers too.

TRL gets an environment of its own below ``--peers``, made the first time. Its trainer is one
process, which has all threads; llmtune has what it takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import training_peers
from watch import resident, run_watched

from llmtune.config.cache_folder import find_cache
from llmtune.config.compose import compose_config
from llmtune.data.read.stdlib_docs import read_stdlib_docs
from llmtune.model.source import resolve_model_folder

ROWS, LENGTH, RATE = 8, 384, 1e-4
#: Steps that do not count: kernels are chosen and memory is touched for the first time.
WARM_UP = 2


def write_rows(folder: Path, packed: bool, steps: int, held_out: int) -> dict[str, str]:
    """Write the rows as prompts and completions, the form of which both train the completion."""
    rows = read_stdlib_docs()
    of_steps = steps * ROWS * (8 if packed else 1)
    files = {}
    for name, some in (("train", rows[held_out:][:of_steps]), ("eval", rows[:held_out])):
        lines = [
            {"prompt": row.prompt(), "completion": [row.messages[-1].to_dict()]} for row in some
        ]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def run_llmtune(job: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train with llmtune, and read its numbers from the run folder."""
    command = [
        *(sys.executable, "-m", "llmtune", "train", "model=smollm2_135m", "tuner=lora"),
        *("tuner.lora_r=16", "tuner.lora_alpha=32", "tuner.lora_dropout=0"),
        *("tuner.target_modules=all-linear", f"data.train={job['train']}"),
        *(f"data.eval={job['eval']}", f"data.max_seq_length={LENGTH}", "data.overlong=truncate"),
        *("data.max_overlong_share=1", f"data.packing={json.dumps(job['packed'])}"),
        *(f"precision={job['precision']}", f"train.global_batch_size={ROWS}"),
        *(f"train.max_steps={job['steps']}", f"optim.learning_rate={RATE}", "schedule=constant"),
        *("schedule.warmup_ratio=0", "train.sample_answers=false", "train.save_steps=null"),
        *("export=none", f"output_dir={output}", *job["overrides"]),
    ]
    # What is watched ends with a line of JSON.
    then_tell = 'out=$1; shift; "$@" >&2 && tail -n 1 "$out/metrics.jsonl"'
    watched = run_watched(["sh", "-c", then_tell, "sh", str(output), *command], resident, 0.5)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        "seconds": [line["seconds"] for line in steps],
        "tokens": [line["tokens"] for line in steps],
        "held_out": [line["eval_loss"] for line in lines if "eval_loss" in line][-1],
        "peak_bytes": watched["pss_bytes"],
    }


def run_trl(job: dict[str, Any], output: Path, python: str) -> dict[str, Any]:
    """Train with TRL."""
    file = output.with_suffix(".json")
    file.write_text(json.dumps({**job, "output": str(output)}))
    script = str(Path(training_peers.__file__))
    env = {"OMP_NUM_THREADS": str(job["threads"])}
    found: dict[str, Any] = run_watched([python, script, str(file)], resident, 0.5, **env)
    return {**found, "peak_bytes": found["pss_bytes"]}


def summarize(results: list[dict[str, Any]]) -> dict[str, float]:
    """The medians of some runs of one side."""
    seconds = [value for one in results for value in one["seconds"][WARM_UP:]]
    tokens = [value for one in results for value in one["tokens"][WARM_UP:]]
    return {
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "peak_gb": max(one["peak_bytes"] for one in results) / 1e9,
        "held_out": results[-1]["held_out"],
    }


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, help="folder of TRL's environment")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="more than the two that do not count")
    parser.add_argument("--held-out", type=int, default=32, help="rows")
    parser.add_argument("--micro-batch", type=int, default=4, help="TRL's rows a forward pass")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="overrides of llmtune's runs")
    arguments = parser.parse_args()
    python = training_peers.make_environment(arguments.peers)
    found: dict[str, list[dict[str, Any]]] = {"llmtune": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = compose_config(["model=smollm2_135m"]).config
        job = {
            **write_rows(folder, arguments.packed, arguments.steps, arguments.held_out),
            "model": str(resolve_model_folder(config.model, find_cache(config.paths))),
            "packed": arguments.packed,
            "precision": arguments.precision,
            "threads": len(os.sched_getaffinity(0)),
            "micro_batch": arguments.micro_batch,
            "overrides": arguments.overrides,
            "steps": arguments.steps,
            "rows": ROWS,
            "length": LENGTH,
            "rate": RATE,
        }
        for number in range(arguments.repeats):
            found["llmtune"].append(run_llmtune(job, folder / f"llmtune-{number}"))
            found["trl"].append(run_trl(job, folder / f"trl-{number}", python))
    table = {side: summarize(results) for side, results in found.items()}
    print("| | seconds a step | tokens/s | peak memory | held-out loss |")
    print("| --- | --- | --- | --- | --- |")
    for side, of_side in table.items():
        print(
            f"| {side} | {of_side['seconds_per_step']:.2f} | {of_side['tokens_per_second']:.0f}"
            f" | {of_side['peak_gb']:.2f} GB | {of_side['held_out']:.4f} |"
        )
    ratio = table["llmtune"]["tokens_per_second"] / table["trl"]["tokens_per_second"]
    print(f"llmtune trains {ratio:.2f} times as many tokens a second")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"runs": found, "table": table}, indent=1))


if __name__ == "__main__":
    main()
