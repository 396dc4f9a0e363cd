"""The notebook of the docs runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import cold
from tests.support import ROOT, run

NOTEBOOK = ROOT / "docs" / "python-api.ipynb"
#: After the last cell.
CHECKS = """
assert found.fits and chosen is not None
assert (run.step, run.state) == (6, "finished"), run
assert run.model is not None and run.adapter is not None and list(run.checkpoints) == [4, 6], run
assert list(metrics["step"][metrics["loss"].notna()]) == [1, 2, 3, 4, 5, 6]
assert metrics["eval_loss"].notna().sum() >= 3
assert run.config.model.name_or_path == "random" and run.record.world_size == 1
assert abs(run.evaluate()["eval_loss"] - run.metrics[-1]["eval_loss"]) < 1e-3
print("the end")
"""


def read_cells() -> list[str]:
    """The code of the notebook."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.process
def test_the_cells_run_as_a_program(tmp_path: Path) -> None:
    """In one process, as in a kernel, and not in a folder of llmtune."""
    program = tmp_path / "notebook.py"
    program.write_text("\n".join([*read_cells(), CHECKS]))
    done = run(["python", str(program)], cwd=tmp_path, env={"MPLBACKEND": "agg"}, timeout=600)
    assert done.code == 0, done.err[-3000:]
    assert done.out.endswith("the end\n")
    assert "* none" in done.out, "the plan's table"
    assert "step 6/6" in done.out, "what the child says reaches sys.stdout of this process"
    assert "did you mean 'tuner.lora_r'?" in done.out, "the error of the last cell"
    assert "Warning" not in done.err, done.err


@pytest.mark.process
@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path: Path) -> None:
    """Where a kernel is installed, which ``pip install nbclient ipykernel`` does.

    It starts cold: in a process that has matplotlib already, it would not show pictures.
    """
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    metadata = {"metadata": {"path": str(tmp_path)}}
    with cold():
        nbclient.NotebookClient(notebook, timeout=600, resources=metadata).execute()
    shown = json.dumps(notebook)
    assert "step 6/6" in shown
    assert "image/png" in shown
