"""An export is done again exactly if an option that shapes one of its files has another value."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.groups.export import ExportConfig, ExportDtype, GgufType, MergeOnto
from llmtune.export.formats.format import FORMATS
from llmtune.export.identity import (
    describe_job,
    describe_options,
    is_export_of,
    shaping_options,
)
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import mark_complete, write_manifest
from tests.export.conftest import make_adapter

#: Every option but the format with another value than its default.
OTHERS: dict[str, Any] = {
    "dtype": ExportDtype.fp16,
    "max_shard_bytes": 60_000,
    "merge_onto": MergeOnto.nf4,
    "gguf_type": GgufType.q8_0,
    "parity": False,
    "parity_bound": 0.5,
    "upload": "hf://somebody/something",
    "upload_private": False,
    "dry_run": True,
}
GRAPHS = ("onnx", "torchscript")
KINDS = [
    pytest.param(kind, marks=pytest.mark.slow if kind in GRAPHS else ()) for kind in FORMATS.list()
]


def change(kind: str, key: str) -> ExportConfig | None:
    """The option with another value; None where it is refused or writes nothing."""
    value = OTHERS[key]
    if key == "dry_run" or (key == "dtype" and kind in ("gguf", "adapter")):
        return None
    if key == "dtype" and kind in GRAPHS:
        value = ExportDtype.fp32
    return ExportConfig(**{"format": kind, key: value})


def published(folder: Path) -> Path:
    """An adapter as a run publishes it."""
    write_manifest(folder, {file.name: hash_file(file) for file in folder.iterdir()}, {})
    mark_complete(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that list the others, and a trace, in which torch numbers its classes
    on.
    """
    left_out = ("manifest.json", "COMPLETE", "model.ts.pt")
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in left_out]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_every_option_is_decided_and_tried() -> None:
    options = {field.name for field in fields(ExportConfig)}
    shaping = frozenset().union(*map(shaping_options, FORMATS.list()))
    shaping_nothing = {"upload_private", "dry_run"}
    assert shaping | shaping_nothing == options, (
        "a new option needs a decision: does it shape a file, and of which formats?"
    )
    assert not shaping & shaping_nothing
    assert set(OTHERS) | {"format"} == options
    assert all(getattr(ExportConfig(), key) != value for key, value in OTHERS.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_is_in_the_identity_exactly_if_it_shapes_a_file(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("check_upload", "upload_export"):
        monkeypatch.setattr(f"llmtune.export.pipeline.{name}", lambda *_: None)
    adapter = published(make_adapter(base, tmp_path / "adapter"))
    plain, output = ExportConfig(format=kind), tmp_path / "out"
    request = ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output)
    first = contents(run_export(request, plain))
    assert is_export_of(output, adapter, plain)
    for key in OTHERS:
        config = change(kind, key)
        if config is None:
            assert key not in shaping_options(kind) or key == "dry_run"
            continue
        assert (describe_options(config) == describe_options(plain)) is (
            key not in shaping_options(kind)
        ), key
        run_export(request, config)
        assert is_export_of(output, adapter, config)
        assert is_export_of(output, adapter, plain) is (key not in shaping_options(kind)), key
        shaped = contents(output) != first
        # Of graphs the dtype decides only where a training has left finer weights than its model's.
        assert shaped is (key in shaping_options(kind)) or (kind in GRAPHS and key == "dtype"), key
        if kind not in GRAPHS:
            run_export(request, plain)
            assert contents(output) == first, f"{key}: the same options write the same bytes"


def test_the_export_of_another_adapter_or_without_a_note_of_its_options_is_done_again(
    base: Path, tmp_path: Path
) -> None:
    adapter = published(make_adapter(base, tmp_path / "adapter"))
    other = published(make_adapter(base, tmp_path / "other", r=2))
    config, output = ExportConfig(), tmp_path / "out"
    run_export(
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output), config
    )
    assert is_export_of(output, adapter, config)
    assert not is_export_of(output, other, config)
    assert not is_export_of(tmp_path / "nothing", adapter, config)
    written = {name: hash_file(output / name) for name in contents(output)}
    write_manifest(
        output, written, {"format": "safetensors", "source": (adapter / "COMPLETE").read_text()}
    )
    mark_complete(output)
    assert not is_export_of(output, adapter, config), "written by a version that did not note them"


def test_addresses_stay_out_of_the_manifest() -> None:
    config = ExportConfig(upload="s3://key:password@bucket/folder")
    assert describe_options(config) == describe_options(ExportConfig())
    assert describe_options(ExportConfig(upload="hf://me/model@branch"))["upload"] == "me/model"


def test_what_an_export_leaves_inside_its_base_makes_it_no_other_job(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    request, config = (
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=base / "merged"
        ),
        ExportConfig(),
    )
    before = describe_job(request, config)
    (base / "merged.tmp").mkdir()
    (base / "merged.tmp" / "model.safetensors").write_bytes(b"half of it")
    assert describe_job(request, config) == before
    (base / "model.safetensors").touch()
    assert describe_job(request, config) != before
