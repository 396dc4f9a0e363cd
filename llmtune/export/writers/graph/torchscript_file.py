"""``model.ts.pt``: a graph that torch runs without transformers, compared with transformers."""

from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.shards import Journal
from llmtune.export.writers.graph.graph_comparison import (
    compare_graph,
    make_example,
    make_probe_batches,
)
from llmtune.export.writers.graph.graph_model import load_merged_model, refuse_unexportable
from llmtune.process import hold_interruptions

TORCHSCRIPT_FILE = "model.ts.pt"

_TRACED_FILE = "traced.tmp"


def write_torchscript(
    export_model: ExportModel, folder: Path, _journal: Journal, config: ExportConfig
) -> None:
    """Write ``model.ts.pt`` in fp32, which ``torch.jit.load`` reads.

    Raises:
        ExportError: The model is no encoder or small decoder, or the graph does not compute what
            transformers does.
    """
    file = folder / TORCHSCRIPT_FILE
    model = load_merged_model(export_model, folder, config)
    with refuse_unexportable(model, "TorchScript"):
        batches = make_probe_batches(model)
        with hold_interruptions():
            traced: Any = torch.jit.trace(model, make_example(model), check_trace=False)
        traced.save(str(folder / _TRACED_FILE))
        _strip_debug_records(folder / _TRACED_FILE, file)
    del model, traced
    with torch.no_grad():
        loaded: Any = torch.jit.load(str(file))
        compare_graph(lambda inputs: loaded(*inputs), batches, TORCHSCRIPT_FILE)


def _strip_debug_records(traced: Path, file: Path) -> None:
    """Copy a program without the source lines it was traced from, which name local folders."""
    reader: Any = torch._C.PyTorchFileReader(str(traced))
    writer: Any = torch._C.PyTorchFileWriter(str(file))
    for name in reader.get_all_records():
        # The writer adds the other two by itself.
        if not name.endswith(".debug_pkl") and name not in ("version", ".data/serialization_id"):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    traced.unlink()
