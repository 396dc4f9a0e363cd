"""QLoRA on other models than Llama's, and with more than adapters of layers: against bitsandbytes
and peft in plain PyTorch, in losses, resumes, what is stored, and what is merged.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llmtune.config.compose import compose_config
from llmtune.config.groups.export import ExportConfig, ExportDtype, MergeOnto
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.model.source import resolve_model_folder
from tests.engine.qlora_reference import PlainQlora, load_plainly
from tests.support import largest_difference, product, train_engines

HALF, STEPS = 5, 10
TEXTS = ("data.train=stdlib_docs@200", "data.max_seq_length=256", "data.overlong=truncate")
CLASSES = ("data=stdlib_modules", "data.max_seq_length=32", "data.max_overlong_share=1.0")
LLAMA = ("model=tiny", *TEXTS)
BERT = (
    *("model=tiny_bert", "+model.config.hidden_dropout_prob=0.0", *CLASSES),
    "+model.config.attention_probs_dropout_prob=0.0",
)
GPT2 = (
    *("model=tiny", "model.config.model_type=gpt2", *TEXTS),
    *(f"+model.config.{place}_pdrop=0.0" for place in ("embd", "attn", "resid")),
)
#: Its experts and its router are no linear layers, and stay in 16 bits.
EXPERTS = (
    *("model=tiny", "model.config.model_type=qwen3_moe", "+model.config.num_experts=4", *TEXTS),
    *("+model.config.moe_intermediate_size=32", "+model.config.num_experts_per_tok=2"),
)
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: Two tokens that are frequent, and one that the rows do not have.
TOKENS = [11, 40, 3]

#: A model and its rows, the tuner's overrides, and what peft calls them.
KINDS: dict[str, tuple[tuple[str, ...], list[str], dict[str, Any]]] = {
    "bert": (BERT, [], {}),
    "gpt2": (GPT2, [], {}),
    "gpt2 with biases": (GPT2, ["tuner.bias=all"], {"bias": "all"}),
    "experts": (EXPERTS, [], ATTENTION),
    "stacks": (
        EXPERTS,
        [f"tuner.target_parameters=[{','.join(STACKS)}]"],
        {**ATTENTION, "target_parameters": STACKS},
    ),
    "tied token rows": (
        LLAMA,
        [f"tuner.trainable_token_indices={TOKENS}"],
        {"trainable_token_indices": TOKENS},
    ),
    "token rows of both": (
        (*LLAMA, "model.config.tie_word_embeddings=false"),
        [f"tuner.trainable_token_indices={{embed_tokens: {TOKENS}, lm_head: [7]}}"],
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7]}},
    ),
    # Words of the rows, which become the first tokens behind the tokenizer's 512.
    "new tokens": (
        LLAMA,
        ["tuner.new_tokens=[return,string]"],
        {"trainable_token_indices": [512, 513]},
    ),
}
CELLS = product(list(KINDS), (0, 2, 3), (1, 2))
#: Those of the ordinary suite, which share the start of their ranks.
CHOSEN = [("bert", 3, 2), ("gpt2", 3, 2), ("stacks", 3, 2)]


@functools.cache
def overrides(kind: str, cache: Path, folder: Path) -> list[str]:
    """A run of a model whose biases are not zero, as those of a new one are."""
    asked, tuner, _ = KINDS[kind]
    own = folder / kind.replace(" ", "-")
    shutil.copytree(resolve_model_folder(compose_config(list(asked)).config.model, cache), own)
    draw, file = torch.Generator().manual_seed(1), own / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor += 0.2 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    return [
        *(*asked, f"model.name_or_path={own}", "precision=fp32", "optim.learning_rate=2e-3"),
        *("tuner=qlora", *tuner),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models go."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.process
@pytest.mark.slow
def test_it_is_bitsandbytes_and_peft_whatever_is_trained(
    cache: Path, folder: Path, tmp_path: Path
) -> None:
    check(CHOSEN, cache, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_so_in_every_place(kind: str, cache: Path, folder: Path, tmp_path: Path) -> None:
    cells = [cell for cell in CELLS if cell[0] == kind]
    for ranks in (1, 2):
        check([cell for cell in cells if cell[2] == ranks], cache, folder, tmp_path)


def check(cells: list[Any], cache: Path, folder: Path, tmp_path: Path) -> None:
    """Train and resume cells with one number of ranks, in one go."""
    ranks = cells[0][2]
    tasks: list[dict[str, Any]] = [
        {"overrides": [*overrides(kind, cache, folder), f"zero={stage}"], "first": 0, "last": STEPS}
        for kind, stage, _ in cells
    ]
    places = [str(tmp_path / f"{ranks}-{at}" / f"checkpoint-{HALF}") for at in range(len(cells))]
    both = list(zip(tasks, places, strict=True))
    saving = [{**task, "save": place, "save_at": HALF} for task, place in both]
    loading = [{**task, "first": HALF, "load": place} for task, place in both]
    # In processes of their own, as resumed runs are: in one that has trained six other engines a
    # sum of gpt2's was rounded otherwise.
    found = [
        *train_engines(saving, ranks, tmp_path, timeout=900),
        *train_engines(loading, ranks, tmp_path, timeout=900),
    ]
    for at, cell in enumerate(cells):
        losses, resumed = found[at]["losses"], found[len(cells) + at]["losses"]
        plain = PlainQlora(overrides(cell[0], cache, folder), STEPS, cache, **KINDS[cell[0]][2])
        assert largest_difference(losses, plain.train()) < 1e-5, cell
        assert resumed == losses[HALF:], cell
        assert found[at]["unreached"] == [], cell
        check_stored(plain, Path(places[at]), losses[HALF])


def check_stored(plain: PlainQlora, adapter: Path, loss: float) -> None:
    """What is stored is an adapter of the base in 4 bits and of the unquantized one, and is merged
    onto both.

    Args:
        loss: Of the step that follows.
    """
    step, judged = plain.steps[HALF], {}
    for onto in MergeOnto:
        base = (
            load_plainly(plain.folder, plain.model_class, plain.config)
            if onto is MergeOnto.nf4
            else load_whole(plain.folder, plain.model_class)
        )
        plain.model = PeftModel.from_pretrained(base, str(adapter))
        with torch.no_grad():
            judged[onto] = float(plain.loss_of(step))
        request = ExportRequest(
            base=plain.folder,
            base_name="tiny",
            adapter=adapter,
            run=None,
            output=adapter.parent / onto.value,
        )
        merged = run_export(request, ExportConfig(merge_onto=onto, dtype=ExportDtype.fp32))
        plain.model = load_whole(merged, plain.model_class)
        with torch.no_grad():
            assert abs(float(plain.loss_of(step)) - judged[onto]) < 2e-5, onto
    assert abs(judged[MergeOnto.nf4] - loss) < 1e-5
    assert abs(judged[MergeOnto.nf4] - judged[MergeOnto.original]) > 1e-4, "they must differ"


def load_whole(folder: Path, model_class: str) -> Any:
    return getattr(transformers, model_class).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
