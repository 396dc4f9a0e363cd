"""The files of ``docker/``, as the tests of this folder read them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from tests.support import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def load_program(name: str) -> ModuleType:
    """A program of the image as a module."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_services() -> dict[str, Any]:
    """The services of ``compose.yaml`` where no variable is set."""
    text = (DOCKER / "compose.yaml").read_text()
    services: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(lambda m: m[2] or "", text))["services"]
    return services


def read_manifests(path: Path) -> dict[str, dict[str, Any]]:
    """The manifests of a file by their kind."""
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(path.read_text())}


def folders_of_the_image() -> set[str]:
    """Folders that the image makes for what is mounted."""
    match = re.search(r"mkdir -p ((?:/[\w/]+ ?)+);", DOCKERFILE)
    assert match is not None
    return set(match[1].split())


def default(argument: str) -> str:
    """The default of an argument of the Dockerfile."""
    (first, *_) = re.findall(rf"^ARG {argument}=(.*)$", DOCKERFILE, re.MULTILINE)
    return str(first)
