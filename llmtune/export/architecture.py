"""Derive a model's task from its architecture: its loader, and its names at the hub and in peft."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.storage.plain_json import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A kind of answer."""

    hub: str
    """The hub's ``pipeline_tag``."""
    loader: str
    """Class of transformers."""
    ends: tuple[str, ...]
    """Ends of the names of architectures."""
    peft: str
    """peft's ``task_type``; empty where it has none."""
    mapping: str = ""
    """Table of transformers: ``model_type`` -> architecture, for tasks with a new head of peft."""
    heads: tuple[str, ...] = ()
    """Modules that peft adds to ``modules_to_save`` by itself; a model has one of them."""


TEXT = Task(
    hub="text-generation",
    loader="AutoModelForCausalLM",
    ends=("ForCausalLM", "LMHeadModel"),
    peft="CAUSAL_LM",
)
TEXT_TO_TEXT = Task(
    hub="text-generation",
    loader="AutoModelForSeq2SeqLM",
    ends=("ForConditionalGeneration",),
    peft="SEQ_2_SEQ_LM",
)
TEXT_CLASSES = Task(
    hub="text-classification",
    loader="AutoModelForSequenceClassification",
    ends=("ForSequenceClassification",),
    peft="SEQ_CLS",
    mapping="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    heads=("classifier", "score"),
)
TOKEN_CLASSES = Task(
    hub="token-classification",
    loader="AutoModelForTokenClassification",
    ends=("ForTokenClassification",),
    peft="TOKEN_CLS",
    mapping="MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    heads=("classifier", "score"),
)
ANSWERS = Task(
    hub="question-answering",
    loader="AutoModelForQuestionAnswering",
    ends=("ForQuestionAnswering",),
    peft="QUESTION_ANS",
    mapping="MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    heads=("qa_outputs",),
)
MASKED_WORDS = Task(hub="fill-mask", loader="AutoModelForMaskedLM", ends=("ForMaskedLM",), peft="")
STATES = Task(
    hub="feature-extraction", loader="AutoModel", ends=("Model",), peft="FEATURE_EXTRACTION"
)

#: ``LMHeadModel`` before ``Model``.
TASKS = (TEXT, TEXT_TO_TEXT, TEXT_CLASSES, TOKEN_CLASSES, ANSWERS, MASKED_WORDS, STATES)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a file of a model folder that holds an object; empty where it is not there.

    Raises:
        ValueError: It is no JSON.
    """
    file = folder / name
    config: dict[str, Any] = parse_json(file.read_text()) if file.is_file() else {}
    return config


def find_architecture(folder: Path) -> str:
    """Return the architecture that ``config.json`` names; empty where there is none."""
    named = read_config(folder).get("architectures")
    return str(named[0]) if named else ""


def headed_task(task_type: str | None) -> Task | None:
    """Return the task of an adapter for which peft trains a head; None for others.

    Args:
        task_type: Of ``adapter_config.json``.
    """
    return next((task for task in TASKS if task.heads and task.peft == task_type), None)


def task_of(architecture: str) -> Task | None:
    """Return the task of an architecture; None where its name does not tell."""
    return next((task for task in TASKS if architecture.endswith(task.ends)), None)


def is_renamed(folder: Path) -> bool:
    """Tell whether transformers translates the architecture's stored names (fused experts)."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    values = read_config(folder)
    # By class or by type: GPT-NeoX's head is named by its class only.
    kinds = [*(values.get("architectures") or ()), values.get("model_type")]
    return any(get_checkpoint_conversion_mapping(kind) for kind in kinds)
