"""One cache for the whole suite, away from the user's; ranks on the CPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtune.launch.environment import extensions_dir, use_own_ninja


def pytest_configure() -> None:
    """A shell without job control starts what is behind ``&`` with Ctrl-C ignored, and so would be all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long table unless it was asked for by its marker."""
    if "faults" in str(config.getoption("markexpr")):
        return
    left_out = [item for item in items if item.get_closest_marker("faults") and not item.get_closest_marker("fault_ci")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted models and tokenised rows of this test session.

    ``LLMTUNE_TEST_CACHE`` keeps them between sessions, which saves the conversion of the real model.
    """
    kept = os.environ.get("LLMTUNE_TEST_CACHE")
    folder = Path(kept) if kept else tmp_path_factory.getbasetemp().parent / "llmtune-cache"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LLMTUNE_CACHE"] = str(folder)
    os.environ["DS_ACCELERATOR"] = "cpu"
    use_own_ninja()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir()))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return folder


@pytest.fixture(autouse=True)
def own_environment(cache: Path) -> Iterator[None]:
    """Variables that a test sets end with it: the number of threads, for one, changes the last digits of every later run."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(cache: Path) -> Path:
    """The folder of the tiny random model."""
    from llmtune.config.compose import compose_config
    from llmtune.model.files import resolve_model_folder

    return resolve_model_folder(compose_config(["model=tiny"]).config.model, cache)
