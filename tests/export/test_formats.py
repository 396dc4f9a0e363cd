"""Every format, through the one door: opened, checked, written, described, published; and what the
command line does with it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtune.config.groups.export import ExportConfig, ExportDtype, GgufType, MergeOnto
from llmtune.errors import ExportError
from llmtune.export.formats.format import FORMATS
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.storage import layout
from llmtune.storage.manifest import find_damage
from tests.export.conftest import make_adapter
from tests.support import run_cli

FILES = {
    "safetensors": "model.safetensors",
    "adapter": "adapter_model.safetensors",
    "gguf": "model-q8_0.gguf",
    "onnx": "model.onnx",
    "torchscript": "model.ts.pt",
    "pt": "model.pt",
    "bnb_4bit": "model.safetensors",
}


@pytest.mark.parametrize("kind", FILES, ids=str)
def test_every_format_is_published_whole_with_a_card(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    said: list[str] = []
    request = ExportRequest(
        base=base,
        base_name="tiny",
        adapter=adapter,
        run=None,
        output=tmp_path / "out",
        say=said.append,
    )
    folder = run_export(request, ExportConfig(format=kind, gguf_type=GgufType.q8_0))
    assert (folder / FILES[kind]).stat().st_size > 10_000
    assert find_damage(folder) == []
    assert json.loads((folder / "manifest.json").read_text())["format"] == kind
    assert "tiny" in (folder / "README.md").read_text()
    assert not list(tmp_path.glob("out.*"))
    lines = [line for line in said if line.startswith("parity: logits within")]
    assert len(lines) == (kind != "adapter")
    coarser = {
        "gguf": "as q8_0, which is not compared",
        "bnb_4bit": "as 4 bits (NF4), which is not",
    }
    for line in lines:
        assert ("before they are stored" in line) is (kind in coarser)
        assert coarser.get(kind, "") in line


def test_there_is_an_option_and_a_writer_for_every_format() -> None:
    options = {file.stem for file in (Path(__file__).parents[2] / "conf" / "export").glob("*.yaml")}
    assert options == {"none", *FORMATS.list()}
    assert set(FILES) == set(FORMATS.list())


def test_a_wrong_merge_is_published_in_no_format(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr("llmtune.export.merge.adapter.Adapter.scale", lambda *_: 0.5)
    for kind in ("safetensors", "gguf", "pt"):
        request = ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "out"
        )
        with pytest.raises(
            ExportError, match="14 of 20 tensors are not what the base and peft's layers come to"
        ):
            run_export(request, ExportConfig(format=kind))
        assert not list(tmp_path.glob("out*"))
    run_export(request, ExportConfig(parity=False))


def test_an_adapter_merges_onto_what_a_qlora_training_saw(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    found = {}
    for onto in MergeOnto:
        request = ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / onto.value
        )
        found[onto] = load_file(
            run_export(request, ExportConfig(merge_onto=onto)) / "model.safetensors"
        )
    name = "model.layers.0.mlp.up_proj.weight"
    difference = (found[MergeOnto.nf4][name] - found[MergeOnto.original][name]).norm() / found[
        MergeOnto.original
    ][name].norm()
    assert 0.01 < float(difference) < 0.2, "the quantization error of NF4"
    assert torch.equal(
        found[MergeOnto.nf4]["model.norm.weight"], found[MergeOnto.original]["model.norm.weight"]
    )
    with pytest.raises(ExportError, match="there is no adapter to merge"):
        run_export(
            ExportRequest(
                base=base, base_name="tiny", adapter=None, run=None, output=tmp_path / "x"
            ),
            ExportConfig(merge_onto=MergeOnto.nf4),
        )


def test_a_dry_run_matches_everything_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    said: list[str] = []
    request = ExportRequest(
        base=base,
        base_name="tiny",
        adapter=adapter,
        run=None,
        output=tmp_path / "out",
        say=said.append,
    )
    run_export(request, ExportConfig(dry_run=True, dtype=ExportDtype.bf16, upload="hf://me/mine"))
    assert said[0] == f"would write safetensors to {tmp_path / 'out'}"
    assert "changes 14 tensors" in said[1]
    assert said[2].endswith("in bfloat16")
    assert "hf://me/mine" in said[3]
    assert not list(tmp_path.glob("out*"))
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError):
        run_export(request, ExportConfig(dry_run=True))


@pytest.mark.process
def test_the_command_line_exports_verifies_and_refuses(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    places = [f"base={base}", f"adapter={adapter}", f"output_dir={tmp_path}/out"]
    done = run_cli("merge", *places, f"export.upload=file://{tmp_path}/up")
    assert done.code == 0, done.err
    assert "parity: logits within" in done.out
    assert done.out.endswith(f"exported {tmp_path}/out\n")
    assert find_damage(tmp_path / "up") == []
    assert run_cli("verify", f"base={tmp_path}/out").code == 0
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    done = run_cli("export", *places, "export=gguf")
    assert done.code == 6
    assert "cut off or damaged" in done.err
    assert find_damage(tmp_path / "out") == [], "the export of before is still there"


def test_an_export_is_replaced_by_its_like_only(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    request = ExportRequest(
        base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "out"
    )

    def export(kind: str, **settings: Any) -> Path:
        return run_export(request, ExportConfig(format=kind, parity=False, **settings))

    merged = export("safetensors")
    before = (merged / "model.safetensors").read_bytes()
    for kind in ("gguf", "pt", "adapter"):
        for dry_run in (False, True):
            with pytest.raises(ExportError, match=f"export=safetensors, and this is export={kind}"):
                export(kind, dry_run=dry_run)
    assert (merged / "model.safetensors").read_bytes() == before
    export("safetensors", dtype=ExportDtype.bf16)
    assert (merged / "model.safetensors").read_bytes() != before
    shutil.rmtree(merged)
    export("gguf", gguf_type=GgufType.q8_0)
    export("gguf")
    assert (merged / "model-f16.gguf").is_file()
    assert find_damage(merged) == []


@pytest.mark.parametrize("kind", list(FILES), ids=str)
def test_every_format_has_a_place_of_its_own_in_the_run(kind: str) -> None:
    run = Path("runs/a")
    others = {layout.export_folder(run, other) for other in FILES if other != kind}
    own = layout.export_folder(run, kind)
    assert own not in others
    assert layout.is_export_folder(own)
    assert own == (run / "merged" if kind == "safetensors" else run / f"export-{kind}")
    for other in ("adapter", "model", "checkpoint-10", "export-gguf.tmp", "merged.old.tmp"):
        assert not layout.is_export_folder(run / other)
