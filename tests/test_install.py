"""A wheel of llmtune works from any directory, with its configuration inside."""

from __future__ import annotations

import ast
import configparser
import shutil
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT, run


def test_every_folder_with_modules_is_a_package() -> None:
    """Otherwise the wheel would leave it out."""
    folders = {file.parent for file in (ROOT / "llmtune").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def shipped() -> set[str]:
    """Names in the wheel of what is read at run time."""
    kinds = (".py", ".pyi", ".yaml", ".jinja", ".typed")
    within = {"llmtune": ROOT / "llmtune", "llmtune/conf": ROOT / "conf"}
    return {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in within.items()
        for file in folder.rglob("*")
        if file.suffix in kinds
    }


def test_every_package_that_is_imported_is_asked_for() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = dict(settings["options.extras_require"])
    del extras["dev"]
    asked = "\n".join([settings["options"]["install_requires"], *extras.values()])
    names = {canonicalize_name(Requirement(line).name) for line in asked.split("\n") if line}
    # Extras need not be installed.
    providers = {"mlflow": ["mlflow-skinny"], **packages_distributions()}
    imported: set[str] = set()
    for file in (ROOT / "llmtune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"llmtune"}
    assert len(foreign) > 20
    missing = {
        name
        for name in foreign
        if not names & {canonicalize_name(provider) for provider in providers.get(name, [name])}
    }
    assert missing == set()


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_the_wheel_composes_from_another_directory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("llmtune", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q"]
    built = run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(source)])
    assert built.code == 0, built.err
    (wheel,) = tmp_path.glob("llmtune-*.whl")
    site = tmp_path / "site"
    assert run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)]).code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(
        [sys.executable, "-c", "import llmtune; print(llmtune.__file__)"],
        elsewhere,
        {"PYTHONPATH": str(site)},
    )
    assert where.out.startswith(str(site))
    done = run(
        [
            sys.executable,
            "-m",
            "llmtune",
            "--cfg",
            "job",
            "model=llama3_70b",
            "data.chat_template=llama3",
        ],
        elsewhere,
        {"PYTHONPATH": str(site)},
    )
    assert done.code == 0, done.err
    assert "hidden_size: 8192" in done.out
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("llmtune/")}
    assert packed == shipped()
