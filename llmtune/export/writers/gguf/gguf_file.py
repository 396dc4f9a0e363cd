"""GGUF, the one file that llama.cpp, Ollama and LM Studio load, written as a stream.

The tensors and keys of an architecture follow llama.cpp's own converter.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFWriter

from llmtune.config.groups.export import ExportConfig, GgufType
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.folder import check_room
from llmtune.export.publish.shards import Journal
from llmtune.export.writers.gguf.gguf_hyperparameters import (
    add_settings,
    read_settings,
    rope_factors,
)
from llmtune.export.writers.gguf.gguf_tensors import GgufTensor, convert_tensors, plan_tensors
from llmtune.export.writers.gguf.gguf_vocabulary import (
    Vocabulary,
    add_vocabulary,
    read_vocabulary,
)
from llmtune.export.writers.model_files import copy_model_files, update_config
from llmtune.storage import layout
from llmtune.storage.atomic import flush
from llmtune.storage.hashing import hash_file

#: Room for the header: tokens, merges and the chat template.
_HEADER_BYTES = 64 << 20

#: Folder for configuration and tokenizer, which are read and then removed.
_MODEL_FILES_FOLDER = "companions.tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufContent:
    """Everything that the file holds, but the numbers."""

    architecture: str
    """llama.cpp's name."""
    settings: Any
    """transformers' configuration."""
    gguf_type: GgufType
    tensors: list[GgufTensor]
    vocabulary: Vocabulary
    notes: list[str]
    """Differences between llama.cpp and transformers, for the user to read."""

    @property
    def nbytes(self) -> int:
        """Size of the data of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def write_gguf(
    export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig
) -> None:
    """Write ``model-<type>.gguf``, and a ``Modelfile`` for Ollama.

    Numbers are rounded once, from what the source gives to the type in the file; ``export.dtype``
    plays no part.

    Raises:
        ExportError: llama.cpp has no such architecture, tensor, rope scaling or tokenizer, or would
            read it differently.
    """
    file = folder / f"model-{config.gguf_type.value}.gguf"
    content = _plan_content(export_model, folder / _MODEL_FILES_FOLDER, config.gguf_type)
    for note in content.notes:
        export_model.request.say(f"{file.name}: {note}")
    if file.name not in journal.entries:
        check_room(folder, content.nbytes + _HEADER_BYTES)
        _write_file(file, export_model, content)
        flush(file)
        journal.note(file.name, hash_file(file))
    else:
        export_model.request.progress.total(journal.entries[file.name]["size"])
        export_model.request.progress.done(journal.entries[file.name]["size"])
    modelfile = _modelfile(file.name, content.vocabulary.stops, content.notes)
    (folder / "Modelfile").write_text(modelfile, encoding="utf-8")


def _plan_content(export_model: ExportModel, model_files: Path, gguf_type: GgufType) -> GgufContent:
    """Read the merged model's configuration and tokenizer in a temporary folder."""
    shutil.rmtree(model_files, ignore_errors=True)
    model_files.mkdir()
    try:
        copy_model_files(export_model.model_files, model_files)
        update_config(model_files, None, export_model.config_changes)
        settings, architecture = read_settings(model_files)
        tensors, notes = plan_tensors(export_model.source, settings, architecture, gguf_type)
        rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
        vocabulary = read_vocabulary(model_files, rows)
    finally:
        shutil.rmtree(model_files)
    notes += vocabulary.notes
    window = getattr(settings, "sliding_window", None)
    if window:
        notes.append(
            f"llama.cpp looks at the whole text, where the model has a window of {window} tokens"
        )
    return GgufContent(
        architecture=architecture,
        settings=settings,
        gguf_type=gguf_type,
        tensors=tensors,
        vocabulary=vocabulary,
        notes=notes,
    )


def _write_file(file: Path, export_model: ExportModel, content: GgufContent) -> None:
    """Write the keys, the tensors' names and offsets, and then the tensors one after the other."""
    # Keys.
    writer = GGUFWriter(file, content.architecture)
    _add_general_keys(writer, export_model)
    add_settings(writer, content.settings, content.gguf_type)
    writer.add_vocab_size(len(content.vocabulary.tokens))
    add_vocabulary(writer, content.vocabulary)

    # Names, shapes and offsets.
    frequencies = rope_factors(content.settings)
    if frequencies is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes
        )
    for tensor in content.tensors:
        # The dtype of the array plays no part where the type in the file is named.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
        )

    # Data, each tensor padded to the file's alignment.
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out, progress = writer.fout[0], export_model.request.progress
        progress.total(content.nbytes)
        writer.write_padding(out, out.tell())
        if frequencies is not None:
            frequencies.tofile(out)
        for data in convert_tensors(export_model.source, content.tensors):
            if data is None:
                writer.write_padding(out, out.tell())
                continue
            data.tofile(out)
            progress.done(data.nbytes)
        writer.write_padding(out, out.tell())
    finally:
        writer.close()


def _add_general_keys(writer: GGUFWriter, export_model: ExportModel) -> None:
    output = export_model.request.output
    writer.add_type("model")
    is_default_folder = output == layout.export_folder(output.parent, "gguf")
    writer.add_name(output.parent.name if is_default_folder else output.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, export_model.request.base_name)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _modelfile(name: str, stops: list[str], notes: list[str]) -> str:
    """Return the text for ``ollama create``; the chat template is in the GGUF file."""
    lines = [f"# {note}" for note in notes] + [f"FROM ./{name}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n"
