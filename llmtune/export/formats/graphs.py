"""The rules of ``export=onnx`` and ``export=torchscript``: fp32, and a limit to the size."""

import math
from pathlib import Path

from llmtune.config.groups.export import ExportConfig, ExportDtype


def find_graph_problems(config: ExportConfig) -> str | None:
    """Find why a graph does not take these options: it has one dtype."""
    if config.dtype in (ExportDtype.auto, ExportDtype.fp32):
        return None
    return (
        f"export.dtype={config.dtype.value}: graphs are written in fp32; take export.dtype=auto, or"
        " export=safetensors"
    )


def check_graph_base(base: Path) -> None:
    """Check that a graph can be made of a model folder.

    Raises:
        ExportError: It is too large, or of an architecture that no loader is known for.
    """
    from llmtune.export.sources.tensor_source import SafetensorsSource
    from llmtune.export.writers.graph.graph_model import check_size, find_loader

    find_loader(base)
    check_size(sum(math.prod(spec.shape) for spec in SafetensorsSource(base).specs.values()))


def compared_as_fp32(_config: ExportConfig) -> ExportDtype:
    """Return fp32: a graph holds the merged numbers as they are computed."""
    return ExportDtype.fp32
