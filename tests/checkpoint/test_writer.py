"""Tensors on their way to files: the same bytes at once and from copies, and a disk's error only
when it can be said.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune.checkpoint.writer import Buffers, CheckpointWriter
from llmtune.storage.hashing import hash_file
from llmtune.storage.tensors.safetensors_writer import TensorFile
from llmtune.storage.tensors.tensor_spec import TensorSpec

SPECS = {
    "a.safetensors": [
        TensorSpec("x", torch.float32, (3, 2)),
        TensorSpec("y", torch.bfloat16, (5,)),
    ],
    "b.safetensors": [TensorSpec("z", torch.float32, (4,))],
}
VALUES = {
    "x": torch.arange(6.0).reshape(3, 2),
    "y": torch.ones(5, dtype=torch.bfloat16),
    "z": torch.full((4,), 7.0),
}


def fill(writer: CheckpointWriter) -> None:
    for name, specs in SPECS.items():
        writer.start(name, specs, {"of": name})
        for spec in specs:
            writer.add(VALUES[spec.name])


@pytest.mark.parametrize("hold", [False, True])
def test_files_and_hashes_are_those_of_the_tensors(hold: bool, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, Buffers() if hold else None)
    fill(writer)
    assert bool(list(tmp_path.iterdir())) is not hold, "what is held is not on disk yet"
    beats: list[None] = []
    writer.write(lambda: beats.append(None))
    assert len(beats) == (3 if hold else 0)
    for name, specs in SPECS.items():
        stored = load_file(tmp_path / name)
        assert stored.keys() == {spec.name for spec in specs}
        assert all(torch.equal(stored[spec.name], VALUES[spec.name]) for spec in specs)
        assert writer.entries[name] == hash_file(tmp_path / name)


def test_copies_are_of_the_moment_and_their_memory_is_used_again(tmp_path: Path) -> None:
    buffers = Buffers()
    buffers.reserve(SPECS)
    assert buffers.nbytes == 6 * 4 + 5 * 2 + 4 * 4
    value = torch.zeros(4)
    places = []
    for number in (1.0, 2.0):
        value.fill_(number)
        writer = CheckpointWriter(tmp_path, buffers)
        writer.start("b.safetensors", SPECS["b.safetensors"])
        writer.add(value)
        value.fill_(99.0)
        writer.write(lambda: None)
        assert load_file(tmp_path / "b.safetensors")["z"].tolist() == [number] * 4
        places.append(buffers.copy("b.safetensors", value, SPECS["b.safetensors"][0]).data_ptr())
    assert places[0] == places[1]
    buffers.release()
    assert buffers.nbytes == 0


@pytest.mark.parametrize(("source", "emptied"), [(None, 0), ("cpu", 0), ("cuda", 1)])
def test_pinned_memory_that_is_given_back_is_not_kept_by_torch(
    source: str | None, emptied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its allocator keeps what was freed; a run that has released its copies has no memory to
    spare.
    """
    freed: list[int] = []
    buffers = Buffers(torch.device(source) if source else None)
    buffers.copy("b.safetensors", torch.zeros(4), SPECS["b.safetensors"][0])
    monkeypatch.setattr(
        torch.accelerator,
        "empty_host_cache",
        lambda: freed.append(len(buffers._kept)),
        raising=False,
    )
    buffers.release()
    assert freed == [0] * emptied, "when nobody has it any more"


@pytest.mark.parametrize("hold", [False, True])
def test_a_full_disk_is_said_when_all_tensors_were_taken(
    hold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: TensorFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "_append", refuse)
    writer = CheckpointWriter(tmp_path, Buffers() if hold else None)
    fill(writer)
    with pytest.raises(OSError, match="No space left"):
        writer.write(lambda: None)
