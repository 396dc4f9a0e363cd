"""Every command that README, docs, conf and the help show is one that composes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmtune.cli.arguments import parse
from llmtune.cli.main import HELP
from llmtune.cli.verbs import VERBS
from llmtune.config.compose import compose_config
from llmtune.plan.batch_sizes import resolve_batch
from llmtune.plan.resolve import resolve_ladder
from tests.support import ROOT

#: The program and what is behind it, up to a comment in another column or a sign of the shell.
_COMMAND = re.compile(
    r"(?:python -m llmtune|scripts/train\.py|scripts/slurm\.sh|--module llmtune)((?: +(?! "
    r" )[^\s`]+)*)"
)
#: Behind the command of an example.
_ENDS = ("|", "&&", "2>", ">", "#")


def commands() -> list[tuple[str, list[str]]]:
    files = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "conf").rglob("*.yaml")),
    ]
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files} | {"--help": HELP}
    found = []
    for name, text in texts.items():
        for line in text.splitlines():
            match = _COMMAND.search(line)
            arguments = split(line[match.start(1) :]) if match is not None else []
            # What stands for arguments, in the help's first lines.
            if arguments and "[VERB]" not in arguments:
                found.append((name, arguments))
    return found


def split(text: str) -> list[str]:
    """The arguments of an example: a gap of two blanks, a back quote or a sign of the shell ends
    it.
    """
    try:
        words = shlex.split(re.split(r"\s{2,}(?=\S)|`|;| \(| {1}# ", text)[0])
    except ValueError:
        return []
    end = next((number for number, word in enumerate(words) if word.startswith(_ENDS)), len(words))
    return [bare for word in words[:end] if (bare := word.rstrip(",.:"))]


COMMANDS = commands()
ON_NODES = [
    arguments for name, arguments in COMMANDS if name == "docs/nodes.md" and arguments[0] != "data"
]


def test_the_examples_are_found() -> None:
    assert len(COMMANDS) > 30
    assert {arguments[0] for _, arguments in COMMANDS} >= {
        "plan",
        "data",
        "chat",
        "export",
        "model=llama3_8b",
    }


@pytest.mark.parametrize("number", range(0, len(COMMANDS), 8))
def test_each_composes(number: int, tmp_path: Path) -> None:
    for name, arguments in COMMANDS[number : number + 8]:
        parsed = parse(arguments, VERBS)
        assert parsed.verb in VERBS
        try:
            compose_config(parsed.overrides, planning=parsed.verb == "plan")
        except Exception as error:
            pytest.fail(f"{name}: {' '.join(arguments)}: {error}")


def test_every_recipe_for_two_nodes_trains_on_sixteen_ranks() -> None:
    """As its ranks would plan it, on machines that are named because this one is another."""
    assert len(ON_NODES) >= 3
    configs = [
        compose_config([*parse(arguments, VERBS).overrides, "hardware=16xa100_80gb"]).config
        for arguments in ON_NODES
    ]
    assert {resolve_batch(config.train, 16).global_batch_size for config in configs} == {16}
    ladder = resolve_ladder(configs[0], 16, planning=True)
    assert ladder.chosen is not None
    assert ladder.chosen.batch.global_batch_size == 16
