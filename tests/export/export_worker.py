"""One export in a process of its own, slow enough to be killed in the middle: ``BASE ADAPTER
OUTPUT``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from llmtune.config.groups.export import ExportConfig
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.storage.tensors.safetensors_writer import TensorFile

write = TensorFile.write


def write_slowly(file: TensorFile, tensor: Any) -> None:
    """A slow disk."""
    time.sleep(0.01)
    write(file, tensor)


if __name__ == "__main__":
    base, adapter, output = map(Path, sys.argv[1:])
    TensorFile.write = write_slowly  # type: ignore[method-assign, assignment]
    run_export(
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output),
        ExportConfig(max_shard_bytes=40_000),
    )
