"""One table of types: what it says is what torch and safetensors say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmtune.config.groups.export import ExportDtype
from llmtune.config.schema import Precision
from llmtune.storage.tensors.dtypes import (
    TYPES,
    WRITABLE,
    configured_dtype,
    to_safetensors,
    to_torch,
)
from llmtune.storage.tensors.safetensors_header import read_header


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_what_safetensors_calls_it(name: str, tmp_path: Path) -> None:
    dtype = to_torch(name)
    save_file({"t": torch.zeros(3, dtype=torch.float32).to(dtype)}, tmp_path / "x.safetensors")
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as file:
        assert file.get_slice("t").get_dtype() == name
    assert read_header(tmp_path / "x.safetensors")["t"].kind == name
    assert TYPES[name].nbytes == dtype.itemsize
    assert TYPES[name].is_floating == dtype.is_floating_point
    assert to_safetensors(dtype) == (name if name in WRITABLE else None)


def test_what_is_not_in_the_table_is_not_written() -> None:
    assert to_safetensors(torch.complex64) is None


def test_the_configurations_types_are_known() -> None:
    names = {kind.value for kind in (*Precision, *ExportDtype)} - {"auto"}
    assert {configured_dtype(name) for name in names} == {
        torch.bfloat16,
        torch.float16,
        torch.float32,
    }
