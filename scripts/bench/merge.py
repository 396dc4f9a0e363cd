"""Merging a LoRA adapter: llmtune's stream against peft in memory, axolotl's shard-by-shard merge,
and mergekit.

    python scripts/bench/merge.py --setup     # once: the peers' environments, about 1 GB each
    python scripts/bench/merge.py             # a random 1.2B Llama, five times each: bits, peak
    memory, time python scripts/bench/merge.py --flat      # peak memory at 0.4, 1.2 and 4 B with
    the same largest tensor, and at 70B

The base is bf16 in shards of 2 GB, the adapter fp32, r=64 on all linear layers. Every merge is a
process of its own. Measured are the seconds of load + merge + save, with imports apart, and the
peak of anonymous memory (RssAnon of the process and its children, 50 times a second, from start to
end, imports included; mapped files are not in it: the kernel takes those pages back when it wants).
llmtune's seconds contain hashing and flushing every file to the disk; the peers do neither, so that
their time is given as it is, and with a flush of their files after it. What is read is in the page
cache before the first measurement. `cp -r` of the base is given for scale. Ends with 1 if a target
was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import merge_peers
import torch
from watch import anonymous_bytes

from llmtune.storage.tensors.safetensors_writer import TensorFile, plan_shards, write_index
from llmtune.storage.tensors.tensor_spec import TensorSpec

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, RANK = 2048, 5632, 32000, 32, 8, 64
SHARD_BYTES = 2_000_000_000

#: Depth alone decides the size, so that the largest tensor and the largest module's adapter stay
#: the same.
LAYERS = {"0.4B": 6, "1.2B": 24, "4B": 86}

#: Targets.
MOST_BYTES, MOST_OF_PEFT, MOST_BYTES_70B = 600e6, 0.6, 3e9

#: Measured with the 0.4B model, and checked by ``--flat``: the tokenizer, loaded after the weights;
#: and how many bytes the C library holds for each byte of blocks that is alive, because they are
#: freed by another thread than the one that made them.
_TOKENIZER_BYTES = 60e6
_HELD = 2.7
_SLACK = 0.15


def linears(hidden: int, inner: int, kv: int) -> dict[str, tuple[int, int]]:
    """Linear layers of a Llama block: name -> (out, in)."""
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
        f"mlp.{name}": shape for name, shape in mlp.items()
    }


SHAPES = linears(HIDDEN, INNER, HIDDEN // HEADS * KV_HEADS)


def write_base(folder: Path, layers: int) -> None:
    """A random model, written without holding it."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    dtype = torch.bfloat16
    specs = [TensorSpec("model.embed_tokens.weight", dtype, (VOCAB, HIDDEN))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        specs += [
            TensorSpec(f"{prefix}.{name}.weight", dtype, shape) for name, shape in SHAPES.items()
        ]
        specs += [
            TensorSpec(f"{prefix}.{name}.weight", dtype, (HIDDEN,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    specs += [
        TensorSpec("model.norm.weight", dtype, (HIDDEN,)),
        TensorSpec("lm_head.weight", dtype, (VOCAB, HIDDEN)),
    ]
    shards = plan_shards(specs, SHARD_BYTES)
    for name, shard in shards:
        write_random(folder / name, shard)
    write_index(folder, shards)
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        bos_token_id=0,
        eos_token_id=1,
    ).save_pretrained(folder)
    write_tokenizer(folder)


def write_adapter(folder: Path, layers: int, base: Path) -> None:
    """An adapter with both matrices random, as after training."""
    from peft import LoraConfig

    folder.mkdir(parents=True)
    specs = []
    for layer in range(layers):
        for name, (out, width) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            specs.append(TensorSpec(f"{prefix}.lora_A.weight", torch.float32, (RANK, width)))
            specs.append(TensorSpec(f"{prefix}.lora_B.weight", torch.float32, (out, RANK)))
    write_random(folder / "adapter_model.safetensors", specs)
    targets = [name.rpartition(".")[2] for name in SHAPES]
    LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    ).save_pretrained(str(folder))


def write_random(file: Path, specs: list[TensorSpec]) -> None:
    """Tensors of normal numbers, the same for the same file name and shapes."""
    draw = torch.Generator().manual_seed(len(specs))
    with TensorFile(file, specs) as out:
        for spec in specs:
            rows = max(1, (1 << 22) // max(1, spec.shape[-1] if len(spec.shape) > 1 else 1))
            for first in range(0, spec.shape[0], rows):
                shape = (min(rows, spec.shape[0] - first), *spec.shape[1:])
                out.write(torch.randn(shape, generator=draw).mul_(0.02).to(spec.dtype))


def write_tokenizer(folder: Path) -> None:
    """As many words as the model has rows; what they are does not matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: number
        for number, word in enumerate(["<s>", "</s>", *(f"w{n}" for n in range(VOCAB - 2))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    whole: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    whole.chat_template = "{% for message in messages %}{{ message['content'] }} </s>{% endfor %}"
    whole.save_pretrained(folder)


def run_llmtune(base: Path, adapter: Path, output: Path, parity: bool) -> dict[str, float]:
    """Our export, called as the command calls it; seconds that it waited for the disk are counted
    on the way.
    """
    from transformers import AutoTokenizer, GenerationConfig  # noqa: F401 - so that it is not timed

    from llmtune.config.groups.export import ExportConfig
    from llmtune.export.pipeline import run_export
    from llmtune.export.request import ExportRequest

    waited, flush = 0.0, os.fsync

    def timed_flush(descriptor: int) -> None:
        nonlocal waited
        begun = time.perf_counter()
        flush(descriptor)
        waited += time.perf_counter() - begun

    setattr(os, "fsync", timed_flush)  # noqa: B010 - typed otherwise
    import_bytes = anonymous_bytes(os.getpid())
    started, cpu = time.perf_counter(), time.process_time()
    request = ExportRequest(
        base=base, base_name="random Llama", adapter=adapter, run=None, output=output
    )
    run_export(request, ExportConfig(parity=parity, max_shard_bytes=SHARD_BYTES))
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    return found | {"waited_seconds": waited, "flush_seconds": 0.0, "import_bytes": import_bytes}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the models lie, and the peers."""

    base: Path
    adapter: Path
    peers: Path

    @classmethod
    def make(cls, root: Path, size: str, peers: Path) -> Place:
        """Write base and adapter, and read them once, so that they are in the page cache."""
        place = cls(root / size / "base", root / size / "adapter", peers)
        write_base(place.base, LAYERS[size])
        write_adapter(place.adapter, LAYERS[size], place.base)
        for file in [*place.base.iterdir(), *place.adapter.iterdir()]:
            with file.open("rb") as whole:
                while whole.read(1 << 24):
                    pass
        return place

    def command(self, side: str, output: Path) -> list[str]:
        """One merge by one side, as a process."""
        folders = [str(self.base), str(self.adapter), str(output)]
        if side.startswith("llmtune"):
            return [sys.executable, __file__, "--side", side, *folders]
        python = sys.executable if side == "peft" else merge_peers.python_of(self.peers, side)
        return [python, merge_peers.__file__, side, *folders]

    def run(self, side: str) -> dict[str, Any]:
        """Merge once, take the hashes of what was written, and delete it."""
        output = self.base.with_name("merged")
        try:
            found: dict[str, Any] = merge_peers.measure(self.command(side, output))
            found["hashes"] = dict(merge_peers.hashes(output))
        finally:
            for folder in (
                output,
                output.with_name("merged-cache"),
                output.with_name("merged.tmp"),
            ):
                shutil.rmtree(folder, ignore_errors=True)
        return found

    def copy(self) -> tuple[float, float]:
        """Seconds of ``cp -r`` of the base, and of the flush after it."""
        os.sync()
        output = self.base.with_name("copied")
        started = time.perf_counter()
        subprocess.run(["cp", "-r", str(self.base), str(output)], check=True)
        seconds = time.perf_counter() - started
        flush = merge_peers.flush_files(output)
        shutil.rmtree(output)
        return seconds, flush


class Targets:
    """What was to be shown, and whether it was."""

    def __init__(self) -> None:
        self.missed = 0

    def check(self, reached: bool, text: str) -> None:
        """Print one of them."""
        self.missed += not reached
        print(f"{'PASS' if reached else 'FAIL'}  {text}", flush=True)


def compare(root: Path, peers: Path, repeats: int, targets: Targets) -> None:
    """The 1.2B model by every side, in turns whose order alternates."""
    place = Place.make(root, "1.2B", peers)
    size = sum(file.stat().st_size for file in place.base.glob("*.safetensors"))
    print(f"base {size / 1e9:.2f} GB, {os.cpu_count()} cores, {repeats} times, medians", flush=True)
    sides = [
        "llmtune",
        "peft",
        *(name for name in merge_peers.ENVIRONMENTS if merge_peers.is_ready(peers, name)),
    ]
    for name in merge_peers.ENVIRONMENTS.keys() - set(sides):
        print(f"{name}: not set up in {peers} (--setup), left out")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    copies = []
    for turn in range(repeats):
        copies.append(place.copy())
        for side in sides if turn % 2 == 0 else sides[::-1]:
            try:
                found[side].append(place.run(side))
            except RuntimeError as error:
                print(f"{side}: {error}", flush=True)
    print_table(found, copies)
    judge(found, targets)
    show_parity(place, repeats, middle(found["llmtune"], "seconds"))


def middle(results: list[dict[str, Any]], key: str) -> float:
    """Median of one number; infinity where every run failed."""
    return statistics.median(result[key] for result in results) if results else float("inf")


def print_table(found: dict[str, list[dict[str, Any]]], copies: list[tuple[float, float]]) -> None:
    """One row a side."""
    print(
        f"\n{'':<14}{'seconds':>9}{'(least)':>9}{'+ flush':>9}{'process':>9}{'CPU':>7}"
        f"{'peak anon MB':>14}{'as peft':>9}"
    )
    for side, results in found.items():
        if not results:
            continue
        flushed = statistics.median(
            result["seconds"] + result["flush_seconds"] for result in results
        )
        seconds = [
            middle(results, "seconds"),
            min(result["seconds"] for result in results),
            flushed,
        ]
        shown = "".join(
            f"{number:>9.1f}" for number in [*seconds, middle(results, "process_seconds")]
        )
        same = "yes" if all(agree(found, result) for result in results) else "NO"
        peak = middle(results, "peak_bytes") / 1e6
        print(f"{side:<14}{shown}{middle(results, 'cpu_seconds'):>7.1f}{peak:>14,.0f}{same:>9}")
    seconds, flush = (statistics.median(column) for column in zip(*copies, strict=True))
    print(f"{'cp -r':<14}{seconds:>9.1f}{min(copies)[0]:>9.1f}{seconds + flush:>9.1f}")
    if found["llmtune"]:
        first = found["llmtune"][0]
        waited = middle(found["llmtune"], "waited_seconds")
        print(
            f"llmtune waited {waited:.1f} s of these for the disk;"
            f" {first['import_bytes'] / 1e6:,.0f} MB are imports\n"
        )


def agree(found: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> bool:
    """Whether every tensor has the name, dtype, shape and bits that peft wrote."""
    return bool(found["peft"]) and result["hashes"] == found["peft"][0]["hashes"]


def judge(found: dict[str, list[dict[str, Any]]], targets: Targets) -> None:
    """The targets of the comparison."""
    ours, theirs = found["llmtune"], found["peft"]
    same = bool(ours) and all(agree(found, result) for result in ours)
    count = len(theirs[0]["hashes"]) if theirs else 0
    targets.check(same, f"bit-identical to peft's merge ({count} tensors, {len(ours)} times)")
    peak = max((result["peak_bytes"] for result in ours), default=float("inf"))
    of_peft = middle(theirs, "peak_bytes") / 1e6
    targets.check(
        peak <= MOST_BYTES,
        f"peak {peak / 1e6:,.0f} MB <= {MOST_BYTES / 1e6:,.0f} MB (peft: {of_peft:,.0f} MB)",
    )
    mine = middle(ours, "seconds")
    for name, results, most in (
        ("peft", theirs, MOST_OF_PEFT),
        ("axolotl", found.get("axolotl", []), 1.0),
    ):
        share = mine / middle(results, "seconds") if results else float("inf")
        flushed = (
            statistics.median(r["seconds"] + r["flush_seconds"] for r in results)
            if results
            else float("inf")
        )
        text = (
            f"time, ours flushed, {share:.2f} of {name}'s as it is ({mine / flushed:.2f} of it"
            " flushed)"
        )
        targets.check(share <= most, f"{text}; at most {most:.1f}")


def show_parity(place: Place, repeats: int, without: float) -> None:
    """What the parity check of our export adds; nobody else has one, so that it is in none of the
    numbers above.
    """
    try:
        results = [place.run("llmtune-parity") for _ in range(repeats)]
    except RuntimeError as error:
        print(f"with export.parity=true: {error}")
        return
    seconds, peak = middle(results, "seconds"), middle(results, "peak_bytes")
    print(
        f"\nwith export.parity=true: {seconds:.1f} s, {seconds - without:+.1f} s against without;"
        f" peak {peak / 1e6:,.0f} MB"
    )


@dataclass(frozen=True, slots=True)
class Projection:
    """Anonymous memory of a merge, from the constants of llmtune's code."""

    import_bytes: float
    working_bytes: float
    """Of one shard that is being written."""
    shards: int

    @classmethod
    def of(cls, shapes: dict[str, tuple[int, int]], shards: int, import_bytes: float) -> Projection:
        """For an fp32 adapter of rank ``RANK`` on the layers of ``shapes``; as if its pages were
        copied.
        """
        from llmtune.export.publish.shards import _AHEAD
        from llmtune.storage.tensors.row_blocks import BLOCK_ELEMENTS

        # Rounded blocks: waiting, one being written, one just computed. In fp32: the product and
        # the base's rows.
        blocks = BLOCK_ELEMENTS * ((_AHEAD + 2) * 2 + 2 * 4)
        adapter = max(RANK * (out + width) * 4 for out, width in shapes.values())
        return cls(import_bytes, blocks + adapter, shards)

    @property
    def peak_bytes(self) -> float:
        """Imports and tokenizer once, the rest for each shard at once."""
        return self.import_bytes + _TOKENIZER_BYTES + _HELD * self.shards * self.working_bytes


def show_flat(root: Path, peers: Path, repeats: int, targets: Targets) -> None:
    """Peaks at three sizes, what the constants say, and what they say of 70B."""
    from llmtune.export.publish import shards

    peaks, imports = [], 0.0
    for size, layers in LAYERS.items():
        place = Place.make(root, size, peers)
        found = [place.run("llmtune") for _ in range(repeats)]
        files = len(list(place.base.glob("*.safetensors")))
        shutil.rmtree(root / size)
        at_once = max(1, min(files, len(os.sched_getaffinity(0)) // 2, shards._MOST_SHARDS))
        imports = max(imports, *(result["import_bytes"] for result in found))
        said = Projection.of(SHAPES, at_once, imports).peak_bytes
        peaks.append(middle(found, "peak_bytes"))
        worst = max(result["peak_bytes"] for result in found)
        shown = ", ".join(f"{result['peak_bytes'] / 1e6:.0f}" for result in found)
        seconds = middle(found, "seconds")
        print(
            f"{size}, {layers} layers, {files} shards, {seconds:.1f} s: peaks {shown} MB",
            flush=True,
        )
        most = said * (1 + _SLACK)
        targets.check(
            worst <= most,
            f"{size}: every peak at most {_SLACK:.0%} above the projected {said / 1e6:.0f} MB",
        )
    spread = max(peaks) / min(peaks) - 1
    targets.check(
        spread <= 0.1,
        f"flat from 0.4B to 4B: largest median peak {spread:.1%} above the smallest; at most 10%",
    )
    llama = linears(8192, 28672, 1024)
    for count in (1, shards._MOST_SHARDS):
        far = Projection.of(llama, count, imports).peak_bytes
        text = f"{count} shards at once ({2 * count} cores or more): {far / 1e9:.2f} GB"
        targets.check(
            far <= MOST_BYTES_70B, f"Llama-3-70B, largest tensor 2.1 GB, projected, {text}"
        )


def main() -> int:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--setup", action="store_true", help="make the peers' environments, and end"
    )
    parser.add_argument("--flat", action="store_true")
    cache = os.environ.get("LLMTUNE_BENCH_PEERS", "~/.cache/llmtune-bench")
    parser.add_argument(
        "--peers", type=Path, default=Path(cache), help="folder of their environments"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the models are written; a temporary folder without"
    )
    parser.add_argument(
        "--side", nargs=4, metavar=("SIDE", "BASE", "ADAPTER", "OUTPUT"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    peers = arguments.peers.expanduser().resolve()
    if arguments.side:
        side, *folders = arguments.side
        base, adapter, output = map(Path, folders)
        found = run_llmtune(base, adapter, output, parity=side == "llmtune-parity")
        print("\n" + json.dumps(found))
        return 0
    if arguments.setup:
        merge_peers.make_environments(peers)
        return 0
    targets = Targets()
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        if arguments.flat:
            show_flat(Path(root), peers, arguments.repeats, targets)
        else:
            compare(Path(root), peers, arguments.repeats, targets)
    return 1 if targets.missed else 0


if __name__ == "__main__":
    sys.exit(main())
