"""Verify an export before it is published: others can load it, and it computes what was trained."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ConfigError, ExportError
from llmtune.export.architecture import (
    TEXT,
    TEXT_TO_TEXT,
    find_architecture,
    is_renamed,
    read_config,
    task_of,
)
from llmtune.export.export_model import ExportModel, find_dtype
from llmtune.export.formats.format import find_format
from llmtune.export.sources.tensor_source import (
    RenamedSource,
    RetypedSource,
    SafetensorsSource,
    TensorSource,
    find_name,
    is_embedding,
    is_input_embedding,
    usual_dtype,
)
from llmtune.export.verify.parity import (
    ComparedModels,
    Parity,
    compare_weights,
    measure_parity,
    measure_parity_in_memory,
    probe_tokens,
)
from llmtune.export.writers.model_files import copy_model_files, has_tokenizer, update_config
from llmtune.model.skeleton import build_skeleton, tied_aliases
from llmtune.template_bounds import bounded_template, refuse_powers
from llmtune.template_errors import TEMPLATE_ERRORS, describe_template_error
from llmtune.units import format_bytes, some

#: Memory for comparing in memory, in sizes of the model in fp32: two models, and activations.
_MEMORY_FACTOR = 3


def verify_written_folder(
    export_model: ExportModel, folder: Path, config: ExportConfig
) -> Parity | None:
    """Verify a model folder that was written and is not published yet.

    Returns:
        None where there was nothing to compare.

    Raises:
        ExportError: Serving programs would refuse it, or it is another model.
    """
    return _verify(export_model, folder, SafetensorsSource(folder), config)


def verify_merged_model(export_model: ExportModel, config: ExportConfig) -> Parity | None:
    """Verify the tensors of a model that will be written in a format transformers cannot read.

    Raises:
        ExportError: As :func:`verify_written_folder`.
    """
    kind = find_format(config.format)
    with tempfile.TemporaryDirectory(prefix="llmtune-") as name:
        folder = Path(name)
        copy_model_files(export_model.model_files, folder)
        update_config(folder, export_model.dtype, export_model.config_changes)
        dtype = find_dtype(kind.compared_dtype(config))
        # Such a file is made of fp32 numbers that were never rounded to the base's dtype.
        source = export_model.source if dtype is None else RetypedSource(export_model.source, dtype)
        return _verify(export_model, folder, source, config, kind.quantization(config))


def _verify(
    export_model: ExportModel,
    folder: Path,
    source: TensorSource,
    config: ExportConfig,
    quantized: str | None = None,
) -> Parity | None:
    say = export_model.request.say

    # Other programs must be able to load it.
    problems, notes = find_serving_problems(folder, source)
    if problems:
        raise ExportError(
            f"what was to be published cannot be served: {len(problems)} problems:"
            f" {some(problems, 6)}; nothing was published"
        )
    for note in notes:
        say(f"note: {note}")

    dtype = usual_dtype(source)
    if not config.parity or not export_model.computed or dtype is None:
        return None

    # It must be base and adapter. The logits are compared if both models can be run here.
    tokens = probe_tokens(_tokenizer(folder), _rows(source), _trained_tokens(export_model))
    models = ComparedModels(
        base_folder=export_model.request.base,
        base=export_model.base,
        adapter=export_model.adapter,
        merged_folder=folder,
        merged=source,
        base_changes=export_model.base_changes,
    )
    if not is_renamed(folder):
        parity = measure_parity(models, tokens, dtype, config.parity_bound)
    elif (obstacle := _find_obstacle(export_model, folder)) is None:
        parity = measure_parity_in_memory(models, tokens, dtype, config.parity_bound)
    else:
        parity = compare_weights(models, dtype)
        say(f"note: the logits of this architecture are not compared: {obstacle}")
    parity = replace(parity, quantized=quantized)
    say(f"parity: {parity.describe()}")
    if parity.loss_note is not None:
        say(f"note: {parity.loss_note}")
    return parity


def _tokenizer(folder: Path) -> Any:
    """Load the tokenizer; None where there is none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _rows(source: TensorSource) -> int:
    """Return the number of rows of the first embedding, which all token ids are below."""
    rows = [spec.shape[0] for name, spec in source.specs.items() if is_input_embedding(name)]
    if not rows:
        raise ExportError(
            "parity: no embedding of tokens was found, so no text can be tried; export.parity=false"
            " leaves it out"
        )
    return rows[0]


def _trained_tokens(export_model: ExportModel) -> list[int]:
    """Return tokens whose rows the adapter trained one by one, or added to the vocabulary."""
    adapter = export_model.adapter
    if adapter is None:
        return []
    trained = {row for module in adapter.modules for row in adapter.token_indices(module)}
    before, after = _rows(export_model.base), _rows(export_model.source)
    return sorted(trained) + list(range(before, after))


