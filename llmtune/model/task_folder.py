"""A model folder with the head that a task needs, made of a base model's folder.

The base's files are linked, or copied where the disk cannot link them, and a small file holds the
head, which is drawn once. So every rank, every restart and every placement begins with the same
head, and whatever reads a model folder reads this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.config.groups.model import ModelConfig
from llmtune.draws import Draw, torch_seed
from llmtune.errors import ConfigError
from llmtune.model.folders.linked import link_base, write_index
from llmtune.model.source import make_once
from llmtune.model.weights.files import identify_weights, read_entries
from llmtune.plan.architecture.corrected_architecture import correct_architecture
from llmtune.storage.hashing import short_hash
from llmtune.storage.plain_json import parse_json
from llmtune.task.labels import LabelKind, Labels
from llmtune.task.task import Task, find_task

#: Part of the cache key; raise it when a head is drawn or stored differently.
HEAD_VERSION = 2

#: The file with the head. Its name comes after those of the base's files, so that its tensors
#: replace a head of the base.
_HEAD = "head.safetensors"

_CONFIG = "config.json"


def resolve_task_folder(
    base: Path,
    config: ModelConfig,
    labels: Labels,
    tokenizer: Any,
    seed: int,
    cache_dir: Path,
    say: Callable[[str], None],
) -> Path:
    """Return the model folder of a task; for language modeling, the base itself.

    Args:
        base: Folder with safetensors, config and tokenizer.
        labels: What the head tells apart.
        tokenizer: The model's; a model that judges rows must know its padding token.
        say: Told what is worth a line.

    Raises:
        ConfigError: transformers has no such head for the architecture, or the model has one for
            other classes.
        MissingPrerequisiteError: The files lack more than the head.
    """
    task = find_task(config.task)
    if labels.kind is None:
        return base
    stored: dict[str, Any] = parse_json((base / _CONFIG).read_text())
    changes = correct_architecture(base)
    stored |= changes
    architecture = _find_class(task, stored, config.name_or_path)
    settings = {
        **task.head_settings(labels),
        "architectures": [architecture],
        "pad_token_id": tokenizer.pad_token_id,
    }
    is_headed = architecture in (stored.get("architectures") or ())
    if is_headed and not config.new_head:
        check_head(stored, labels, config.name_or_path)
        is_same = all(_plain(stored.get(key)) == _plain(value) for key, value in settings.items())
        if is_same and not changes:
            return base
    keeps_head = is_headed and not config.new_head
    identity = [HEAD_VERSION, identify_weights(base), _plain(settings), keeps_head, seed]
    name = f"{base.name[:40]}-{task.name}-{short_hash(json.dumps(identity).encode())}"

    def make(folder: Path) -> None:
        link_base(base, folder, stored | settings, say)
        _add_head(folder, task, config.name_or_path, seed, keeps_head, say)

    return make_once(cache_dir / "models" / name, make)


def read_labels(folder: Path) -> tuple[str, Labels]:
    """Read what a model folder is trained to do: the name of its task, and its labels.

    A folder of another architecture, or of none, is a language model.
    """
    file = folder / _CONFIG
    stored: dict[str, Any] = parse_json(file.read_text()) if file.is_file() else {}
    architecture = str((stored.get("architectures") or [""])[0])
    names = tuple(_stored_names(stored))
    if architecture.endswith("ForTokenClassification"):
        return "token_classification", Labels(kind=LabelKind.tags, names=names)
    if not architecture.endswith("ForSequenceClassification"):
        return "causal_lm", Labels()
    # transformers takes one output without a name of the problem for a number.
    problem = stored.get("problem_type") or ("regression" if len(names) == 1 else "")
    if problem == "regression":
        return "regression", Labels(kind=LabelKind.value, names=names)
    several = problem == "multi_label_classification"
    kind = LabelKind.names if several else LabelKind.name
    return "sequence_classification", Labels(kind=kind, names=names)


def check_head(stored: dict[str, Any], labels: Labels, name: str) -> None:
    """Refuse a model whose head tells other classes apart than the rows have.

    Args:
        stored: The model's configuration.

    Raises:
        ConfigError: With the classes that differ.
    """
    classes = _stored_names(stored)
    count = len(labels.names)
    if len(classes) == count and (_are_generic(classes) or set(classes) == set(labels.names)):
        return
    other = sorted(set(labels.names) - set(classes))
    what = f"has no {', '.join(other[:4])}" if other else f"tells {len(classes)} apart, not {count}"
    if labels.kind is LabelKind.value:
        what = f"has {len(classes)} outputs, and the rows have {count} numbers"
    raise ConfigError(
        f"model.name_or_path={name} has a head for {', '.join(classes[:6])}, which {what}; correct"
        " the labels, or take model.new_head=true for a new head"
    )


def order_names(stored: dict[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Put the names of classes into the order of a model that has the same ones."""
    classes = _stored_names(stored)
    if len(classes) > len(names) or set(classes) != set(names):
        return names
    return tuple(classes)


