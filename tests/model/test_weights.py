"""A model whose files lack weights is refused by their names, and one that only looks so is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.config.schema import Precision
from llmtune.errors import MissingPrerequisiteError
from llmtune.model.build import build_model
from llmtune.model.weights.check import compare_weights
from llmtune.plan.architecture.meta_model import build_meta_model
from llmtune.run.check_model import check_model
from tests.architectures.families import FAMILIES

Tensors = dict[str, torch.Tensor]


def save_model(family: str, folder: Path, tied: bool | None = None, **settings: Any) -> Path:
    """Random weights of a family, as transformers saves them."""
    numbers = {**FAMILIES[family], **({} if tied is None else {"tie_word_embeddings": tied})}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(numbers.pop("model_type", family), **numbers)
    )
    model.save_pretrained(folder, **settings)
    return folder


def change(folder: Path, how: Callable[[Tensors], Tensors]) -> None:
    """Write the only file of a folder anew."""
    file = folder / "model.safetensors"
    made = how(load_file(file))
    save_file(
        {name: tensor.contiguous() for name, tensor in made.items()},
        file,
        metadata={"format": "pt"},
    )


def look(folder: Path, cache: Path | None = None) -> list[str]:
    """What a run says of the weights before its ranks start."""
    said: list[str] = []
    config = compose_config([f"model.name_or_path={folder}", "data.train=none.jsonl"]).config
    check_model(config, "eager", folder, cache, said.append)
    return said


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt_neox", "mixtral", "deepseek_v3", "apertus", "opt", "gemma3_text", "bert"],
)
def test_a_model_that_transformers_saved_is_whole(family: str, tmp_path: Path) -> None:
    report = compare_weights(
        build_meta_model(AutoConfig.from_pretrained(save_model(family, tmp_path)))[0], tmp_path
    )
    assert (report.missing, report.reshaped, report.untied, report.defaults, report.unused) == (
        (),
    ) * 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_tied_and_sharded_models_are_whole(tied: bool, shard: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path, tied, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == (
        1 if shard == "1GB" else len(list(tmp_path.glob("*-of-*")))
    )
    named = (
        [
            "weights: tied by the configuration (one weight under two names), and not in the files:"
            " lm_head.weight"
        ]
        if tied
        else []
    )
    assert look(tmp_path) == named


RIGHT: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "without the base model's prefix": (
        lambda t: {n.removeprefix("transformer."): v for n, v in t.items()},
        [],
    ),
    "with a tensor that nobody uses": (
        lambda t: {**t, "value_head.weight": torch.ones(2, 2)},
        ["weights: in the files, and not used: value_head.weight"],
    ),
    "with masks that old versions stored": (
        lambda t: {**t, "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)},
        [],
    ),
    "with the head only of a tied pair": (
        lambda t: {
            "lm_head.weight" if n == "transformer.wte.weight" else n: v for n, v in t.items()
        },
        [],
    ),
    "with both of a tied pair, the same": (
        lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()},
        [],
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_transformers_reads_all_the_same_is_not_refused(case: str, tmp_path: Path) -> None:
    how, expected = RIGHT[case]
    original = build_model(
        save_model("gpt2", tmp_path), ModelConfig(name_or_path="m"), Precision.fp32, "eager"
    )
    change(tmp_path, how)
    assert [line for line in look(tmp_path) if "tied by" not in line] == expected
    read = build_model(
        tmp_path, ModelConfig(name_or_path="m"), Precision.fp32, "eager"
    ).state_dict()
    assert all(torch.equal(value, read[name]) for name, value in original.state_dict().items())


WRONG: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "a layer is missing": (
        "gpt2",
        lambda t: {n: v for n, v in t.items() if "h.1.attn.c_attn" not in n},
        (
            r"2 weights of the model are in none of the files .*h.1.attn.c_attn.weight,"
            r" .*transformers would draw random numbers"
        ),
    ),
    "one bias is missing": (
        "gpt2",
        lambda t: {n: v for n, v in t.items() if n != "transformer.ln_f.bias"},
        r"one weight of the model is in none .*: transformer.ln_f.bias. transformers",
    ),
    "an expert is missing": (
        "mixtral",
        lambda t: {n: v for n, v in t.items() if "layers.1.block_sparse_moe.experts" not in n},
        r"model.layers.1.mlp.experts.gate_up_proj",
    ),
    "one of a layer's experts is missing": (
        "mixtral",
        lambda t: {n: v for n, v in t.items() if ".1.block_sparse_moe.experts.2." not in n},
        (
            r"another shape than its config.json: .*experts.down_proj is \[3, 32, 48\] in the files"
            r" and \[4, 32, 48\]"
        ),
    ),
    "an untied head is missing": (
        "gpt_neox",
        lambda t: {n: v for n, v in t.items() if "embed_out" not in n},
        r"lm_head.weight",
    ),
    "both of a tied pair are missing": (
        "gpt2",
        lambda t: {n: v for n, v in t.items() if "wte" not in n},
        r"lm_head.weight|transformer.wte.weight",
    ),
    "names begin with module.": (
        "gpt2",
        lambda t: {f"module.{n}": v for n, v in t.items()},
        (
            r"The names in the files begin with 'module.', which torch's DataParallel or DeepSpeed"
            r" puts there"
        ),
    ),
    "names begin with _orig_mod.": (
        "llama",
        lambda t: {f"_orig_mod.{n}": v for n, v in t.items()},
        r"begin with '_orig_mod.', which torch.compile puts there",
    ),
    "names are of another architecture": (
        "opt",
        lambda t: {n.replace("decoder", "encoder"): v for n, v in t.items()},
        r"they hold \d+ others, such as model.encoder",
    ),
    "a tensor has another shape": (
        "gpt2",
        lambda t: {n: v[:-1] if n == "transformer.wpe.weight" else v for n, v in t.items()},
        r"transformer.wpe.weight is \[63, 32\] in the files and \[64, 32\] in the model",
    ),
    "a tied pair has two values": (
        "gpt2",
        lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] * 1.001},
        (
            r"makes one weight of lm_head.weight and transformer.wte.weight, .*set"
            r" tie_word_embeddings to false"
        ),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_is_not_the_files_is_refused_with_the_names(case: str, tmp_path: Path) -> None:
    family, how, message = WRONG[case]
    change(save_model(family, tmp_path / "m"), how)
    for _ in range(2):
        # The second answer is a remembered one.
        with pytest.raises(MissingPrerequisiteError, match=message) as caught:
            look(tmp_path / "m", tmp_path / "cache")
        assert caught.value.exit_code == 7
    change(save_model(family, tmp_path / "m"), lambda t: t)
    look(tmp_path / "m", tmp_path / "cache")


def test_a_model_that_was_not_looked_at_before_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """``eval``, ``chat`` and ``export`` come this way, and checkpoints."""
    change(
        save_model("gpt2", tmp_path),
        lambda t: {n: v for n, v in t.items() if n != "transformer.ln_f.weight"},
    )
    with pytest.raises(
        MissingPrerequisiteError,
        match="transformer.ln_f.weight. transformers would draw random numbers",
    ):
        build_model(tmp_path, ModelConfig(name_or_path="m"), Precision.fp32, "eager")


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / gone).unlink()
    with pytest.raises(
        MissingPrerequisiteError, match=f"names {gone}, which is not there; fetch the model again"
    ):
        look(tmp_path)


def test_files_that_transformers_does_not_read_are_not_read(tmp_path: Path) -> None:
    """Mistral's folders hold a second copy in ``consolidated.safetensors``, under other names."""
    save_model("llama", tmp_path)
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    assert look(tmp_path) == []
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        MissingPrerequisiteError,
        match=r"holds neither model.safetensors nor .*\(it has: consolidated",
    ):
        look(tmp_path)


def test_a_buffer_that_is_missing_keeps_the_architectures_values_and_is_named(
    tmp_path: Path,
) -> None:
    change(
        save_model("deepseek_v3", tmp_path),
        lambda t: {n: v for n, v in t.items() if "correction_bias" not in n},
    )
    (line,) = look(tmp_path)
    assert (
        line
        == "weights: buffers that are not in the files, and have the architecture's own values: "
        "model.layers.1.mlp.gate.e_score_correction_bias"
    )
