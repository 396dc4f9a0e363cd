"""Files of ``torch.save`` are read without running any of what they hold."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.errors import ExportError
from llmtune.export.sources.deepspeed.pickle_reader import StoredTensor, read_archive


@pytest.mark.parametrize(
    "opcodes",
    [
        # Attributes of what is known, set by BUILD; a class made by NEWOBJ; an unknown function as
        # the maker of a tensor.
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00_makecos\nsystem\ns\x86b.",
        b"\x80\x02cos\nsystem\n)\x81}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN(X\x04\x00\x00\x00trueetNtR.",
        b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x08\x00\x00\x00__call__\x86R.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
    ],
)
def test_no_opcode_reaches_a_foreign_function(
    opcodes: bytes, tmp_path: Path, monkeypatch: Any
) -> None:
    called: list[str] = []
    monkeypatch.setattr(os, "system", called.append)
    file = tmp_path / "x.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", opcodes)
    with contextlib.suppress(ExportError):
        read_archive(file)
    assert not called
    # The functions that make tensors are still themselves.
    torch.save({"t": torch.arange(6).reshape(2, 3)}, file)
    assert torch.equal(read_archive(file)["t"].open(), torch.arange(6).reshape(2, 3))


def test_tensors_of_every_layout_are_read(tmp_path: Path) -> None:
    big = torch.randn(6, 5)
    half: Any = torch.nn.Parameter(big.half())
    half.note = "an attribute"
    content = {
        "whole": big,
        "columns": big.T,
        "part": big[2:4, 1:3],
        "row": big[3],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "flags": big > 0,
        "bytes": torch.arange(5, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(big.bfloat16()),
        "noted": half,
        "small": torch.arange(3, dtype=torch.int16),
        "unsigned": torch.arange(3).to(torch.uint16),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
        "nested": [({"x": torch.Size([2, 3])}, torch.float16)],
        "names": {"a", "b"},
    }
    torch.save(content, tmp_path / "t.pt")
    found = read_archive(tmp_path / "t.pt")
    for name, values in content.items():
        if isinstance(values, torch.Tensor):
            assert isinstance(found[name], StoredTensor), name
            opened = found[name].open()
            assert opened.dtype == values.dtype
            assert torch.equal(opened.float(), values.detach().float()), name
    assert found["nested"] == [({"x": (2, 3)}, torch.float16)]
    assert found["names"] == {"a", "b"}
    assert found["whole"].open().data_ptr() == found["columns"].open().data_ptr(), (
        "shared and mapped, not copied"
    )
    with torch.no_grad():
        found["whole"].open().zero_()
    assert torch.equal(torch.load(tmp_path / "t.pt")["whole"], big), "the file stays as it is"
