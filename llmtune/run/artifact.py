"""Resolve and load the target of ``export``, ``eval``, ``predict`` and ``chat``.

A target is a run, a checkpoint, or a base with or without an adapter.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.checkpoint.find import find_checkpoints
from llmtune.config.cache_folder import open_cache
from llmtune.config.composed import Composed, with_overrides
from llmtune.config.schema import Config, Precision
from llmtune.config.stored import load_config
from llmtune.cpu_products import multiply_in_fp32
from llmtune.errors import CheckpointError, ConfigError
from llmtune.model.own_code import describe_own_code, explain_own_code
from llmtune.model.source import resolve_model_folder
from llmtune.model.task_folder import read_labels, resolve_task_folder
from llmtune.model.token_folder import resolve_base_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.plan.run_record import RunRecord
from llmtune.run.target import WEIGHTS_SHARE, Target
from llmtune.security.terminal import to_terminal
from llmtune.security.trust import read_foreign
from llmtune.storage import layout
from llmtune.storage.manifest import check_undamaged, is_complete
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.task.labels import Labels
from llmtune.task.task import AUTO, find_task
from llmtune.tuner.stored_adapter import read_adapter_config
from llmtune.tuner.tuner import TUNERS
from llmtune.varlen_attention import VARLEN

if TYPE_CHECKING:
    import torch

    from llmtune.model.nf4.nf4_model import In4Bits


def resolve_target(composed: Composed) -> Target:
    """Find what the command line names, and what it was trained to do.

    Raises:
        ConfigError: Two things are named at once.
        CheckpointError: There is nothing complete at that place.
    """
    target = _find_target(composed)
    model, record = target.config.model, RunRecord()
    task, labels = read_labels(target.model_folder)
    if target.run is not None:
        record = _read_record(target.run / layout.PLAN)
    if model.task == AUTO and labels.kind is not None:
        model = replace(model, task=task)
    if record.labels and labels.kind is not None:
        labels = replace(labels, weights=Labels.from_dict(record.labels).weights)
    return replace(target, config=replace(target.config, model=model), labels=labels)


def _find_target(composed: Composed) -> Target:
    given, config = composed.config.target, composed.config
    places = {"run": given.run, "checkpoint": given.checkpoint, "base": given.base}
    named = [key for key, place in places.items() if place]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(f'{key}=' for key in named)} exclude each other")
    if given.adapter and named not in (["base"], []):
        raise ConfigError(f"adapter= goes with base=, not with {named[0]}=")

    # A run: what it trained, or its newest checkpoint.
    if given.run:
        run = Path(given.run).expanduser()
        stored = _stored_config(run, run / layout.CONFIG)
        folder = trained_folder(run, stored)
        if not folder.resolve().is_relative_to(run.resolve()):
            raise CheckpointError(
                f"{folder} is a link that leads out of the run, to {folder.resolve()}; where that"
                f" is what you mean, say checkpoint={folder.resolve()}"
            )
        check_undamaged(folder, left_out=layout.is_state_file)
        return _from_stored(stored, composed, folder, run)

    # A checkpoint of llmtune, which may be outside of its run.
    if given.checkpoint:
        folder = Path(given.checkpoint).expanduser()
        if not is_complete(folder):
            raise CheckpointError(f"checkpoint={folder}: not a complete checkpoint")
        check_undamaged(folder, left_out=layout.is_state_file)
        stored = _stored_config(folder, folder / layout.CONFIG)
        return _from_stored(stored, composed, folder, folder.parent)

    # A base, with or without an adapter.
    if given.adapter and "model" in composed.unnamed:
        raise ConfigError(f"adapter={given.adapter} needs its base model: add base=MODEL")
    model = config.model
    if given.base:
        model = replace(model, name_or_path=given.base, wheel=None)
    folder = resolve_model_folder(model, open_cache(config.paths))
    adapter = Path(given.adapter).expanduser() if given.adapter else None
    return Target(
        config=config, model_folder=folder, adapter=adapter, run=None, base_name=model.name_or_path
    )


def _from_stored(stored: Config, composed: Composed, folder: Path, run: Path) -> Target:
    """Return the target as its stored configuration describes it, which may be anybody's.

    It says neither that code is run nor where this call keeps its files: the command line does.
    """
    place = composed.config.target.run or composed.config.target.checkpoint
    asks = f"the configuration in {place}" if stored.model.trust_remote_code else None
    plain = replace(
        stored, model=replace(stored.model, trust_remote_code=False), paths=composed.config.paths
    )
    return replace(from_trained(with_overrides(plain, composed), folder, run), code_asked_by=asks)


def load_model(target: Target) -> tuple[Any, Any]:
    """Load the model, with its adapter, in evaluation mode, on the GPUs if any, and its tokenizer.

    Raises:
        ConfigError: The model needs its own Python code, and the command line does not allow it.
        CheckpointError: The adapter cannot be read, or is another model's.
    """
    if target.config.model.trust_remote_code and (note := describe_own_code(target.model_folder)):
        sys.stderr.write(to_terminal(f"{note}\n"))
    tokenizer = load_target_tokenizer(target)
    with explain_own_code(target.model_folder, target.code_asked_by):
        model = _load_weights(target)
    if target.adapter is not None:
        model = load_peft_adapter(model, target.adapter)
    model.config.use_cache = True
    if model.device.type == "cpu" and model.dtype.itemsize == 2:
        multiply_in_fp32()
    if target.labels.kind is not None and model.config.pad_token_id is None:
        # A model that judges rows looks for their last token, which is the one before the padding.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_target_tokenizer(target: Target) -> Any:
    """Load the tokenizer of the adapter, which may have added tokens, or else the base's.

    Code is the base's alone.

    Raises:
        As :func:`load_model`.
    """
    from llmtune.data.tokenize.chat_template import load_chat_template

    folder, code_of = target.model_folder, None
    if target.adapter is not None and (target.adapter / "tokenizer.json").is_file():
        folder, code_of = target.adapter, target.model_folder
    template = load_chat_template(target.config.data.chat_template)
    with explain_own_code(folder, target.code_asked_by, of_adapter=code_of is not None):
        return load_tokenizer(folder, target.config.model, template, code_of)


def _load_weights(target: Target) -> Any:
    from transformers import AutoConfig

    from llmtune.model.build import WeightsTo, build_model
    from llmtune.plan.abilities import attention_kernels, resolve_attention
    from llmtune.plan.architecture.meta_model import build_meta_model
    from llmtune.plan.devices import gpus
    from llmtune.plan.devices.probe import resolve_accelerator

    config = target.config
    accelerator = resolve_accelerator(config.hardware.accelerator)
    capability = gpus.visible_gpus()[0].compute_capability if accelerator == "cuda" else 0
    trusted = config.model.trust_remote_code
    architecture = AutoConfig.from_pretrained(str(target.model_folder), trust_remote_code=trusted)
    task = find_task(config.model.task)
    kernels = attention_kernels(build_meta_model(architecture, trusted, task.model_class)[0])
    # Answers are made without borders; the kernel is SDPA then, for every architecture.
    if config.model.attn_implementation == VARLEN:
        kernels += (VARLEN,)
    attention = resolve_attention(config, accelerator, kernels, capability)
    places = (
        WeightsTo(device_map=place_weights(target.model_folder, config.precision))
        if accelerator == "cuda"
        else WeightsTo()
    )
    if target.adapter is not None and TUNERS.find(config.tuner.kind).needs_4_bits(config.tuner):
        places = WeightsTo(in_4_bits=_in_4_bits(config))
    return build_model(target.model_folder, config.model, config.precision, attention, places)


def _in_4_bits(config: Config) -> In4Bits:
    """Keep the layers in 4 bits that a training kept so, on the first GPU or on the host."""
    import torch

    from llmtune.model.nf4.nf4_model import In4Bits
    from llmtune.plan.devices.probe import resolve_accelerator

    accelerator = resolve_accelerator(config.hardware.accelerator)
    return In4Bits(
        double_quant=config.tuner.bnb_4bit_use_double_quant,
        device=torch.device(accelerator, 0) if accelerator != "cpu" else torch.device("cpu"),
        gather=lambda scales: scales,
    )


def place_weights(folder: Path, precision: Precision) -> Any:
    """Choose transformers' ``device_map``: the first GPU if the model fits, else all and the host.

    Args:
        precision: Of the weights once they are loaded; that of the files may be another.
    """
    import torch

    from llmtune.model.weights.files import read_entries

    device = torch.accelerator.current_accelerator()
    assert device is not None
    free, _ = torch.get_device_module(device).mem_get_info(0)
    weights = configured_dtype(precision.value).itemsize * sum(
        math.prod(entry.shape) for entry in read_entries(folder).values()
    )
    return {"": f"{device.type}:0"} if weights < WEIGHTS_SHARE * free else "auto"


def free_memory_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or of the host, in bytes."""
    import psutil
    import torch

    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.get_device_module(device).mem_get_info(device)[0])


