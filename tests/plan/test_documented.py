"""Every training and every plan that a page shows fits the machine that the page names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from llmtune.cli.arguments import parse
from llmtune.cli.plan import make_plan
from llmtune.cli.verbs import VERBS
from llmtune.config.compose import compose_config
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.plan.batch_sizes import Ranks, resolve_batch
from llmtune.plan.memory.trace import activations
from llmtune.plan.resolve import resolve_ladder
from tests.documented import Shown, commands_of_page, find_commands
from tests.support import ROOT

#: The machine of commands that name none, and that of pages about several.
MACHINE = "8xa100_80gb"
MACHINES = {"nodes.md": "16xa100_80gb"}
#: Ranks that a launcher starts, where a page is about launchers.
RANKS = {"nodes.md": 16}
#: Models of the reader's, for which a folder stands in.
FOLDERS = {f"model.name_or_path={name}" for name in ("/models/mine", "FOLDER_OR_ID", "OWNER/NAME")}
#: Plans whose answer is that nothing fits.
NOTHING_FITS: dict[str, str] = {
    "plan model=llama3_70b hardware=8xa100_80gb tuner=full": "the help: 1 TB of host memory",
    "plan model=llama3_70b tuner=full hardware=8xa100_80gb": "the page shows what it says",
}


def to_overrides(shown: Shown, folder: Path) -> list[str]:
    """What is planned in place of a command, on the machine that its page names."""
    parsed = parse(list(shown.words), VERBS)
    words = [
        f"model.name_or_path={folder}" if word in FOLDERS else word for word in parsed.overrides
    ]
    if not any(word.startswith("hardware=") for word in words):
        words.append(f"hardware={MACHINES.get(shown.page, MACHINE)}")
        if shown.ranks:
            words += ["hardware.nodes=1", f"hardware.gpus_per_node={shown.ranks}"]
    if any("offload.nvme_path=" in word for word in words):
        words.append("hardware.nvme_bytes=4TB")
    return words


def find_plans() -> Iterator[Shown]:
    """Commands that train or plan; the experiments are planned by ``test_experiments.py``."""
    for shown in find_commands():
        verb = VERBS[parse(list(shown.words), VERBS).verb]
        names_any = {"tuner=NAME", "tuner=my_tuner", "experiment=first"} & set(shown.words)
        is_experiment = any(word.startswith("experiment=") for word in shown.words)
        if (verb.trains or verb.plans) and not names_any and not is_experiment:
            yield shown


def plan_key(config: Config) -> str:
    """What two commands must have in common for one plan to answer for both."""
    train = config.train
    data = (config.data.max_seq_length, config.data.packing)
    batch = (train.global_batch_size, train.per_device_train_batch_size, train.batch_schedule)
    rest = (config.model, config.tuner, config.optim.kind, config.zero, config.offload)
    machine = (config.hardware, config.launch.nproc, config.precision)
    return str((data, batch, train.gradient_checkpointing, rest, machine))


def find_misfit(shown: Shown, folder: Path, seen: set[str]) -> str | None:
    """Why a command cannot run; None also for what another command has shown already."""
    try:
        config = compose_config(to_overrides(shown, folder), planning=True).config
        if (key := plan_key(config)) in seen:
            return None
        seen.add(key)
        ladder = resolve_ladder(config, RANKS.get(shown.page), planning=True)
    except ConfigError as error:
        return f"{shown.page}: {shown.text}: {error}"
    if ladder.refusals:
        return f"{shown.page}: {shown.text}: {ladder.refusals}"
    if ladder.chosen is None and shown.text not in NOTHING_FITS:
        return f"{shown.page}: {shown.text}: nothing fits"
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that needs no hub."""
    config = yaml.safe_load((ROOT / "conf/model/llama3_8b.yaml").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are estimated and not traced, which takes seconds each."""

    def fail(*arguments: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(activations, "trace_layers", fail)
    monkeypatch.setattr(activations, "_TRACES", {})
    monkeypatch.setattr(activations, "read_cached", lambda *arguments: None)


@pytest.mark.usefixtures("estimated")
def test_every_training_and_every_plan_fits_its_machine(folder: Path) -> None:
    check_all(folder)


@pytest.mark.slow
def test_it_fits_with_traced_activations_too(folder: Path) -> None:
    check_all(folder)


def check_all(folder: Path) -> None:
    seen: set[str] = set()
    plans = list(find_plans())
    assert len(plans) > 30
    problems = [find_misfit(shown, folder, seen) for shown in plans]
    assert list(filter(None, problems)) == []
    assert len(seen) > 12


def test_what_does_not_fit_is_still_shown() -> None:
    assert NOTHING_FITS.keys() <= {shown.text for shown in find_commands()}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "torchrun --nproc_per_node 3 scripts/train.py model=tiny train.global_batch_size=8",
            "does not divide among 3 ranks",
        ),
        ("python -m llmtune model=tiny hardware=laptop zero=1 offload=cpu", "needs zero=3"),
        ("python -m llmtune plan model=tiny hardware=8xh100 offload=nvme", "fast local disk"),
        (
            "python -m llmtune model=tiny hardware=2x3090 hardware.gpu_memory_bytes=1MB"
            " hardware.host_memory_bytes=1MB",
            "nothing fits",
        ),
    ],
)
@pytest.mark.usefixtures("estimated")
def test_a_planted_command_that_cannot_run_is_found(line: str, problem: str, folder: Path) -> None:
    (shown,) = commands_of_page("a.md", f"    {line}\n")
    assert problem in str(find_misfit(shown, folder, set()))


@pytest.mark.usefixtures("estimated")
def printed_plans(page: str) -> list[tuple[list[str], list[str]]]:
    """The plans that a page quotes: words of a command, and the lines in the block behind it."""
    blocks = [
        token.content.strip("\n").splitlines()
        for token in MarkdownIt("commonmark").parse(page)
        if token.type in ("code_block", "fence")
    ]
    lines = [line for block in blocks for line in [*block, ""]]
    found: list[tuple[list[str], list[str]]] = []
    for line in lines:
        if line.startswith("python -m llmtune"):
            found.append((line.split()[3:], []))
        elif found and line.strip() not in ("", "..."):
            found[-1][1].append(" ".join(line.split()))
    return [(words[1:], quoted) for words, quoted in found if words[:1] == ["plan"] and quoted]


def print_plan(overrides: list[str]) -> set[str]:
    """The lines of a plan, with one blank between words, and what it says where nothing fits."""
    found = make_plan(compose_config(overrides, planning=True))
    text = f"{found}{found.misfit or ''}"
    return {" ".join(line.split()) for line in text.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/llama3-70b.md", "docs/small-machine.md"])
def test_a_quoted_plan_is_what_is_printed(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    plans = printed_plans((ROOT / page).read_text())
    assert plans
    for overrides, quoted in plans:
        assert [line for line in quoted if line not in print_plan(overrides)] == [], overrides


def test_a_quoted_plan_is_found_with_its_lines() -> None:
    page = "A:\n\n    python -m llmtune plan a=b\n\n    rung  c\n      none   1\n      ...\n"
    assert printed_plans(page) == [(["a=b"], ["rung c", "none 1"])]
    assert printed_plans("    python -m llmtune a=b\n\n    text\n") == []


def test_every_recipe_for_two_nodes_trains_on_sixteen_ranks() -> None:
    """As its ranks would plan it, on machines that are named because this one is another."""
    recipes = [
        shown
        for shown in find_commands()
        if shown.page == "nodes.md" and shown.words[0] not in VERBS
    ]
    assert len(recipes) >= 3
    configs = [
        compose_config([*parse(list(shown.words), VERBS).overrides, "hardware=16xa100_80gb"]).config
        for shown in recipes
    ]
    assert {resolve_batch(config.train, Ranks(16)).global_batch_size for config in configs} == {16}
    ladder = resolve_ladder(configs[0], 16, planning=True)
    assert ladder.chosen is not None
    assert ladder.chosen.batch.global_batch_size == 16
