"""A base with weights in fewer bits: its files are looked through by name, and what cannot be
trained on is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.config.schema import Precision
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.model.build import WeightsTo, build_model
from llmtune.run.check_model import check_model, check_quantized
from tests.model.test_weights import Tensors, change, save_model

BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}

Pack = Callable[[str, torch.Tensor], Tensors]


def in_4_bits(owner: str, weight: torch.Tensor) -> Tensors:
    name = f"{owner}.weight"
    beside = {
        "absmax": torch.ones(4),
        "quant_map": torch.ones(16),
        "quant_state.bitsandbytes__nf4": torch.ones(8),
    }
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {name: packed, **{f"{name}.{part}": value for part, value in beside.items()}}


def in_8_bits(owner: str, weight: torch.Tensor) -> Tensors:
    beside = {"SCB": torch.ones(len(weight)), "weight_format": torch.zeros((), dtype=torch.uint8)}
    return {
        f"{owner}.weight": weight.to(torch.int8),
        **{f"{owner}.{part}": value for part, value in beside.items()},
    }


def in_words(owner: str, weight: torch.Tensor) -> Tensors:
    parts = {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    return {f"{owner}.{part}": torch.zeros(4, 4, dtype=dtype) for part, dtype in parts.items()}


def compressed(owner: str, weight: torch.Tensor) -> Tensors:
    parts = {
        "weight_packed": torch.int32,
        "weight_scale": torch.float16,
        "weight_shape": torch.int64,
    }
    return {f"{owner}.{part}": torch.zeros(2, 2, dtype=dtype) for part, dtype in parts.items()}


def in_fp8(owner: str, weight: torch.Tensor) -> Tensors:
    return {
        f"{owner}.weight": weight.to(torch.float8_e4m3fn),
        f"{owner}.weight_scale_inv": torch.full((1, 1), 0.5),
    }


#: Quantizer -> its settings, how it packs, and what a packed weight cannot do without.
KINDS: dict[str, tuple[dict[str, Any], Pack, list[str]]] = {
    "bitsandbytes, 4 bits": (BNB4, in_4_bits, ["weight.absmax", "weight.quant_map", "weight"]),
    "bitsandbytes, 8 bits": (BNB8, in_8_bits, ["SCB", "weight"]),
    "gptq": (GPTQ, in_words, ["scales", "qzeros", "qweight"]),
    "awq": (AWQ, in_words, ["scales", "qzeros", "qweight"]),
    "compressed-tensors": (PACKED, compressed, ["weight_scale", "weight_packed"]),
}


def save_packed(folder: Path, settings: dict[str, Any] | None, pack: Pack) -> Path:
    """A small Llama whose projections are packed, as the quantizer's files look."""

    def packed(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, weight in tensors.items():
            owner, _, ending = name.rpartition(".")
            made |= (
                pack(owner, weight) if ending == "weight" and "_proj" in owner else {name: weight}
            )
        return made

    change(save_model("llama", folder), packed)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    return folder


def look(folder: Path, stage: int = 0, tuner: str = "lora") -> list[str]:
    said: list[str] = []
    config = compose_config(
        [f"model.name_or_path={folder}", "data.train=none.jsonl", f"tuner={tuner}"]
    ).config
    check_quantized(config, stage, folder)
    check_model(config, "eager", folder, None, said.append)
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_one_is_taken_and_said_to_be_compared_by_names(kind: str, tmp_path: Path) -> None:
    settings, pack, _ = KINDS[kind]
    (line,) = [
        line for line in look(save_packed(tmp_path, settings, pack)) if "tied by" not in line
    ]
    method = settings["quant_method"]
    assert (
        line
        == f"weights: those that {method} packed are compared with the model by their names, not by"
        " their shapes"
    )


@pytest.mark.parametrize(
    ("kind", "part"), [(kind, part) for kind, (*_, parts) in KINDS.items() for part in parts]
)
def test_what_a_packed_weight_lacks_is_refused_by_name(
    kind: str, part: str, tmp_path: Path
) -> None:
    settings, pack, _ = KINDS[kind]
    owner = "model.layers.1.mlp.down_proj"
    save_packed(tmp_path, settings, pack)
    change(
        tmp_path,
        lambda tensors: {
            name: value for name, value in tensors.items() if name != f"{owner}.{part}"
        },
    )
    missing = f"{owner}.weight" if part in ("qweight", "weight_packed") else f"{owner}.{part}"
    with pytest.raises(MissingPrerequisiteError, match=f"in none of the files of .*: {missing}"):
        look(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_packed_are_compared_whole(kind: str, tmp_path: Path) -> None:
    settings, pack, _ = KINDS[kind]
    save_packed(tmp_path, settings, pack)
    norm = "model.layers.0.input_layernorm.weight"
    change(tmp_path, lambda tensors: {n: v[:-1] if n == norm else v for n, v in tensors.items()})
    with pytest.raises(
        MissingPrerequisiteError, match=f"another shape than its config.json: {norm} is"
    ):
        look(tmp_path)
    change(tmp_path, lambda tensors: {n: v for n, v in tensors.items() if n != norm})
    with pytest.raises(
        MissingPrerequisiteError, match=f"one weight of the model is in none .*: {norm}"
    ):
        look(tmp_path)
    change(tmp_path, lambda tensors: {f"module.{n}": v for n, v in tensors.items()})
    with pytest.raises(
        MissingPrerequisiteError, match="begin with 'module.', which torch's DataParallel"
    ):
        look(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"quant_method": "hqq"}, {**GPTQ, "checkpoint_format": "marlin"}]
)
def test_a_quantizer_whose_names_are_not_known_is_said_not_to_be_looked_through(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    save_packed(
        tmp_path,
        settings,
        lambda owner, weight: {f"{owner}.B": weight, f"{owner}.s": torch.ones(2)},
    )
    method = settings["quant_method"]
    assert look(tmp_path) == [
        f"weights: what the files lack was not looked for, because the names that {method} gives"
        " are not known here"
    ]


def test_packed_bytes_may_have_the_type_of_floats(tmp_path: Path) -> None:
    """So they can be cut into slices by programs that know floats only
    (``bnb_4bit_quant_storage``).
    """

    def stored_as_bf16(owner: str, weight: torch.Tensor) -> Tensors:
        packed = {f"{owner}.weight": torch.zeros(weight.numel() // 4, 1, dtype=torch.bfloat16)}
        return {**in_4_bits(owner, weight), **packed}

    settings = {**BNB4, "bnb_4bit_quant_storage": "bfloat16"}
    assert any(
        "by their names" in line for line in look(save_packed(tmp_path, settings, stored_as_bf16))
    )


def test_what_cannot_be_trained_on_packed_weights_is_refused(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, BNB4, in_4_bits)
    for tuner in ("full", "freeze"):
        with pytest.raises(
            ConfigError,
            match=rf"config: bitsandbytes\); tuner={tuner} could train only its norms",
        ):
            look(folder, tuner=tuner)
    with pytest.raises(ConfigError, match="which ZeRO 3 cannot partition: take zero=2"):
        look(folder, stage=3)
    for stage in (1, 2):
        look(folder, stage=stage)


@pytest.mark.parametrize(
    "settings", [FP8, {**PACKED, "format": "float-quantized"}, {"quant_method": "unheard of"}]
)
def test_8_bit_floats_lose_their_scales_in_training_and_are_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Under ZeRO 3 their numbers were once taken for the weights; in 16 bits DeepSpeed casts
    them.
    """
    with pytest.raises(
        ConfigError, match="which cannot be trained on: store the model in 16 bits first"
    ):
        look(save_packed(tmp_path, settings, in_fp8))


def test_slices_of_packed_weights_are_refused_on_the_ranks_too(tmp_path: Path) -> None:
    folder = save_packed(tmp_path, FP8, in_fp8)

    def never() -> Any:
        raise AssertionError("nothing is built")

    with pytest.raises(ConfigError, match="which ZeRO 3 cannot partition"):
        build_model(
            folder,
            ModelConfig(name_or_path="m"),
            Precision.fp32,
            "eager",
            WeightsTo(partitioned=never),
        )


@pytest.mark.parametrize(("pack", "kind"), [(in_fp8, "F8_E4M3"), (in_8_bits, "I8")])
def test_packed_numbers_in_a_folder_that_does_not_say_so_are_no_weights(
    pack: Pack, kind: str, tmp_path: Path
) -> None:
    """Such as one whose ``config.json`` was replaced by the original model's."""
    save_packed(tmp_path, None, pack)
    with pytest.raises(
        MissingPrerequisiteError,
        match=rf"holds packed numbers in the place of .*down_proj.weight \({kind}\)",
    ):
        look(tmp_path)


def test_small_floats_without_scales_are_weights(tmp_path: Path) -> None:
    save_packed(
        tmp_path, None, lambda owner, weight: {f"{owner}.weight": weight.to(torch.float8_e4m3fn)}
    )
    assert [line for line in look(tmp_path) if "tied by" not in line] == []
