"""One cache for the whole suite, away from the user's; ranks on the CPU; processes that start warm;
three tiers of tests.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtune.launch.launchers.environment import extensions_dir, use_own_ninja
from tests import processes

pytest_plugins = ["tests.suite.tiers", "tests.suite.budget", "pytester"]


def pytest_configure() -> None:
    """Before any test: signals, the surroundings of ranks, and processes that start warm."""
    # A shell without job control starts what is behind ``&`` with Ctrl-C ignored, and so would be
    # all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["DS_ACCELERATOR"] = "cpu"
    # A page costs each training seconds; the tests of pages turn it on.
    os.environ["LLMTUNE_REPORT"] = "false"
    use_own_ninja()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir()))
    # Read when torch loads its OpenMP: threads that spin for each other, while another process has
    # one of the cores, make a step ten times longer.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Read when torch is imported: threads of two workers on two cores wait for each other more
        # than they compute.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    processes.install()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted models and tokenized rows of this test session.

    ``LLMTUNE_TEST_CACHE`` keeps them between sessions, which saves the conversion of the real
    model.
    """
    kept = os.environ.get("LLMTUNE_TEST_CACHE")
    folder = Path(kept) if kept else tmp_path_factory.getbasetemp().parent / "llmtune-cache"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LLMTUNE_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def nursery(cache: Path) -> None:
    """Where processes start warm; every test that is marked ``process`` has it."""
    processes.NURSERY.start()


@pytest.fixture(autouse=True)
def own_environment(cache: Path) -> Iterator[None]:
    """Variables that a test sets end with it: the number of threads, for one, changes the last
    digits of every later run.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
    """Variables that a fixture of several tests sets end with its set-up; those of ``cache`` are
    meant to stay.
    """
    before = dict(os.environ)
    result = yield
    if fixturedef.scope != "function" and fixturedef.argname != "cache":
        os.environ.clear()
        os.environ.update(before)
    return result


@pytest.fixture
def started_cold() -> Iterator[None]:
    """Processes of this test start for real, as a user's do."""
    with processes.cold():
        yield


@pytest.fixture(scope="session")
def smollm2(cache: Path) -> Path:
    """The folder of the embedded model; unpacking it takes ten seconds."""
    from llmtune.config.compose import compose_config
    from llmtune.model.source import resolve_model_folder

    return resolve_model_folder(compose_config([]).config.model, cache)


@pytest.fixture(scope="session")
def tiny_model(cache: Path) -> Path:
    """The folder of the tiny random model."""
    from llmtune.config.compose import compose_config
    from llmtune.model.source import resolve_model_folder

    return resolve_model_folder(compose_config(["model=tiny"]).config.model, cache)
