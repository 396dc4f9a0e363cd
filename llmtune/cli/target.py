"""What ``export``, ``eval`` and ``chat`` work on: a run, a checkpoint, or a base with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.checkpoint import names
from llmtune.checkpoint.find import find_checkpoints, is_complete
from llmtune.checkpoint.manifest import check_undamaged
from llmtune.cli.prepare import cache_dir
from llmtune.config.compose import Composed, with_overrides
from llmtune.config.schema import Config, TunerKind
from llmtune.config.stored import load_config
from llmtune.errors import CheckpointError, ConfigError
from llmtune.model.files import resolve_model_folder
from llmtune.model.stored_adapter import read_adapter_config
from llmtune.plain_json import parse_json

if TYPE_CHECKING:
    import torch

#: Of a GPU's free memory; the rest is for activations and the cache of an answer.
WEIGHTS_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Target:
    """A model on disk."""

    config: Config
    """The run's configuration with the command line on top, or the command line's."""
    model_folder: Path
    """Weights, configuration, tokenizer."""
    adapter: Path | None
    run: Path | None
    base_name: str


def resolve_target(composed: Composed) -> Target:
    """Find what the command line names.

    Raises:
        ConfigError: Two things are named at once.
        CheckpointError: There is nothing complete at that place.
    """
    given = composed.config
    places = {"run": given.run, "checkpoint": given.checkpoint.path, "base": given.base}
    named = [key for key, place in places.items() if place]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(f'{key}=' for key in named)} exclude each other")
    if given.adapter and named not in (["base"], []):
        raise ConfigError(f"adapter= goes with base=, not with {named[0]}=")
    if given.run:
        run = Path(given.run).expanduser()
        stored = _stored_config(run, run / names.CONFIG)
        folder = trained_folder(run, stored)
        check_undamaged(folder, left_out=names.is_state_file)
        return from_trained(with_overrides(stored, composed), folder, run)
    if given.checkpoint.path:
        folder = Path(given.checkpoint.path).expanduser()
        if not is_complete(folder):
            raise CheckpointError(f"checkpoint={folder}: not a complete checkpoint")
        check_undamaged(folder, left_out=names.is_state_file)
        stored = _stored_config(folder, folder / names.CONFIG)
        return from_trained(with_overrides(stored, composed), folder, folder.parent)
    if given.adapter and "model" in composed.unnamed:
        raise ConfigError(f"adapter={given.adapter} needs its base model: add base=MODEL")
    model = replace(given.model, name_or_path=given.base, wheel=None) if given.base else given.model
    folder = resolve_model_folder(model, cache_dir(given))
    adapter = Path(given.adapter).expanduser() if given.adapter else None
    return Target(given, folder, adapter, None, model.name_or_path)


def load_model(target: Target) -> tuple[Any, Any]:
    """Model (adapter put on, evaluation mode, on the GPUs if there are any) and tokenizer."""
    from transformers import AutoConfig

    from llmtune.data.templates import check_chat_template, load_chat_template
    from llmtune.model.build import WeightsTo, build_model
    from llmtune.model.tokenizer import load_tokenizer
    from llmtune.plan.abilities import attention_kernels
    from llmtune.plan.hardware import resolve_accelerator
    from llmtune.plan.resolve import resolve_attention
    from llmtune.plan.shape import build_meta_model

    config = target.config
    tokenizer_folder = target.adapter if target.adapter and (target.adapter / "tokenizer.json").is_file() else None
    tokenizer = load_tokenizer(
        tokenizer_folder or target.model_folder, config.model, load_chat_template(config.data.chat_template)
    )
    check_chat_template(tokenizer, target.base_name)
    accelerator = resolve_accelerator(config.hardware.accelerator)
    trusted = config.model.trust_remote_code
    architecture = AutoConfig.from_pretrained(str(target.model_folder), trust_remote_code=trusted)
    attention = resolve_attention(config, accelerator, attention_kernels(build_meta_model(architecture, trusted)[0]))
    places = WeightsTo(place_weights(target.model_folder)) if accelerator == "cuda" else WeightsTo()
    model = build_model(target.model_folder, config.model, config.precision, False, attention, places)
    if target.adapter is not None:
        model = put_on(model, target.adapter)
    model.config.use_cache = True
    return model.eval(), tokenizer


def place_weights(folder: Path) -> Any:
    """transformers' ``device_map``: the first GPU where the model fits into it, else all of them, and the host for the rest."""
    import torch

    device = torch.accelerator.current_accelerator()
    assert device is not None
    free, _ = torch.get_device_module(device).mem_get_info(0)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"": f"{device.type}:0"} if weights < WEIGHTS_SHARE * free else "auto"


def free_memory_bytes(device: torch.device) -> int:
    """Of a GPU, or of the host."""
    import psutil
    import torch

    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def put_on(model: Any, adapter: Path) -> Any:
    """The model with an adapter, in the model's dtype.

    Raises:
        CheckpointError: It cannot be read, or is another model's.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    # Before peft follows them: it matches their patterns with every module.
    read_adapter_config(adapter)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        # peft leaves out what does not match, and at most warns; once more, for what it says of it.
        found: Any = set_peft_model_state_dict(adapted, load_peft_weights(str(adapter), device="cpu"))
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"adapter {adapter}: {str(error).splitlines()[0]}") from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if wrong := [*missing, *found.unexpected_keys]:
        raise CheckpointError(
            f"adapter {adapter} is another model's: {len(missing)} of the matrices that its settings announce are not in it, "
            f"and {len(found.unexpected_keys)} of its tensors have no place, such as {wrong[0]}"
        )
    return adapted


def from_trained(config: Config, folder: Path, run: Path) -> Target:
    """What was trained: an adapter on its base, or the whole model in ``folder``."""
    if config.tuner.kind is TunerKind.full:
        return Target(config, folder, None, run, config.model.name_or_path)
    return Target(config, _base_folder(config, run), folder, run, config.model.name_or_path)


def _base_folder(config: Config, run: Path) -> Path:
    """Where the run's base lies: where it lay in training, or wherever the configuration finds it now."""
    plan = run / names.PLAN
    if plan.is_file():
        folder = Path(parse_json(plan.read_text()).get("model_folder", ""))
        if folder.is_dir() and list(folder.glob("*.safetensors")):
            return folder
    return resolve_model_folder(config.model, cache_dir(config))


def trained_folder(run: Path, config: Config) -> Path:
    """The final result, or the newest checkpoint of a run that is not finished."""
    result = run / (names.ADAPTER if config.tuner.kind is TunerKind.lora else names.MODEL)
    if is_complete(result):
        return result
    found = find_checkpoints(run)
    if not found:
        raise CheckpointError(f"run={run}: no trained model and no complete checkpoint in it")
    return found[-1]


def _stored_config(place: Path, file: Path) -> Config:
    if not file.is_file():
        raise CheckpointError(
            f"{place} is no run or checkpoint of llmtune (no {names.CONFIG} in it); a model folder is base="
        )
    return load_config(file)