def _find_obstacle(export_model: ExportModel, folder: Path) -> str | None:
    """Find out why base and merged model cannot be loaded into memory; None if they can.

    Models whose stored names transformers translates cannot be streamed.
    """
    if not any(folder.glob("*.safetensors")):
        return "it can be loaded from safetensors only"
    base = export_model.base
    if isinstance(base, RenamedSource):
        base = base.source
    if export_model.base_changes or (
        export_model.adapter is not None and not isinstance(base, SafetensorsSource)
    ):
        return "its base is not in a folder that can be loaded"
    count = sum(spec.nbytes // spec.dtype.itemsize for spec in export_model.source.specs.values())
    needed = _MEMORY_FACTOR * count * torch.float32.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        return (
            f"they need the whole model in memory, {format_bytes(needed)} of {format_bytes(free)}"
            " that are free"
        )
    return None


_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def find_serving_problems(folder: Path, source: TensorSource) -> tuple[list[str], list[str]]:
    """Examine a model folder as a serving program would load it.

    Args:
        folder: Holds ``config.json``, tokenizer and generation settings.
        source: The tensors that are, or are going to be, beside them.

    Returns:
        Problems, with which a program that loads the folder would refuse it or compute something
        else; and notes, with which it can be served, but which the user should know.

    Raises:
        ExportError: There is no ``config.json``.
    """
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder.name}: no config.json, so that nothing can load the weights; give base= its"
            " model folder"
        )
    notes: list[str] = []
    problems = find_tensor_mismatches(folder, source)
    problems += _find_token_problems(folder, source, notes)
    return problems, notes


def find_tensor_mismatches(folder: Path, source: TensorSource) -> list[str]:
    """Find tensors that the architecture lacks, that are missing, or that have another shape.

    Architectures whose stored names transformers translates are not examined.
    """
    if is_renamed(folder):
        return []
    model = build_skeleton(folder)
    aliases = tied_aliases(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [*parameters, *dict(model.named_buffers())]
    stored = {name: find_name(name, source.specs) for name in names}

    # Parameters without a tensor, or with one of another shape.
    problems = []
    for name in sorted(parameters):
        shape = tuple(parameters[name].shape)
        tensor = stored[name]
        if tensor is None:
            if not any(stored.get(other) for other in aliases.get(name, ())):
                problems.append(f"{name} is missing")
        elif source.specs[tensor].shape != shape:
            problems.append(f"{name} is {source.specs[tensor].shape}, config.json makes it {shape}")

    # Tensors without a parameter, but those that transformers ignores: buffers that older versions
    # stored, such as rotary frequencies and position numbers.
    ignored = ("inv_freq", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    for name in sorted(source.specs.keys() - set(stored.values())):
        is_ignored = any(part in name for part in ignored)
        if source.specs[name].dtype.is_floating_point and not is_ignored:
            problems.append(f"{name} is not in the architecture")
    return problems


def _find_token_problems(folder: Path, source: TensorSource, notes: list[str]) -> list[str]:
    """Examine vocabulary, special ids and chat template; add to the notes."""
    config = read_config(folder)
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    if vocabulary is None:
        return []
    problems = []
    rows = {spec.shape[0] for name, spec in source.specs.items() if is_embedding(name)}
    if rows - {vocabulary}:
        problems.append(
            f"config.json has vocab_size {vocabulary}, the embeddings have {sorted(rows)} rows"
        )
    for file in ("config.json", "generation_config.json"):
        values = read_config(folder, file)
        for key in _SPECIAL:
            ids = values.get(key)
            tokens = ids if isinstance(ids, list) else [ids]
            problems += [
                f"{file}: {key} {token} is outside the vocabulary of {vocabulary}"
                for token in tokens
                if token is not None and not -1 <= token < vocabulary
            ]
    if not has_tokenizer(folder):
        notes.append("there is no tokenizer: programs that serve it need one beside the weights")
        return problems
    return problems + _find_tokenizer_problems(folder, vocabulary, notes)


def _find_tokenizer_problems(folder: Path, vocabulary: int, notes: list[str]) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        return [f"the tokenizer cannot be loaded ({str(error).splitlines()[0]})"]
    problems = []

    # Ids and rows of the embedding.
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        problems.append(
            f"the tokenizer knows token {largest}, the model has {vocabulary} rows: resize the"
            " embeddings in training"
        )
    elif largest + 1 < vocabulary:
        notes.append(
            f"{vocabulary - largest - 1} rows behind the tokenizer's {largest + 1} tokens are never"
            " used"
        )
    if task_of(find_architecture(folder)) not in (TEXT, TEXT_TO_TEXT):
        return problems
    if tokenizer.eos_token_id is None:
        notes.append(
            "the tokenizer names no end-of-text token: answers end only at their longest length"
        )
    if tokenizer.chat_template is None:
        notes.append(
            "there is no chat template: vLLM and llama.cpp can complete texts, and not chat"
        )
    else:
        problems += _find_template_problems(tokenizer)
    return problems


def _find_template_problems(tokenizer: Any) -> list[str]:
    try:
        refuse_powers(str(tokenizer.get_chat_template()))
        with bounded_template():
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
            )
    except (*TEMPLATE_ERRORS, ConfigError) as error:
        return [
            f"the chat template fails on a question of a user ({describe_template_error(error)})"
        ]
    return [] if "Hello" in str(text) else ["the chat template leaves out what a user asks"]
