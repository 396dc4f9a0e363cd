"""ONNX and TorchScript: a model as a graph that runs without transformers, checked against
transformers before it is kept.
"""

from __future__ import annotations

import importlib
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.errors import ExportError, MissingPrerequisiteError
from llmtune.export.model import ExportModel
from llmtune.export.publish.folder import check_room
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.base import Retyped
from llmtune.export.writers.graph.model import (
    GraphModel,
    Run,
    compare_graph,
    find_loader,
    first_line,
    load_graph_model,
    make_checks,
    make_example,
    refusing,
)
from llmtune.export.writers.model_files import (
    copy_companions,
    update_config,
    update_generation_config,
)
from llmtune.process import hold_interruptions
from llmtune.units import format_count

ONNX_FILE = "model.onnx"
TORCHSCRIPT_FILE = "model.ts.pt"

#: Writing a graph takes one to three times its size in memory: up to 36 GB here.
MOST_PARAMETERS = 3_000_000_000
#: A protobuf ends at 2 GiB; the weights of a larger model go into a file beside it.
_MOST_IN_ONE_FILE_BYTES = 1_900_000_000

_WEIGHTS = "weights.tmp"
_TRACED = "traced.tmp"


def write_onnx(
    export_model: ExportModel, folder: Path, _journal: Journal, config: ExportConfig
) -> None:
    """``model.onnx`` in fp32 with any batch size and length, beside tokenizer and configuration.

    Raises:
        ExportError: The model is no encoder or small decoder, or the graph does not compute what
            transformers does.
        MissingPrerequisiteError: A package of the extra ``onnx`` is missing.
    """
    import_onnx()
    file = folder / ONNX_FILE
    model = _prepare(export_model, folder, config)
    with refusing(model, "ONNX"):
        checks = make_checks(model)
        _export_onnx(model, file, export_model)
    names, output = model.inputs, model.output
    # What the check needs was computed; the session makes a copy of the weights.
    del model
    compare_graph(_open_onnx(file, names, output), checks, ONNX_FILE)


def import_onnx() -> None:
    """The packages that write a graph and run it.

    Raises:
        MissingPrerequisiteError: One is missing.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingPrerequisiteError(
                f'export=onnx needs {package} ({error}): pip install "llmtune[onnx]"'
            ) from error


def check_size(parameters: int) -> None:
    """
    Raises:
        ExportError: There are too many for a graph.
    """
    if parameters > MOST_PARAMETERS:
        raise ExportError(
            f"a graph is made of the whole model in memory, and {format_count(parameters)}"
            f" parameters are more than {format_count(MOST_PARAMETERS)}; take export=gguf or"
            " export=safetensors"
        )


def write_torchscript(
    export_model: ExportModel, folder: Path, _journal: Journal, config: ExportConfig
) -> None:
    """``model.ts.pt`` in fp32, which torch.jit.load reads, beside tokenizer and configuration.

    Raises:
        ExportError: The model is no encoder or small decoder, or the graph does not compute what
            transformers does.
    """
    file = folder / TORCHSCRIPT_FILE
    model = _prepare(export_model, folder, config)
    with refusing(model, "TorchScript"):
        checks = make_checks(model)
        with hold_interruptions():
            traced: Any = torch.jit.trace(model, make_example(model), check_trace=False)
        traced.save(str(folder / _TRACED))
        _copy_program(folder / _TRACED, file)
    del model, traced
    with torch.no_grad():
        loaded: Any = torch.jit.load(str(file))
        compare_graph(lambda inputs: loaded(*inputs), checks, TORCHSCRIPT_FILE)


def _prepare(export_model: ExportModel, folder: Path, config: ExportConfig) -> GraphModel:
    """Write what stays beside the graph, and load the model from a folder that does not stay."""
    if config.dtype not in (ExportDtype.auto, ExportDtype.fp32):
        raise ExportError(
            f"export.dtype={config.dtype.value}: graphs are written in fp32; take"
            " export.dtype=auto, or export=safetensors for another dtype"
        )
    count = sum(math.prod(spec.shape) for spec in export_model.source.specs.values())
    check_size(count)
    check_room(folder, 2 * 4 * count)
    copy_companions(export_model.model_files, folder)
    update_config(folder, torch.float32, export_model.config_changes)
    loader, architecture = find_loader(folder)
    weights = folder / _WEIGHTS
    weights.mkdir(exist_ok=True)
    # In fp32 a merged weight is not rounded at all.
    source = Retyped(export_model.source, torch.float32)
    write_shards(
        source,
        weights,
        config.max_shard_bytes,
        Journal(weights, _WEIGHTS),
        export_model.request.progress,
    )
    copy_companions([folder], weights)
    try:
        model = load_graph_model(weights, loader, architecture)
    finally:
        shutil.rmtree(weights)
    update_generation_config(folder)
    return model


def _copy_program(traced: Path, file: Path) -> None:
    """All of a program but the lines of code that it was traced from, which name this machine's
    folders.
    """
    reader: Any = torch._C.PyTorchFileReader(str(traced))
    writer: Any = torch._C.PyTorchFileWriter(str(file))
    for name in reader.get_all_records():
        # The writer adds the other two by itself.
        if not name.endswith(".debug_pkl") and name not in ("version", ".data/serialization_id"):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    traced.unlink()


def _export_onnx(model: GraphModel, file: Path, export_model: ExportModel) -> None:
    import onnx

    axes = {0: "batch", 1: "sequence"}
    with hold_interruptions():
        program = torch.onnx.export(
            model,
            make_example(model),
            dynamo=True,
            input_names=list(model.inputs),
            output_names=[model.output],
            dynamic_shapes=dict.fromkeys(model.inputs, axes),
            verbose=False,
        )
    assert program is not None
    # Each node carries the lines of code that it came from, with the paths of this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    nbytes = 4 * sum(math.prod(spec.shape) for spec in export_model.source.specs.values())
    program.save(str(file), external_data=nbytes > _MOST_IN_ONE_FILE_BYTES)
    onnx.checker.check_model(str(file), full_check=True)


def _open_onnx(file: Path, names: tuple[str, ...], output: str) -> Run:
    """onnxruntime on the file.

    Raises:
        ExportError: It cannot be opened, or its inputs have other names or fixed sizes.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"{file.name} cannot be opened by onnxruntime: {first_line(error)}"
        ) from error
    found = [(given.name, given.shape) for given in session.get_inputs()]
    if found != [(name, ["batch", "sequence"]) for name in names]:
        raise ExportError(
            f"{file.name} takes {found}, not {', '.join(names)} of any size; nothing was written"
        )

    def run(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        values = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run([output], values)[0])

    return run