def _stored_names(stored: dict[str, Any]) -> list[str]:
    names = stored.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [str(names[key]) for key in sorted(names, key=int)]


def _are_generic(names: list[str]) -> bool:
    return names == [f"LABEL_{index}" for index in range(len(names))]


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _find_class(task: Task, stored: dict[str, Any], name: str) -> str:
    """Find transformers' class of a task for the architecture of a folder.

    Raises:
        ConfigError: It has none.
    """
    import transformers

    kind = str(stored.get("model_type"))
    config_class = type(transformers.AutoConfig.for_model(kind))
    model_class: Any = getattr(transformers, task.model_class)._model_mapping.get(
        config_class, default=None
    )
    if model_class is None:
        raise ConfigError(
            f"model.name_or_path={name}: transformers has no {task.title} for its architecture"
            f" ({kind}); take another model, or another model.task"
        )
    return str(model_class.__name__)


def _add_head(
    folder: Path,
    task: Task,
    name: str,
    seed: int,
    keeps_head: bool,
    say: Callable[[str], None],
) -> None:
    """Draw what the base's files lack of the head, and write it beside them.

    Raises:
        MissingPrerequisiteError: They lack more.
    """
    from safetensors.torch import save_file

    from llmtune.model.skeleton import build_skeleton
    from llmtune.model.weights.check import compare_weights

    model = build_skeleton(folder)
    heads = () if keeps_head else tuple(f"{module}." for module in task.head_modules(model))
    report = compare_weights(model, folder)
    missing = {one for one in report.missing if one.startswith(heads) or ".pooler." in one}
    # A head for other classes, which the new one replaces.
    missing |= {one for one, _ in model.named_parameters() if one.startswith(heads)}
    reshaped = tuple(text for text in report.reshaped if not text.startswith(heads))
    others = tuple(one for one in report.missing if one not in missing)
    replace(report, missing=others, reshaped=reshaped).refuse(name, folder)
    unused = tuple(one for one in report.unused if not one.startswith(("cls.", "lm_head.")))
    for note in replace(report, missing=(), unused=unused).notes():
        say(note)
    entries = read_entries(folder)
    dtype = next(entry.dtype for entry in entries.values() if entry.dtype.is_floating_point)
    tensors = {one: tensor.to(dtype) for one, tensor in draw_weights(model, missing, seed).items()}
    if tensors:
        save_file(tensors, folder / _HEAD, metadata={"format": "pt"})
        say(
            f"{task.title}: a new head of {sum(map(len, tensors.values())):,} rows"
            f" ({', '.join(sorted(tensors))}), drawn with seed={seed}"
        )
    index = {one: entry.file.name for one, entry in entries.items()}
    write_index(folder, {**index, **dict.fromkeys(tensors, _HEAD)})


def draw_weights(model: Any, names: set[str], seed: int) -> dict[str, Any]:
    """Draw parameters as the architecture initializes them, in fp32.

    Args:
        model: A skeleton; its modules that own the parameters become real.
        names: The parameters.
    """
    import torch

    owners = sorted({one.rpartition(".")[0] for one in names})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, Draw.head))
        for owner in owners:
            module = model.get_submodule(owner)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    zeros = torch.zeros(parameter.shape)
                    module._parameters[key] = torch.nn.Parameter(zeros)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            model._init_weights(module)
    return {one: model.get_parameter(one).detach().clone() for one in sorted(names)}