def load_peft_adapter(model: Any, adapter: Path) -> Any:
    """Put an adapter on the model, in the model's dtype.

    Raises:
        CheckpointError: It cannot be read, or is another model's.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    # Before peft follows its settings.
    _check_token_rows(model, adapter, read_adapter_config(adapter))
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        # peft leaves out what does not match, and at most warns; once more, for what it says of it.
        found: Any = set_peft_model_state_dict(
            adapted, load_peft_weights(str(adapter), device="cpu")
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"adapter {adapter}: {str(error).splitlines()[0]}") from error

    # Matrices that are missing or left over are another model's.
    missing = [name for name in found.missing_keys if "lora_" in name]
    if wrong := [*missing, *found.unexpected_keys]:
        raise CheckpointError(
            f"adapter {adapter} is another model's: {len(missing)} of the matrices that its"
            f" settings announce are not in it, and {len(found.unexpected_keys)} of its tensors"
            f" have no place, such as {wrong[0]}"
        )
    return adapted


def _check_token_rows(model: Any, adapter: Path, settings: dict[str, Any]) -> None:
    """Refuse an adapter with rows of tokens that the model does not have."""
    indices = settings.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    last = max((int(token) for tokens in lists for token in tokens), default=-1)
    rows = model.get_input_embeddings().num_embeddings
    if last >= rows:
        raise CheckpointError(
            f"adapter {adapter} has rows of tokens up to {last}, and the model has {rows} rows;"
            " where training added tokens, name the run (run=), whose base has them"
        )


def from_trained(config: Config, folder: Path, run: Path) -> Target:
    """Return the target of a run: the adapter on its base, or the whole model, in ``folder``."""
    if not TUNERS.find(config.tuner.kind).has_adapter:
        return Target(
            config=config,
            model_folder=folder,
            adapter=None,
            run=run,
            base_name=config.model.name_or_path,
        )
    return Target(
        config=config,
        model_folder=_base_folder(config, run),
        adapter=folder,
        run=run,
        base_name=config.model.name_or_path,
    )


def _base_folder(config: Config, run: Path) -> Path:
    """The folder of the run's base: as in training, or as the configuration finds it now."""
    record = _read_record(run / layout.PLAN)
    noted, cache = record.model_folder, open_cache(config.paths)
    if noted is not None and noted.is_dir() and list(noted.glob("*.safetensors")):
        return noted
    base = resolve_base_folder(config.model, config.tuner.new_tokens, cache, lambda _: None)
    labels = Labels.from_dict(record.labels)
    tokenizer = load_tokenizer(base, config.model)
    return resolve_task_folder(
        base, config.model, labels, tokenizer, config.seed, cache, lambda _: None
    )


def _read_record(plan: Path) -> RunRecord:
    """Read ``plan.json``; the record is empty if a crash of the machine cut the file off.

    Raises:
        CheckpointError: The plan may not be opened.
    """
    if not plan.is_file():
        return RunRecord()
    try:
        return RunRecord.from_json(read_foreign(plan, CheckpointError))
    except ValueError:
        return RunRecord()


def trained_folder(run: Path, config: Config) -> Path:
    """Return the folder of the trained model, or an unfinished run's newest checkpoint."""
    result = layout.result_folder(run, TUNERS.find(config.tuner.kind).has_adapter)
    if is_complete(result):
        return result
    found = find_checkpoints(run)
    if not found:
        raise CheckpointError(f"run={run}: no trained model and no complete checkpoint in it")
    return found[-1]


def _stored_config(place: Path, file: Path) -> Config:
    if not file.is_file():
        raise CheckpointError(
            f"{place} is no run or checkpoint of llmtune (no {layout.CONFIG} in it); a model folder"
            " is base="
        )
    return load_config(file)
