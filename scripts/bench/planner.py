"""Predicted against published numbers of 70B-class runs, and the states' and activations' formulas
against measurements.

    python scripts/bench/planner.py            # prints the tables of docs/planner.md

Nothing is run: the planner is asked for the published configuration. What a peer does otherwise
than llmtune (a chunked loss, no fp32 master weights) is taken into account where the row says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

from llmtune.config.compose import compose_config
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.devices.probe import resolve_hardware
from llmtune.plan.ladder import Candidate
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.placement import Placement
from llmtune.plan.search import Search

GIB = 2**30

LLAMA2_70B = [
    "model.name_or_path=llama2-70b",
    "model.config.model_type=llama",
    "model.config.vocab_size=32000",
    "model.config.hidden_size=8192",
    "model.config.intermediate_size=28672",
    "model.config.num_hidden_layers=80",
    "model.config.num_attention_heads=64",
    "model.config.num_key_value_heads=8",
    "model.config.tie_word_embeddings=false",
]
LLAMA3_70B = ["model=llama3_70b"]


def mpt(layers: int, width: int) -> list[str]:
    """MosaicML's MPT models."""
    return [
        *("model.name_or_path=mpt", "model.config.model_type=mpt", "model.config.vocab_size=50432"),
        f"model.config.d_model={width}",
        f"model.config.n_layers={layers}",
        "model.config.n_heads=64",
    ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published run."""

    source: str
    model: list[str]
    hardware: list[str]
    tuner: list[str]
    placement: Placement
    world: int
    rows: int
    """A micro-batch's."""
    length: int
    accumulation: int = 1
    recompute: bool = True
    gib: float | None = None
    """Published memory of a GPU."""
    tokens: float | None = None
    """Published tokens a second and GPU."""
    chunked_loss: bool = False
    note: str = ""
    extra: list[str] = field(default_factory=list)


NONE3, CPU3 = Placement(3), Placement(3, "cpu", "cpu")
A100, A100_40, H100 = ["hardware=8xa100_80gb"], ["hardware=8xa100_40gb"], ["hardware=8xh100"]
LORA16 = ["tuner=lora", "tuner.lora_r=16"]
QKVO = [*LORA16, "tuner.target_modules=[q_proj,k_proj,v_proj,o_proj]"]
QLORA = ["tuner=qlora", "tuner.lora_r=64"]

ROWS = [
    Row(
        source="MLPerf llama2_70b_lora reference log, 8 x A100",
        model=LLAMA2_70B,
        hardware=A100,
        tuner=QKVO,
        placement=NONE3,
        world=8,
        rows=1,
        length=8192,
        tokens=417,
    ),
    Row(
        source="Juniper, MLPerf v4.0, 64 x A100",
        model=LLAMA2_70B,
        hardware=["hardware=64xa100_80gb"],
        tuner=QKVO,
        placement=NONE3,
        world=64,
        rows=1,
        length=8192,
        tokens=386,
    ),
    Row(
        source="Juniper, MLPerf v4.0, 8 x H100, DeepSpeed",
        model=LLAMA2_70B,
        hardware=H100,
        tuner=QKVO,
        placement=NONE3,
        world=8,
        rows=1,
        length=8192,
        tokens=655,
    ),
    Row(
        source="torchtune README: Llama-3.1-70B LoRA, 8 x A100",
        model=LLAMA3_70B,
        hardware=A100,
        tuner=LORA16,
        placement=NONE3,
        world=8,
        rows=2,
        length=2048,
        gib=27.6,
        tokens=437,
        chunked_loss=True,
        note="chunked loss",
    ),
    Row(
        source="torchtune README: Llama-3.1-70B full, CPU offload, 8 x A100",
        model=LLAMA3_70B,
        hardware=A100,
        tuner=["tuner=full"],
        placement=CPU3,
        world=8,
        rows=2,
        length=2048,
        gib=13.9,
        tokens=196,
        chunked_loss=True,
        note="chunked loss; its optimizer states are bf16",
    ),
    Row(
        source="MosaicML: MPT-70B full, 64 x A100",
        model=mpt(64, 8192),
        hardware=["hardware=64xa100_80gb"],
        tuner=["tuner=full"],
        placement=NONE3,
        world=64,
        rows=2,
        length=2048,
        tokens=410,
    ),
    Row(
        source="MosaicML: MPT-30B full, 8 x A100",
        model=mpt(48, 7168),
        hardware=A100,
        tuner=["tuner=full"],
        placement=NONE3,
        world=8,
        rows=2,
        length=2048,
        tokens=916,
    ),
    Row(
        source="MosaicML: MPT-30B full, 8 x A100, 8192",
        model=mpt(48, 7168),
        hardware=A100,
        tuner=["tuner=full"],
        placement=NONE3,
        world=8,
        rows=1,
        length=8192,
        tokens=574,
    ),
    Row(
        source="MosaicML: MPT-70B full, 64 x H100",
        model=mpt(64, 8192),
        hardware=[*H100, "hardware.nodes=8"],
        tuner=["tuner=full"],
        placement=NONE3,
        world=64,
        rows=2,
        length=2048,
        tokens=1039,
        note="fused kernels",
    ),
    Row(
        source="torchtitan: Llama-3-70B full, 64 x A100",
        model=LLAMA3_70B,
        hardware=["hardware=64xa100_80gb"],
        tuner=["tuner=full"],
        placement=NONE3,
        world=64,
        rows=1,
        length=8192,
        tokens=331,
    ),
    Row(
        source="NeMo Automodel: Llama-3-70B LoRA, 8 x H100",
        model=LLAMA3_70B,
        hardware=H100,
        tuner=LORA16,
        placement=NONE3,
        world=8,
        rows=2,
        length=4096,
        tokens=1092,
        note="Transformer Engine's kernels, tensor parallelism of 2",
    ),
    Row(
        source="NeMo Automodel: Llama-3-8B LoRA, 1 x H100",
        model=["model=llama3_8b"],
        hardware=[*H100, "hardware.gpus_per_node=1"],
        tuner=LORA16,
        placement=Placement(0),
        world=1,
        rows=1,
        length=4096,
        recompute=False,
        tokens=12473,
        note="Transformer Engine's kernels",
    ),
    Row(
        source="NVIDIA NeMo 24.12: Llama-2-70B LoRA, 8 x H100",
        model=LLAMA2_70B,
        hardware=H100,
        tuner=LORA16,
        placement=NONE3,
        world=8,
        rows=1,
        length=4096,
        tokens=2621,
        note="FP8 and tensor parallelism, which llmtune has not",
    ),
    Row(
        source="Answer.AI: 70B QLoRA, 8 x A100-40GB",
        model=LLAMA2_70B,
        hardware=A100_40,
        tuner=QLORA,
        placement=NONE3,
        world=8,
        rows=4,
        length=2048,
        tokens=390,
    ),
    Row(
        source="Answer.AI: 70B QLoRA, 4 x H100",
        model=LLAMA2_70B,
        hardware=[*H100, "hardware.gpus_per_node=4"],
        tuner=QLORA,
        placement=NONE3,
        world=4,
        rows=4,
        length=2048,
        tokens=786,
    ),
    Row(
        source="Answer.AI: 70B QLoRA, 2 x RTX 3090",
        model=LLAMA2_70B,
        hardware=["hardware=2x3090"],
        tuner=QLORA,
        placement=CPU3,
        world=2,
        rows=2,
        length=2048,
        gib=14.9,
        tokens=89,
        note="weights offloaded, as published",
    ),
    Row(
        source="Answer.AI: 70B QLoRA, 2 x RTX 4090",
        model=LLAMA2_70B,
        hardware=["hardware=2x3090", "hardware.gpu_name=RTX 4090"],
        tuner=QLORA,
        placement=CPU3,
        world=2,
        rows=2,
        length=2048,
        tokens=238,
        note="weights offloaded, as published",
    ),
    Row(
        source="PEFT docs: Llama-2-70B LoRA r=8, 8 x H100",
        model=LLAMA2_70B,
        hardware=H100,
        tuner=["tuner=lora", "tuner.lora_r=8", "tuner.lora_dropout=0.1"],
        placement=NONE3,
        world=8,
        rows=8,
        length=2048,
        gib=64e9 / GIB,
        note="64 GB as nvidia-smi shows it",
    ),
    Row(
        source="PEFT docs: Llama-2-70B QLoRA r=8, 2 x 40 GB",
        model=LLAMA2_70B,
        hardware=[*A100_40, "hardware.gpus_per_node=2"],
        tuner=["tuner=qlora", "tuner.lora_r=8", "tuner.lora_dropout=0.1"],
        placement=NONE3,
        world=2,
        rows=2,
        length=2048,
        gib=36.6e9 / GIB,
        note="36.6 GB as nvidia-smi shows it",
    ),
]


def predict(row: Row) -> Candidate:
    """The planner's candidate for a published run."""
    batch = row.rows * row.world * row.accumulation
    config = compose_config(
        [
            *row.model,
            *row.hardware,
            *row.tuner,
            *row.extra,
            "data.train=rows.jsonl",
            f"data.max_seq_length={row.length}",
            f"train.global_batch_size={batch}",
            *("data.val_set_size=0", "model.attn_implementation=flash_attention_2"),
        ]
    ).config
    hardware = resolve_hardware(config.hardware, planning=True)
    shape = resolve_shape(config.model, config.tuner)
    search = Search(config, hardware, shape, row.world, "flash_attention_2")
    rows = BatchPlan(
        global_batch_size=batch,
        micro_batch_size=row.rows,
        accumulation_steps=row.accumulation,
        world_size=row.world,
    )
    found = search.evaluate(
        search.hold(row.placement, rows), shape.reached_layers if row.recompute else 0
    )
    if row.chunked_loss:
        tokens = row.rows * row.length * shape.vocab_size
        device = replace(found.memory.device, logits=int(tokens * (2 + 12 / 8)))
        found = replace(found, memory=replace(found.memory, device=device))
    return found


def compare(published: float | None, predicted: float, limit: float) -> tuple[str, str]:
    """Published and predicted with the deviation, and whether that misses the limit."""
    if published is None:
        return "", ""
    apart = predicted / published - 1
    return f"{published:.1f} / {predicted:.1f} ({apart:+.0%})", (
        "" if abs(apart) <= limit else "miss"
    )


def main() -> None:
    """Print the table."""
    write = sys.stdout.write
    write(
        "| run | GiB a GPU, published / predicted | tokens/s a GPU | note |\n| --- | --- | --- |"
        " --- |\n"
    )
    for row in ROWS:
        found = predict(row)
        memory, lost_memory = compare(row.gib, found.memory.device.total / GIB, 0.10)
        speed, lost_speed = compare(row.tokens, found.speed.tokens_per_second / row.world, 0.25)
        notes = [
            *(
                [f"**{' and '.join(m)}**"]
                if (
                    m := [
                        n
                        for n, lost in (
                            ("memory misses", lost_memory),
                            ("speed misses", lost_speed),
                        )
                        if lost
                    ]
                )
                else []
            ),
            row.note,
        ]
        write(
            f"| {row.source} | {memory} | {speed} | {'; '.join(note for note in notes if note)} |\n"
        )


if __name__ == "__main__":
    main()
