"""The workflows of GitHub and GitLab call what is there, with no more rights than they need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from llmtune.cli.arguments import parse
from llmtune.cli.verbs import VERBS
from llmtune.config.compose import compose_config
from tests.docker.files import DOCKERFILE
from tests.support import ROOT

WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
GITLAB = yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text())
#: Files of this repository in a line of a shell.
_FILES = re.compile(r"(?<![\w./-])((?:scripts|docker|llmtune|\.ci)/[\w./-]+|[A-Z]+\.md)")
_LLMTUNE = re.compile(r"-m llmtune (.+)")


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, workflow in WORKFLOWS.items():
        yield from ((f"{name}:{job}", steps) for job, steps in workflow["jobs"].items())


def shell_lines() -> list[tuple[str, str]]:
    """Where a line of a shell is, and the line."""
    found = [
        (name, line)
        for name, job in jobs()
        for step in job.get("steps", [])
        for line in step.get("run", "").splitlines()
    ]
    for name, job in GITLAB.items():
        if isinstance(job, dict):
            texts = [*job.get("before_script", []), *job.get("script", [])]
            found += [(f"gitlab:{name}", line) for text in texts for line in text.splitlines()]
    return found


LINES = shell_lines()


def test_each_file_that_a_step_names_is_there() -> None:
    named = {(where, file) for where, line in LINES for file in _FILES.findall(line)}
    assert {file for _, file in named} >= {"scripts/setup.sh", ".ci/run", "docker/Dockerfile"}
    assert [f"{where}: {file}" for where, file in named if not (ROOT / file).exists()] == []
    called = {job["uses"] for _, job in jobs() if "uses" in job}
    assert called == {"./.github/workflows/image.yml"}


def test_each_command_of_llmtune_composes() -> None:
    commands = [found[1] for _, line in LINES if (found := _LLMTUNE.search(line))]
    assert len(commands) >= 6
    for command in commands:
        arguments = [word for word in command.split() if not word.startswith('"$')]
        parsed = parse(arguments, VERBS)
        compose_config(parsed.overrides, planning=parsed.verb == "plan")


def test_the_version_is_read_from_where_it_is() -> None:
    version = re.compile(r'^__version__ = "\S+"$', re.MULTILINE)
    assert version.search((ROOT / "llmtune" / "__init__.py").read_text())
    reads = [line for _, line in LINES if "__version__" in line]
    assert len(reads) == 4
    assert all(r's/^__version__ = "\(.*\)"$/\1/p' in line for line in reads)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_and_no_more_unless_a_job_says_so(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job or "uses" in job
        for step in job.get("steps", []):
            assert re.fullmatch(r"[\w/-]+@(v\d+|release/v1)", step.get("uses", "a/b@v1"))
            # What somebody types or names must not become a part of a shell's program.
            assert "${{" not in step.get("run", "")


def test_the_targets_are_those_of_the_dockerfile() -> None:
    targets = re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, re.MULTILINE)
    matrix = WORKFLOWS["image.yml"]["jobs"]["image"]["strategy"]["matrix"]["target"]
    assert sorted(matrix) == sorted(targets)
    (of_gitlab,) = GITLAB["container"]["parallel"]["matrix"]
    assert of_gitlab["TARGET"] == matrix
