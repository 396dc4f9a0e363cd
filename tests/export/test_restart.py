"""An export that is killed: nothing under the published name, and the next start goes on to the
same bytes.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError
from llmtune.export.pipeline import run_export
from llmtune.export.publish.shards import JOURNAL, Journal
from llmtune.export.request import ExportRequest
from llmtune.storage.manifest import find_damage
from tests.export.conftest import make_adapter

SEED = 20261122


def start(base: Path, adapter: Path, output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.export.export_worker", *map(str, (base, adapter, output))]
    )


def count(journal: Path) -> int:
    """Its lines; while it is being published it goes away."""
    try:
        return len(journal.read_text().splitlines())
    except FileNotFoundError:
        return 0


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.process
def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", "up_proj", "embed_tokens", "lm_head"]
    )
    output = tmp_path / "out"
    run_export(
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output),
        ExportConfig(max_shard_bytes=40_000),
    )
    undisturbed = contents(output)
    output.rename(tmp_path / "undisturbed")
    journal = output.with_name("out.tmp") / JOURNAL
    moments, kept = random.Random(SEED), []
    for _ in range(5):
        process = start(base, adapter, output)
        wanted = count(journal) + moments.randrange(2)
        while process.poll() is None and count(journal) <= wanted and not output.exists():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(count(journal))
        if output.exists():
            assert not find_damage(output), "published before it was whole"
            break
    assert max(kept) > 3, "work was kept from start to start"
    assert start(base, adapter, output).wait() == 0
    assert contents(output) == undisturbed
    assert not find_damage(output)
    assert not journal.parent.exists()


def test_finished_shards_are_not_written_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    output, config = tmp_path / "out", ExportConfig(max_shard_bytes=40_000)
    request = ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmtune.export.pipeline.write_model_card", fail)
        with pytest.raises(KeyboardInterrupt):
            run_export(request, config)
    shards = {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out.tmp").glob("*.safetensors")
    }
    assert len(shards) > 3
    damaged = sorted(shards)[1]
    (tmp_path / "out.tmp" / damaged).write_bytes(b"not what was written")
    (tmp_path / "out.tmp" / ".manifest.json.part").write_text("killed while it was written")
    run_export(request, config)
    assert not find_damage(output)
    assert not list(output.glob(".*"))
    again = {
        file.name
        for file in output.glob("*.safetensors")
        if file.stat().st_mtime_ns != shards[file.name]
    }
    assert again == {damaged}, "only what is not as the journal says is written again"


def test_what_is_left_of_another_job_is_thrown_away(base: Path, tmp_path: Path) -> None:
    aside = tmp_path / "out.tmp"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"of another adapter")
    Journal(aside, "another job").note("model.safetensors", {"size": 18, "xxh3_128": "0"})
    adapter = make_adapter(base, tmp_path / "adapter")
    run_export(
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "out"
        ),
        ExportConfig(),
    )
    assert not find_damage(tmp_path / "out")


def test_the_old_export_stays_until_the_new_one_is_whole(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    output = tmp_path / "out"
    run_export(
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output),
        ExportConfig(),
    )
    old = contents(output)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(ExportError):
        run_export(
            ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output),
            ExportConfig(),
        )
    assert contents(output) == old
    # An end between the two renames: the old one has its other name, and comes back.
    output.rename(tmp_path / "out.old.tmp")
    with pytest.raises(ExportError):
        run_export(
            ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output),
            ExportConfig(),
        )
    assert contents(output) == old


@pytest.mark.process
def test_two_exports_do_not_write_one_folder(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    output = tmp_path / "out"
    process = start(base, adapter, output)
    while not (tmp_path / "out.tmp" / JOURNAL).is_file():
        time.sleep(0.002)
    with pytest.raises(ExportError, match="another export is writing"):
        run_export(
            ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output),
            ExportConfig(),
        )
    assert process.wait() == 0
    assert not find_damage(output)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr("llmtune.export.pipeline._MODEL_FILES_BYTES", 10**16)
    with pytest.raises(
        ExportError,
        match=r"free, the export needs 10000\.00 TB; take an output_dir= on a larger disk",
    ):
        run_export(
            ExportRequest(
                base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "out"
            ),
            ExportConfig(),
        )
    assert not list(tmp_path.glob("out*"))
