"""A right merge passes and every planted fault is refused, at adapters of one step, of five, of
sixty, and of nearly nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.export.merge.merged_source import MergedSource
from llmtune.export.merge.peft_adapter import read_adapter
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.export.sources.tensor_source import RetypedSource, SafetensorsSource, read_whole
from llmtune.export.verify.expected_tensors import Expectations, find_expected
from llmtune.export.verify.recompute import Agreement, Recomputation
from llmtune.export.verify.streamed_model import StreamedModel
from tests.export.conftest import make_base
from tests.export.merge_faults import FAULTS, Case, Held, Tensors
from tests.support import first

SCENES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": (
        "llama-bias",
        {
            "target_modules": "all-linear",
            "bias": "all",
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {r"layers.1.mlp.up_proj": 32},
        },
    ),
    "DoRA": ("llama", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "saved": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["lm_head", "norm"],
            "trainable_token_indices": [2, 9, 250],
        },
    ),
    "tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "lora_bias": True},
    ),
}
STEPS = (1, 5, 60)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Scene:
    """A base in bf16 and the adapters of one training after some of its steps."""

    name: str
    base: Path
    adapters: dict[str, Path]


def train(scene: str, base: Path, folder: Path) -> dict[str, Path]:
    """A real training at an ordinary rate, kept after some steps; and its last adapter, a
    ten-thousandth of it.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    wrapped: Any = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **SCENES[scene][1])
    )
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-4)
    found = {}
    for step in range(1, max(STEPS) + 1):
        tokens = torch.randint(0, 512, (2, 16))
        tokens[:, :3] = torch.tensor([2, 9, 250])
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            wrapped.save_pretrained(folder / f"{step} steps")
            found[f"{step} steps"] = folder / f"{step} steps"
    found["nearly nothing"] = shrink(found["1 steps"], folder / "nearly nothing")
    return found


def shrink(adapter: Path, folder: Path) -> Path:
    """Every LoRA change, a fiftieth: in 16 bits most numbers stay where they were."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    small = {
        name: tensor / 50 if "lora_B" in name or name.endswith("embedding_A") else tensor
        for name, tensor in tensors.items()
    }
    save_file(small, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


@pytest.fixture(scope="module", params=SCENES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "none").mkdir()
    base = make_base(SCENES[request.param][0], folder / "base", folder / "none", torch.bfloat16)
    return Scene(request.param, base, train(request.param, base, folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Base and adapter, opened once."""

    source: SafetensorsSource
    reference: StreamedModel
    expected: Expectations
    merged: MergedSource
    untied: bool

    def look(self, tensors: Tensors, tied: bool = False) -> Agreement:
        """Compare what would lie on the disk."""
        aliases = {} if self.untied and not tied else self.reference.aliases
        recomputation = Recomputation(self.source, Held(tensors), self.reference.aliases, aliases)
        return recomputation.run(self.expected)


def judge(base: Path, folder: Path) -> Judge:
    adapter, source = read_adapter(folder), SafetensorsSource(base)
    reference = StreamedModel(base, source, adapter)
    merged = MergedSource(source, adapter, "lm_head.weight")
    untied = merged.config_changes.get("tie_word_embeddings") is False
    return Judge(
        source=source,
        reference=reference,
        expected=find_expected(reference.units, reference.aliases),
        merged=merged,
        untied=untied,
    )


def truth(base: Path, folder: Path, name: str) -> tuple[Tensors, Tensors]:
    """The base and what peft itself merges, in fp64."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if name == "tied":
        # peft adds an embedding's change to the head that is tied to it, which its unmerged model
        # does not have.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    wrapped: Any = PeftModel.from_pretrained(
        model, str(folder), autocast_adapter_dtype=False
    ).double()
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, parameter in wrapped.named_parameters():
        # Once more, for peft may have rounded them on the way.
        stored = tensors.get(key.replace(".default", ""))
        if stored is not None and "base_layer" not in key:
            parameter.data = stored.double()
    right = wrapped.merge_and_unload().state_dict()
    return plain, {key: tensor.clone() for key, tensor in right.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", first(2, ["1 steps", "nearly nothing", "5 steps", "60 steps"]))
def test_the_right_merge_passes_and_every_fault_that_changes_a_number_is_refused(
    scene: Scene, size: str, dtype: torch.dtype
) -> None:
    folder = scene.adapters[size]
    court = judge(scene.base, folder)
    merged = RetypedSource(court.merged, dtype)
    stored = {name: read_whole(merged, name) for name in merged.specs}
    agreement = court.look(stored)
    assert agreement.problems == []
    assert not court.expected.unknown, "every module is recomputed"
    assert agreement.total.squared_change > 0
    base, right = truth(scene.base, folder, scene.name)
    settings = json.loads((folder / "adapter_config.json").read_text())
    case = Case(
        base={name: base[name] for name in stored},
        right={name: right[name] for name in stored},
        stored=stored,
        dtype=dtype,
        settings=settings,
        adapter=load_file(folder / "adapter_model.safetensors"),
    )
    assert_as_peft(case)
    unseen = set()
    for fault, plant in FAULTS[scene.name].items():
        if fault == "cut off, not rounded" and dtype is torch.float32:
            # One unit in the last place of fp32 is what the merge's own arithmetic is off by.
            continue
        tensors = plant(case)
        if tensors.keys() == stored.keys() and all(
            torch.equal(tensors[name], stored[name]) for name in stored
        ):
            unseen.add(fault)
            continue
        problems = court.look(tensors, tied=fault == "the head that was untied is missing").problems
        assert problems, f"{fault}: passed, with {count_changed(tensors, stored)} numbers changed"
    # A vector of ones moves by less than bf16 can say in a few steps.
    assert size == "nearly nothing" or unseen <= {"a saved vector is not copied"}, (
        f"changed no number: {unseen}"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ExportDtype)
def test_the_right_merge_is_published_at_every_size(
    scene: Scene, dtype: ExportDtype, tmp_path: Path
) -> None:
    """With its logits, and as a user gives it."""
    for adapter in scene.adapters.values():
        said: list[str] = []
        request = ExportRequest(
            base=scene.base,
            base_name="tiny",
            adapter=adapter,
            run=None,
            output=tmp_path / "out",
            say=said.append,
        )
        run_export(request, ExportConfig(dtype=dtype))
        assert any("adapted modules recomputed from peft's layers" in line for line in said), said


def assert_as_peft(case: Case) -> None:
    """The merge under test is right by peft's own arithmetic in fp64."""
    for name, tensor in case.stored.items():
        close = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}[
            case.dtype
        ]
        assert torch.allclose(tensor.double(), case.right[name], rtol=close, atol=1e-7), name


def count_changed(one: Tensors, other: Tensors) -> int:
    return sum(int(one[name].ne(other[name]).sum()) for name in one.keys() & other.keys())


def test_at_least_twenty_faults_are_planted() -> None:
    assert sum(map(len, FAULTS.values())) >= 40
