"""``verify`` reads every byte and every number, says all that is wrong, and ends with 5 where
anything is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtune.cli.main import main
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import mark_complete, write_manifest
from llmtune.storage.tensors import tensor_checks
from llmtune.storage.tensors.tensor_checks import find_bad_tensors, find_untrained_adapter
from tests.support import run_cli

WEIGHTS = {"layer.weight": torch.ones(64, 8), "layer.bias": torch.zeros(8)}
ADAPTER = {"q.lora_A.weight": torch.ones(2, 8), "q.lora_B.weight": torch.full((8, 2), 0.5)}


def write_folder(
    folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors", **about: int
) -> Path:
    """A published folder with one file of tensors and one of text."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / file)
    (folder / "config.yaml").write_text("seed: 1\n")
    write_manifest(folder, {path.name: hash_file(path) for path in folder.iterdir()}, about)
    mark_complete(folder)
    return folder


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["verify", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def capsys(capfd: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """By descriptor: the verb writes to a duplicate of standard output."""
    return capfd


@pytest.mark.process
def test_a_whole_run_is_a_line_a_folder_and_exit_0(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 10, 100):
        write_folder(run / f"checkpoint-{step}", WEIGHTS, step=step)
    write_folder(run / "adapter", ADAPTER, "adapter_model.safetensors")
    write_folder(run / "merged", WEIGHTS)
    write_folder(run / "export-pt", WEIGHTS)
    (run / "checkpoint-110.tmp").mkdir()
    (run / "export-gguf.tmp").mkdir()
    done = run_cli("verify", f"run={run}")
    assert done.code == 0, done.err
    config = (run / "merged" / "config.yaml").stat().st_size
    model = config + (run / "merged" / "model.safetensors").stat().st_size
    adapter = config + (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert done.out.splitlines() == [
        *(
            f"ok  {run}/checkpoint-{step}  2 files, {model / 1000:.1f} kB, step {step}"
            for step in (5, 10, 100)
        ),
        f"ok  {run}/adapter  2 files, {adapter} B",
        f"ok  {run}/merged  2 files, {model / 1000:.1f} kB",
        f"ok  {run}/export-pt  2 files, {model / 1000:.1f} kB",
        "checked for damage, not for tampering (key=PUBLIC.pem checks signatures)",
    ]


def flip_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 10', '"step": 11'))


def leave_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text("x")
    files = {
        path.name: hash_file(path)
        for path in (folder / "model.safetensors", folder / "config.yaml")
    }
    write_manifest(folder, {**files, "../outside.txt": hash_file(outside)}, {"step": 10})
    mark_complete(folder)


def link(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip_bit, "model.safetensors has other contents than it was written with"),
    "truncated": (truncate, "model.safetensors has 2220 bytes instead of 2224"),
    "missing": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
    "extra": (lambda folder: (folder / "evil.py").touch(), "evil.py is not in manifest.json"),
    "manifest edited": (
        edit_manifest,
        "manifest.json is not the one that COMPLETE was written for",
    ),
    "marker edited": (
        lambda folder: (folder / "COMPLETE").write_text("0" * 32),
        "manifest.json is not the one",
    ),
    "marker gone": (
        lambda folder: (folder / "COMPLETE").unlink(),
        "COMPLETE is missing: it was never finished",
    ),
    "manifest gone": (
        lambda folder: (folder / "manifest.json").unlink(),
        "manifest.json cannot be read",
    ),
    "path outside": (leave_the_folder, "../outside.txt leads out of the folder"),
    "symlink": (link, "model.safetensors leads out of the folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_exit_5(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "checkpoint-10", WEIGHTS, step=10)
    harm, message = DAMAGES[damage]
    harm(folder)
    code, out, err = verify(capsys, f"checkpoint={folder}")
    assert code == 5
    first, *problems = out.splitlines()
    assert first == f"BAD {folder}"
    assert problems[0].startswith(f"      {message}")
    assert "1 of 1 folder" in err


def test_every_problem_has_its_line_and_whole_folders_stay_ok(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_folder(tmp_path / "checkpoint-5", WEIGHTS, step=5)
    good = write_folder(tmp_path / "checkpoint-10", WEIGHTS, step=10)
    (tmp_path / "checkpoint-15").mkdir()
    (bad / "config.yaml").unlink()
    (bad / "evil.py").touch()
    flip_bit(bad)
    code, out, _ = verify(capsys, f"run={tmp_path}")
    lines = out.splitlines()
    assert code == 5
    assert lines[0] == f"BAD {bad}"
    assert [line.split()[0] for line in lines[1:4]] == [
        "config.yaml",
        "evil.py",
        "model.safetensors",
    ]
    assert lines[4].startswith(f"ok  {good}  ")
    assert lines[5] == f"BAD {tmp_path}/checkpoint-15"


def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_folder(tmp_path / "checkpoint-10", WEIGHTS, step=10)
    code, out, _ = verify(capsys, f"checkpoint={good}", "--json")
    assert code == 0
    size = sum(
        path.stat().st_size
        for path in good.iterdir()
        if path.name not in ("manifest.json", "COMPLETE")
    )
    assert json.loads(out) == {
        "healthy": True,
        "folders": [
            {
                "path": str(good),
                "healthy": True,
                "problems": [],
                "checked_for": "damage",
                "files": 2,
                "bytes": size,
                "step": 10,
            }
        ],
    }
    flip_bit(good)
    code, out, _ = verify(capsys, f"checkpoint={good}", "--json")
    found = json.loads(out)
    assert code == 5
    assert not found["healthy"]
    assert not found["folders"][0]["healthy"]
    assert len(found["folders"][0]["problems"]) == 1


def test_numbers_that_are_none_are_found_behind_a_right_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {
        **WEIGHTS,
        "head.weight": torch.tensor([1.0, math.nan]),
        "norm.weight": torch.tensor([math.inf, 1.0]),
    }
    code, out, _ = verify(capsys, f"base={write_folder(tmp_path / 'model', weights)}")
    assert code == 5
    assert [line.strip() for line in out.splitlines()[1:]] == [
        "model.safetensors: tensor head.weight holds NaN",
        "model.safetensors: tensor norm.weight holds infinity",
    ]


def test_an_adapter_that_was_not_trained_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = {**ADAPTER, "q.lora_B.weight": torch.zeros(8, 2)}
    trained = write_folder(tmp_path / "trained", ADAPTER, "adapter_model.safetensors")
    untrained = write_folder(tmp_path / "untrained", zero, "adapter_model.safetensors")
    assert verify(capsys, f"adapter={trained}")[0] == 0
    code, out, _ = verify(capsys, f"adapter={untrained}", f"base={trained}")
    assert code == 5
    assert "every lora_B is zero" in out
    assert f"ok  {trained}" in out


def test_a_folder_of_another_program_cannot_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    code, out, _ = verify(capsys, f"base={tmp_path}")
    assert code == 5
    assert "not written by llmtune (no manifest.json), so it cannot be checked" in out


def test_nothing_named_is_2_and_nothing_there_is_5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = verify(capsys)
    assert code == 2
    assert "verify needs run=FOLDER, checkpoint=FOLDER, adapter=FOLDER or base=FOLDER" in err
    code, _, err = verify(capsys, f"run={tmp_path}")
    assert code == 5
    assert "no checkpoint and no trained model in it" in err
    code, out, _ = verify(capsys, f"checkpoint={tmp_path}/checkpoint-3")
    assert code == 5
    assert "no such folder" in out


# ----------------------------------------------------------------------------------------- the
# content checks


FLOATING = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_nan_is_found_in_every_block_of_every_float(
    dtype: torch.dtype, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two rows a block, the last block with one.
    row_bytes = 3 * max(dtype.itemsize, 4 if dtype.itemsize == 1 else 0)
    monkeypatch.setattr(tensor_checks, "BLOCK_BYTES", 2 * row_bytes + 1)
    values = torch.ones(7, 3)
    file = tmp_path / "x.safetensors"
    save_file({"a": values.to(dtype)}, file)
    assert find_bad_tensors(file) == []
    values[place, 1] = math.nan
    save_file({"a": values.to(dtype)}, file)
    assert find_bad_tensors(file) == ["x.safetensors: tensor a holds NaN"]


def test_blocks_hold_no_more_than_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    compare = tensor_checks._not_finite

    def measured(block: torch.Tensor) -> str | None:
        sizes.append(block.nbytes)
        return compare(block)

    monkeypatch.setattr(tensor_checks, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(tensor_checks, "_not_finite", measured)
    save_file({"flat": torch.ones(5000), "matrix": torch.ones(100, 50)}, tmp_path / "x.safetensors")
    assert find_bad_tensors(tmp_path / "x.safetensors") == []
    assert sum(sizes) == 40_000
    assert max(sizes) <= 4096


def test_scalars_empty_tensors_and_integers_are_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor([2**62]),
    }
    save_file(tensors, file)
    assert find_bad_tensors(file) == []
    save_file({**tensors, "scalar": torch.tensor(-math.inf)}, file)
    assert find_bad_tensors(file) == ["x.safetensors: tensor scalar holds infinity"]


@pytest.mark.parametrize("data", [None, b"", b"\0" * 100, b"\xff" * 100])
def test_a_file_that_is_none_is_a_problem_and_no_crash(data: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    if data is not None:
        file.write_bytes(data)
    for check in (find_bad_tensors, find_untrained_adapter):
        (problem,) = check(file)
        assert problem.startswith("x.safetensors cannot be read (")


def test_one_trained_lora_b_is_enough_and_other_weights_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    zeros = {f"{name}.lora_B.weight": torch.zeros(4, 2, dtype=torch.bfloat16) for name in "qkv"}
    save_file({**zeros, "head.weight": torch.ones(4)}, file)
    (problem,) = find_untrained_adapter(file)
    assert "every lora_B is zero" in problem
    zeros["v.lora_B.weight"][3, 1] = 1e-30
    save_file(zeros, file)
    assert find_untrained_adapter(file) == []
    save_file({"head.weight": torch.zeros(4)}, file)
    assert find_untrained_adapter(file) == []
