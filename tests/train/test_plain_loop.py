"""The numbers of real runs against a loop that shares no code with them (``plain_loop.py``)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune.config.cache_folder import open_cache
from llmtune.config.compose import compose_config
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import TrainLoader
from llmtune.data.prepared_data import open_rows
from llmtune.model.source import resolve_model_folder
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.prepared_data import PreparedData
from llmtune.storage.plain_fields import from_plain
from tests.support import TINY, first, pairs, product, run_cli
from tests.train import plain_loop

BATCH, RATE, WARMUP, CLIP = 4, 2e-3, 2, 0.3
TOLERANCE = 1e-5
SCHEDULES = ("constant", "linear", "cosine")

FACTORS: Any = (("full", "lora"), (False, True), (0, 1, 2, 3), (1, 2), (1, 2), (0.0, 0.1))
"""Tuner, packing, ZeRO stage, ranks, micro-batches of a step, weight decay."""
CELLS = pairs(*FACTORS)


#: The same factors, with Lion.
LION_CELLS = [
    ("lora", True, 1, 1, 2, 0.1),
    ("full", False, 3, 2, 1, 0.1),
    pytest.param(("full", False, 0, 2, 1, 0.1), marks=pytest.mark.slow),
    pytest.param(("full", True, 2, 2, 2, 0.0), marks=pytest.mark.slow),
]


#: The same factors, with a part of the model, which an expression names in plain PyTorch.
FREEZE_CELLS = [
    (("freeze", False, 0, 2, 1, 0.1), ["tuner.freeze.last_layers=1"], r"layers\.1\.|model\.norm"),
    (("freeze", True, 3, 2, 2, 0.0), ["tuner.freeze.last_layers=1"], r"layers\.1\.|model\.norm"),
    (
        ("freeze", False, 3, 2, 1, 0.1),
        ["tuner.freeze.last_layers=null", "tuner.freeze.pattern=layers\\.0\\.mlp|lm_head"],
        # The head is tied to the embeddings, and has their name.
        r"layers\.0\.mlp|embed_tokens",
    ),
]


#: The same factors, with Muon. Its iteration is in bf16: the order in which gradients are added up,
#: which differs with stages and ranks, moves digits of a direction.
MUON_CELLS = [
    ("full", False, 0, 1, 1, 0.1),
    ("full", True, 0, 2, 2, 0.1),
    ("full", False, 1, 2, 1, 0.0),
    ("lora", False, 2, 2, 1, 0.1),
    ("full", False, 2, 1, 2, 0.1),
    ("full", True, 3, 2, 1, 0.1),
    ("lora", False, 3, 1, 1, 0.0),
]
MUON_TOLERANCE = 2e-3
#: Of the weights, which the run moves by a sixth of their norm.
MUON_WEIGHTS = 1e-2


#: The same factors, with Adafactor, which has no other stage.
ADAFACTOR_CELLS = [
    ("lora", True, 0, 2, 1, 0.0),
    pytest.param(("full", False, 0, 1, 2, 0.1), marks=pytest.mark.slow),
]


#: The same factors, with settings of single weights.
GROUPS: list[dict[str, Any]] = [
    {"pattern": "embed|q_proj.*lora_B", "learning_rate": RATE / 8, "weight_decay": 0.3},
    {"pattern": r"layers\.0\.", "learning_rate": RATE * 2},
    {"pattern": "norm|down_proj", "learning_rate": RATE / 2, "weight_decay": 0.0},
]
GROUP_CELLS = [
    (("full", False, 3, 2, 1, 0.1), "adamw", RATE),
    (("full", False, 0, 1, 2, 0.1), "lion", RATE / 5),
    (("lora", False, 1, 2, 1, 0.1), "adamw", RATE),
]


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Of one to three turns, some with a system message."""
    draws = random.Random(seed)
    words = [
        "red",
        "blue",
        "stone",
        "river",
        "seven",
        "lamp",
        "quick",
        "north",
        "paper",
        "glass",
        "äpfel",
        "漢字",
        ":-)",
        "3.14",
    ]

    def text(longest: int) -> str:
        return " ".join(draws.choices(words, k=draws.randint(1, longest)))

    rows = []
    for _ in range(count):
        row = [{"role": "system", "content": text(6)}] if draws.random() < 0.3 else []
        for _ in range(draws.randint(1, 3)):
            row += [
                {"role": "user", "content": text(9)},
                {"role": "assistant", "content": text(12)},
            ]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data: 23 rows to train on, so that no batch size divides them, and 7 that are held
    out.
    """
    folder = tmp_path_factory.mktemp("plain")
    for name, count, seed in (("train", 23, 1), ("eval", 7, 2)):
        lines = (json.dumps({"messages": row}) for row in conversations(count, seed))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """By peft, with both of its matrices drawn, so that its first step is not one on zeros."""
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, settings)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    wrapped.save_pretrained(str(folder / "first"))
    return folder / "first"


def documents_of_steps(
    run: Path, documents: list[plain_loop.Document]
) -> list[list[plain_loop.Document]]:
    """Which documents each step saw: the one thing that only the run can say."""
    plan = json.loads((run / "plan.json").read_text())
    rows = open_rows(from_plain(PreparedData, plan["data"]), "train")
    batch = BatchPlan(
        global_batch_size=BATCH, micro_batch_size=BATCH, accumulation_steps=1, world_size=1
    )
    last: Any = plan["steps"]["total_rows"]
    seed = int(yaml.safe_load((run / "config.yaml").read_text())["seed"])
    loader = TrainLoader(rows, batch, 0, seed, Collator(pad_token_id=0), last)
    steps = [loader.row_numbers(number * BATCH) for number in range(plan["steps"]["total_steps"])]
    return [
        [documents[line - 1] for row in step for _, line in rows.locations(row)] for step in steps
    ]


def check(
    cell: tuple[Any, ...],
    folder: Path,
    tmp_path: Path,
    optimizer: str = "adamw",
    rate: float = RATE,
    more: Sequence[str] = (),
    trained: str = "",
    groups: Sequence[dict[str, Any]] = (),
    tolerance: float = TOLERANCE,
) -> None:
    tuner, packing, stage, ranks, accumulation, decay = cell
    schedule = SCHEDULES[(stage + ranks) % 3]
    run = tmp_path / "run"
    overrides = [
        *TINY,
        f"tuner={tuner}",
        f"data.packing={packing}",
        f"zero={stage}",
        f"launch.nproc={ranks}",
        *(f"train.gradient_accumulation_steps={accumulation}", f"optim.weight_decay={decay}"),
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'eval.jsonl'}",
        "precision=fp32",
        f"train.global_batch_size={BATCH}",
        "train.num_train_epochs=1.5",
        *(f"optim={optimizer}", f"optim.learning_rate={rate}"),
        *(f"schedule.warmup_steps={WARMUP}", f"schedule={schedule}", f"train.max_grad_norm={CLIP}"),
        *("export=none", f"output_dir={run}"),
        *more,
    ]
    config = compose_config(["model=tiny"]).config
    base = resolve_model_folder(config.model, open_cache(config.paths), print)
    adapter = make_adapter(base, tmp_path) if tuner == "lora" else None
    if adapter is not None:
        overrides += [f"tuner.adapter_path={adapter}", "tuner.lora_r=4", "tuner.lora_alpha=8"]
        overrides += ["tuner.target_modules=[q_proj,v_proj,down_proj]"]
    done = run_cli(*overrides)
    assert done.code == 0, done.err

    tokenizer = plain_loop.load_tokenizer(base)
    train, held_out = (
        [
            plain_loop.encode(json.loads(line)["messages"], tokenizer)
            for line in (folder / name).open()
        ]
        for name in ("train.jsonl", "eval.jsonl")
    )
    steps = documents_of_steps(run, train)
    found = plain_loop.train(
        plain_loop.Recipe(
            base=base,
            adapter=adapter,
            steps=steps,
            held_out=held_out,
            learning_rate=rate,
            kind=schedule,
            warmup_steps=WARMUP,
            weight_decay=decay,
            max_grad_norm=CLIP,
            optimizer=optimizer,
            trained=trained,
            groups=list(groups),
        )
    )

    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    lines = [record for record in records if "loss" in record]
    assert len(lines) == len(steps) >= 2
    assert max(found.norms) > CLIP, "some steps must be clipped"
    assert [line["loss"] for line in lines] == pytest.approx(found.losses, rel=tolerance)
    assert [line["grad_norm"] for line in lines] == pytest.approx(found.norms, rel=tolerance)
    assert [line["learning_rate"] for line in lines] == pytest.approx(found.rates, rel=1e-9)
    assert [line["tokens"] for line in lines] == [
        sum(len(document.ids) for document in step) for step in steps
    ]
    evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert evaluations == pytest.approx(found.eval_losses, rel=tolerance)
    frozen = load_file(base / "model.safetensors") if trained else {}
    check_weights(run, found, frozen, tolerance if optimizer != "muon" else MUON_WEIGHTS)


def check_weights(
    run: Path,
    found: plain_loop.Curve,
    base: dict[str, torch.Tensor],
    tolerance: float = TOLERANCE,
) -> None:
    [file] = [*(run / "adapter").glob("*.safetensors"), *(run / "model").glob("*.safetensors")]
    written = load_file(file)
    expected = {name.replace(".default.", "."): weight for name, weight in found.weights.items()}
    frozen = base.keys() - expected.keys()
    assert written.keys() == expected.keys() | frozen
    for name in frozen:
        assert torch.equal(written[name], base[name]), name
    for name, weight in expected.items():
        # AdamW makes a step of full length out of a gradient of any size, so that single elements
        # may differ by one.
        assert float((written[name] - weight).norm() / weight.norm()) < tolerance, name


@pytest.mark.process
@pytest.mark.parametrize("cell", first(6, CELLS), ids=lambda cell: "-".join(map(str, cell)))
def test_a_run_is_what_plain_pytorch_computes(
    cell: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    check(cell, folder, tmp_path)


@pytest.mark.process
@pytest.mark.parametrize("cell", LION_CELLS, ids=str)
def test_a_run_with_lion_is_what_plain_pytorch_computes(
    cell: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    check(cell, folder, tmp_path, "lion", RATE / 5)


@pytest.mark.process
@pytest.mark.parametrize(
    "cell", first(1, MUON_CELLS[::-1]), ids=lambda cell: "-".join(map(str, cell))
)
def test_a_run_with_muon_is_what_plain_pytorch_computes(
    cell: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    check(cell, folder, tmp_path, "muon", RATE, tolerance=MUON_TOLERANCE)


@pytest.mark.process
@pytest.mark.parametrize("cell", ADAFACTOR_CELLS, ids=str)
def test_a_run_with_adafactor_is_what_plain_pytorch_computes(
    cell: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    # Norms are added up in fp32 there, and differ by 1.4e-6 before the first step.
    check(cell, folder, tmp_path, "adafactor", tolerance=2e-6)


@pytest.mark.process
@pytest.mark.parametrize("case", first(1, GROUP_CELLS), ids=str)
def test_a_run_with_groups_of_parameters_is_what_plain_pytorch_computes(
    case: tuple[Any, str, float], folder: Path, tmp_path: Path
) -> None:
    cell, optimizer, rate = case
    entries = ", ".join(
        "{"
        + ", ".join(
            f"{key}: '{value}'" if key == "pattern" else f"{key}: {value}"
            for key, value in group.items()
        )
        + "}"
        for group in GROUPS
    )
    typed = f"optim.param_groups=[{entries}]"
    check(cell, folder, tmp_path, optimizer, rate, more=[typed], groups=GROUPS)


@pytest.mark.process
@pytest.mark.parametrize("case", first(1, FREEZE_CELLS[::-1]), ids=str)
def test_a_run_that_trains_a_part_of_the_model_is_what_plain_pytorch_computes(
    case: tuple[Any, list[str], str], folder: Path, tmp_path: Path
) -> None:
    cell, more, trained = case
    check(cell, folder, tmp_path, more=more, trained=trained)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [cell for cell in product(*FACTORS) if cell not in CELLS],
    ids=lambda cell: "-".join(map(str, cell)),
)
def test_every_other_run_is_what_plain_pytorch_computes(
    cell: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    check(cell, folder, tmp_path)
