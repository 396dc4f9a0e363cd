"""``model.onnx``: a graph that onnxruntime runs without torch, compared with transformers."""

import importlib
import math
from pathlib import Path

import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError, MissingPrerequisiteError, first_line
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.shards import Journal
from llmtune.export.writers.graph.graph_comparison import (
    Run,
    compare_graph,
    make_example,
    make_probe_batches,
)
from llmtune.export.writers.graph.graph_model import (
    GraphModel,
    load_merged_model,
    refuse_unexportable,
)
from llmtune.process import hold_interruptions

ONNX_FILE = "model.onnx"

#: A protobuf ends at 2 GiB; the weights of a larger model go into a file beside it.
_MOST_IN_ONE_FILE_BYTES = 1_900_000_000


def write_onnx(
    export_model: ExportModel, folder: Path, _journal: Journal, config: ExportConfig
) -> None:
    """Write ``model.onnx`` in fp32, with a free batch size and length.

    Raises:
        ExportError: The model is no encoder or small decoder, or the graph does not compute what
            transformers does.
        MissingPrerequisiteError: A package of the extra ``onnx`` is missing.
    """
    check_onnx_packages()
    file = folder / ONNX_FILE
    model = load_merged_model(export_model, folder, config)
    with refuse_unexportable(model, "ONNX"):
        batches = make_probe_batches(model)
        _export_onnx(model, file, export_model)
    names, output = model.inputs, model.output
    # The expected outputs are computed; the session makes its own copy of the weights.
    del model
    compare_graph(_open_onnx(file, names, output), batches, ONNX_FILE)


def check_onnx_packages() -> None:
    """Import the packages that write a graph and run it.

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
    """Open the file with onnxruntime.

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
    inputs = [(tensor.name, tensor.shape) for tensor in session.get_inputs()]
    if inputs != [(name, ["batch", "sequence"]) for name in names]:
        raise ExportError(
            f"{file.name} takes {inputs}, not {', '.join(names)} of any size; nothing was written"
        )

    def run(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        arrays = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
        return torch.from_numpy(session.run([output], arrays)[0])

    return run
