"""Names that people bring from other fine-tuners end with the key that they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from llmtune.cli.arguments import parse
from llmtune.cli.verbs import VERBS
from llmtune.config.compose import compose_config, config_groups
from llmtune.config.foreign import ABSENT_OPTIONS, MEANINGS
from llmtune.config.keys import known_keys
from llmtune.config.overrides import read_override
from llmtune.errors import ConfigError
from llmtune.run.settings import find_problems
from scripts import foreign_table

GROUPS = config_groups()


def problem(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(list(overrides), str(config_dir) if config_dir else None)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("num_epochs=3", "train.num_train_epochs"),
        ("cutoff_len=2048", "data.max_seq_length"),
        ("sequence_len=2048", "data.max_seq_length"),
        ("lora_rank=8", "tuner.lora_r"),
        ("load_in_4bit=true", "tuner=qlora"),
        ("bf16=true", "precision=bf16"),
        ("optim.lr=1e-4", "optim.learning_rate"),
        ("output=/tmp/x", "output_dir"),
        ("training_args.per_device_train_batch_size=2", "train.per_device_train_batch_size"),
        ("trainer.max_steps=2", "train.max_steps"),
        ("lora.r=8", "tuner.lora_r"),
        ("LoRA-Alpha=8", "tuner.lora_alpha"),
        ("+datasets=my.jsonl", "data.train"),
        ("micro_batch_size=2", "train.per_device_train_batch_size"),
        ("report_to=wandb", "tracker=wandb"),
        ("flash_attention=true", "model.attn_implementation=flash_attention_2"),
        ("adam_beta2=0.95", "optim.betas=[BETA1,BETA2]"),
        ("optimizer=lion", "optim=adamw"),
        ("train.optimizer=lion", "optim=adamw"),
    ],
)
def test_a_foreign_name_is_answered_with_the_key_it_means(override: str, meant: str) -> None:
    assert f": did you mean {meant!r}" in problem(override)


def test_what_there_is_no_key_for_says_so() -> None:
    assert "unknown key 'stage'; llmtune does supervised fine-tuning" in problem("stage=dpo")
    assert "4 bits, NF4; 8 bits are not there" in problem("load_in_8bit=true")


@pytest.mark.parametrize(
    ("group", "option"), [(group, one) for group, them in ABSENT_OPTIONS.items() for one in them]
)
def test_an_option_that_others_have_is_refused_with_the_reason(group: str, option: str) -> None:
    assert option not in GROUPS[group]
    start = f"{group}={option}: there is no such option: {ABSENT_OPTIONS[group][option]}"
    assert problem(f"{group}={option}").startswith(start)


@pytest.mark.parametrize(
    ("group", "option"), [(group, one) for group, them in ABSENT_OPTIONS.items() for one in them]
)
def test_its_dotted_form_is_refused_with_the_same_reason(group: str, option: str) -> None:
    key = {"optim": "optim.kind"}[group]
    config = compose_config(["model=tiny", f"{key}={option}"]).config
    (found,) = find_problems(config)
    assert found == f"{key}={option}: there is no such one: {ABSENT_OPTIONS[group][option]}"


@pytest.mark.parametrize("name", MEANINGS)
def test_every_meaning_is_a_key_or_a_group_that_there_is(name: str) -> None:
    keys = known_keys() | set(GROUPS)
    target, equals, value = MEANINGS[name].partition(" (")[0].partition("=")
    if MEANINGS[name].startswith("nothing: "):
        return
    assert target in keys
    if equals and value not in ("NAME@ROWS", "NEW", "[BETA1,BETA2]", "hf://USER/NAME"):
        read_override(f"{target}={value}", GROUPS)


@pytest.mark.parametrize(
    "name", [name for name in MEANINGS if not MEANINGS[name].startswith("nothing: ")]
)
def test_each_is_refused_with_its_meaning_in_any_group(name: str) -> None:
    target = MEANINGS[name].partition(" (")[0]
    for key in (name, f"trainer.{name}", name.upper()):
        with pytest.raises(ConfigError) as caught:
            read_override(f"{key}=1", GROUPS)
        assert f"unknown key {key!r}: did you mean {target!r}" in str(caught.value)


def test_options_and_own_files_are_told_as_well(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown option '--num_epochs=3': did you mean 'train.num_train_epochs'\?",
    ):
        parse(["--num_epochs=3"], VERBS)
    with pytest.raises(
        ConfigError, match="unknown option '--lora-rank': did you mean 'tuner.lora_r'"
    ):
        parse(["--lora-rank", "8"], VERBS)
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ntrain:\n  num_epochs: 3\n")
    assert "did you mean 'train.num_train_epochs'?" in problem(
        "experiment=mine", config_dir=tmp_path
    )


def test_a_model_that_is_no_option_is_told_its_key() -> None:
    assert "named by model.name_or_path=org/model" in problem("model=org/model")
    assert "named by data.train=my.jsonl" in problem("data=my.jsonl")


def test_the_page_has_all_of_them() -> None:
    page = foreign_table.PAGE.read_text()
    assert page == foreign_table.make_page(), "run python -m scripts.foreign_table"
    assert [name for name in MEANINGS if f"`{name}`" not in page] == []


def test_a_page_that_is_behind_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "from-other-tools.md"
    page.write_text(foreign_table.make_page().replace("`lora_rank`", "`rank`"))
    monkeypatch.setattr(foreign_table, "PAGE", page)
    assert foreign_table.main(["--check"]) == 1
    assert "run python -m scripts.foreign_table" in capsys.readouterr().err
    assert foreign_table.main([]) == 0
    assert foreign_table.main(["--check"]) == 0


def test_its_example_of_a_file_composes(tmp_path: Path) -> None:
    """The file that the page shows, and the command behind it."""
    blocks = [
        token.content
        for token in MarkdownIt("commonmark").parse(foreign_table.PAGE.read_text())
        if token.type == "code_block"
    ]
    file, command = blocks[0].split("\n\n")
    name, text = file.split("\n", 1)
    target = tmp_path / name.removeprefix("# mine/")
    target.parent.mkdir()
    target.write_text(text)
    words = command.split()[3:]
    assert words == ["--config-dir", "mine", "experiment=first"]
    config = compose_config(words[2:], str(tmp_path)).config
    assert (config.model.name_or_path, config.tuner.lora_r) == ("Qwen/Qwen3-4B", 32)
