"""Preparing chat rows with packing: llmtune against TRL's SFTTrainer on the same file, tokenizer
and cores.

    python scripts/bench/data.py --rows 200000 --trl /path/to/trl-venv/bin/python

TRL lives in an environment of its own (`pip install torch==2.13.0 trl==1.16.* psutil`). Each is a
process of its own; measured are the seconds from reading the file to rows ready for training
(imports apart), and the peak of the memory of the whole process tree: proportional (PSS: shared
pages are divided among those who share them) and the sum of all resident sets (RSS: shared pages
counted once a process), sampled ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from watch import resident, run_watched

#: Tokens of SmolLM2's tokenizer for a word of WORDS with the space before it, about.
WORDS = Path(__file__).read_text().split()

CAPACITY = 4096


def write_rows(path: Path, rows: int) -> None:
    """Chats of 60 to 250 tokens, of one or two turns, the same for the same number."""
    draw = random.Random(0)
    words = [word for word in WORDS if word.isalpha()]
    with path.open("w") as file:
        for number in range(rows):
            turns = draw.choice((1, 1, 2))
            # The template and its system message take 25 tokens and 5 a turn.
            left = draw.randint(60, 250) - 25 - 10 * turns
            messages = []
            for _ in range(turns):
                share = max(2, int(left / turns / 1.33))
                question = " ".join(draw.choices(words, k=max(1, share // 3)))
                answer = " ".join(draw.choices(words, k=max(1, share - share // 3)))
                messages += [
                    {"role": "user", "content": f"{question} {number}"},
                    {"role": "assistant", "content": answer},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")


def run_llmtune(source: Path, folder: Path, model: Path, workers: str) -> dict[str, Any]:
    """Tokens and seconds of llmtune."""
    from transformers import AutoTokenizer

    from llmtune.config.groups.data import DataConfig
    from llmtune.data.prepare import prepare_data
    from llmtune.data.prepared_data import open_rows

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = DataConfig(
        train=str(source),
        val_set_size=0,
        packing=True,
        max_seq_length=CAPACITY,
        num_workers="auto" if workers == "auto" else int(workers),
    )
    started = time.perf_counter()
    data = prepare_data(config, tokenizer, 42, folder)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    rows = open_rows(prepare_data(config, tokenizer, 42, folder), "train")
    rows.row(len(rows) // 2)
    return {
        "tokens": data.train.tokens,
        "seconds": seconds,
        "second_start_seconds": time.perf_counter() - started,
        "packed_rows": data.train.rows,
        "packing_efficiency": data.train.packing_efficiency,
    }


def run_trl(source: Path, folder: Path, model: Path, workers: str) -> dict[str, Any]:
    """Tokens and seconds of TRL."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    tiny: Any = LlamaForCausalLM(shape)
    tiny.to(torch.float32)
    config = SFTConfig(
        output_dir=str(folder / "out"),
        packing=True,
        max_length=CAPACITY,
        report_to=[],
        use_cpu=True,
        bf16=False,
        dataset_num_proc=int(workers) if workers != "auto" else None,
    )
    started = time.perf_counter()
    rows = load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder / "cache")
    )
    trainer = SFTTrainer(model=tiny, args=config, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    lengths = [sum(row) for row in trainer.train_dataset["seq_lengths"]]
    tokens = sum(lengths)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "packed_rows": len(lengths),
        "packing_efficiency": tokens / (len(lengths) * CAPACITY),
    }


def measure(command: list[str]) -> dict[str, Any]:
    """Run a side and watch the memory of its process tree."""
    found: dict[str, Any] = run_watched(
        command, resident, 0.1, OMP_NUM_THREADS="2", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
    )
    return found


def main() -> None:
    """Measure both sides, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument(
        "--model", type=Path, help="folder with a tokenizer; default: the embedded SmolLM2-135M"
    )
    parser.add_argument("--trl", help="python of an environment with TRL")
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--side", choices=["llmtune", "trl"])
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        with tempfile.TemporaryDirectory() as folder:
            side = run_llmtune if arguments.side == "llmtune" else run_trl
            print(
                json.dumps(side(arguments.source, Path(folder), arguments.model, arguments.workers))
            )
        return
    model = arguments.model or embedded_model()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        write_rows(source, arguments.rows)
        print(
            f"{arguments.rows:,} rows, {source.stat().st_size / 1e6:,.0f} MB, {os.cpu_count()}"
            " cores"
        )
        sides: list[tuple[str, str, str]] = [("llmtune", sys.executable, arguments.workers)]
        if arguments.trl:
            sides += [("trl", arguments.trl, workers) for workers in ("1", "2")]
        for name, python, workers in sides:
            command = [
                python,
                __file__,
                "--side",
                name,
                "--source",
                str(source),
                "--model",
                str(model),
            ]
            found = measure([*command, "--workers", workers])
            print(
                f"{name:<8} workers {workers:<4} {found['tokens']:>12,} tokens "
                f" {found['seconds']:7.1f} s  {found['tokens'] / found['seconds']:>9,.0f} tokens/s "
                f" filled {found['packing_efficiency']:.2%}  peak PSS"
                f" {found['pss_bytes'] / 1e6:,.0f} MB, RSS {found['rss_bytes'] / 1e6:,.0f} MB"
                + (
                    f"  second start {found['second_start_seconds']:.2f} s"
                    if "second_start_seconds" in found
                    else ""
                ),
                flush=True,
            )


def embedded_model() -> Path:
    """The folder of SmolLM2-135M, from llmtune's cache."""
    from llmtune.config.cache_folder import open_cache
    from llmtune.config.compose import compose_config
    from llmtune.model.source import resolve_model_folder

    config = compose_config(["model=smollm2_135m"]).config
    return resolve_model_folder(config.model, open_cache(config.paths))


if __name__ == "__main__":
    main()
