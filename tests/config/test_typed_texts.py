"""What the user types arrives, whatever it looks like to Hydra, OmegaConf or YAML, and survives the
way to the ranks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llmtune.config.compose import compose_config, config_groups
from llmtune.config.composed import with_overrides
from llmtune.config.keys import is_text, known_keys, may_be_null
from llmtune.config.overrides import Setting, read_override, unquote
from llmtune.config.schema import Config
from llmtune.config.stored import (
    dump_redacted,
    dump_yaml,
    from_plain,
    load_config,
    read_key,
    to_plain,
)
from llmtune.config.value_rules import PATHS
from llmtune.errors import ConfigError
from llmtune.run.settings import find_problems

TEXT_KEYS = sorted(filter(is_text, known_keys()))
#: Texts among which a rule of the configuration allows only some.
RULED = {"checkpoint.metric_for_best_model"}

SPECIAL = [
    "\\",
    "'",
    '"',
    ",",
    "[",
    "]",
    "{",
    "}",
    "(",
    ")",
    "$",
    "${",
    "${oc.env:HOME}",
    "${seed}",
    "=",
    "#",
    ":",
    "\n",
    "\t",
]
SPECIAL += [
    " ",
    "null",
    "true",
    "no",
    "1",
    "1e5",
    "0x1",
    "~",
    "---",
    "???",
    "!",
    "&",
    "*",
    "%",
    "@5",
    "é",
    "漢",
    "😀",
    "\u2028",
    "\x85",
]
#: What a shell hands over: no NUL, and bytes that are no UTF-8 as lone surrogates.
LETTERS = st.one_of(
    st.sampled_from(SPECIAL),
    st.characters(min_codepoint=1, exclude_categories=["Cs"]),
    st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
)
TEXTS = st.lists(LETTERS, max_size=8).map("".join)


def is_quoted(text: str) -> bool:
    """Whether the text begins and ends with the same quote, which Hydra takes off."""
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def quote(text: str) -> str:
    """A text in Hydra's quotes."""
    escaped, backslashes = "", 0
    for letter in text:
        escaped += "\\" * (backslashes + 1) if letter == "'" else ""
        backslashes = backslashes + 1 if letter == "\\" else 0
        escaped += letter
    return f"'{escaped}{backslashes * chr(92)}'"


def typed(key: str, text: str) -> object:
    override = read_override(f"{key}={text}", config_groups())
    assert isinstance(override, Setting)
    assert override.key == key
    return override.value


def test_the_schema_has_the_texts_that_are_meant() -> None:
    assert {
        "chat.prompt",
        "chat.system",
        "output_dir",
        "tracker.project",
        "run_name",
        "tuner.adapter_path",
    } <= set(TEXT_KEYS)
    assert len(TEXT_KEYS) >= 25


@settings(max_examples=400, deadline=None)
@given(key=st.sampled_from(TEXT_KEYS), text=TEXTS)
@example(key="chat.prompt", text=r"which regex is \d+ ?")
@example(key="output_dir", text="a\\b\\")
@example(key="chat.prompt", text="in bash, what is ${HOME}?")
@example(key="chat.prompt", text="${")
@example(key="chat.prompt", text='"yes" or no?')
@example(key="chat.prompt", text="'tis \"quoted'")
@example(key="chat.prompt", text="???")
@example(key="tracker.project", text=" a,b ")
def test_a_text_is_what_was_typed(key: str, text: str) -> None:
    assume(text != "null" and not is_quoted(text))
    assert typed(key, text) == text


@settings(max_examples=400, deadline=None)
@given(key=st.sampled_from(TEXT_KEYS), text=TEXTS)
@example(key="chat.prompt", text="null")
@example(key="chat.prompt", text="'a'")
@example(key="chat.prompt", text="it's \\")
def test_every_text_can_be_sent_in_quotes(key: str, text: str) -> None:
    assert typed(key, quote(text)) == text


@settings(max_examples=400, deadline=None)
@given(
    inner=st.lists(st.sampled_from(["\\", "'", '"', "a", " ", ",", "$", "]"]), max_size=8).map(
        "".join
    ),
    mark=st.sampled_from("'\""),
)
def test_quotes_are_read_as_hydra_reads_them(inner: str, mark: str) -> None:
    text = f"{mark}{inner}{mark}"
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        # No quoted text as a whole: it stands for itself.
        assert unquote(text) == text
    else:
        # What Hydra takes for several values, such as 'a','b', is one text here.
        assert unquote(text) == (value if isinstance(value, str) else text)


def test_null_unsets_what_can_be_unset_and_is_refused_elsewhere() -> None:
    for key in TEXT_KEYS:
        if may_be_null(key):
            assert typed(key, "null") is None
        else:
            with pytest.raises(ConfigError, match=f"{key}=null: it needs a value"):
                typed(key, "null")


@settings(max_examples=4, deadline=None)
@given(
    texts=st.lists(
        TEXTS.filter(lambda text: text != "null" and not is_quoted(text)),
        min_size=len(TEXT_KEYS),
        max_size=len(TEXT_KEYS),
    )
)
@example(texts=["???"] * len(TEXT_KEYS))
@example(texts=["\\${oc.env:HOME}\\\\${seed}\\"] * len(TEXT_KEYS))
@example(texts=["1e5"] * len(TEXT_KEYS))
@example(texts=["2024-01-01"] * len(TEXT_KEYS))
def test_all_texts_of_a_config_survive_the_file_and_the_way_to_the_ranks(texts: list[str]) -> None:
    wanted = {
        key: text
        for key, text in zip(TEXT_KEYS, texts, strict=True)
        if key not in RULED and key != "run_name"
    }
    wanted = {key: text for key, text in wanted.items() if text.strip() or key not in PATHS}
    composed = compose_config(["tuner=lora", *(f"{key}={text}" for key, text in wanted.items())])
    config = composed.config
    assert {key: read_key(config, key) for key in wanted} == wanted
    assert from_plain(json.loads(json.dumps(to_plain(config)))) == config
    assert with_overrides(compose_config(["model=tiny"]).config, composed).chat == config.chat


@settings(max_examples=15, deadline=None)
@given(text=TEXTS)
@example(text="???")
@example(text="${oc.env:HOME}")
@example(text="'")
@example(text="\\${seed}")
@example(text="\x85")
def test_a_text_survives_the_run_folder(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = compose_once()
    config.chat.prompt = text
    config.zero.deepspeed = {"note": [text, {"more": text}]}
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    file.write_text(dump_redacted(config), encoding="utf-8")
    assert load_config(file) == config


def compose_once() -> Config:
    config: Config = from_plain(PLAIN)
    return config


PLAIN = to_plain(compose_config(["model=tiny"]).config)


def test_an_experiment_cannot_look_anything_up_for_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared file must not get variables of the environment into what is sent to a model, nor
    into its answer.
    """
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-hush")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "shared.yaml").write_text(
        "# @package _global_\nrun_name: r-${seed}-${tuner.lora_r}\n"
        "chat:\n  prompt: 'say ${oc.env:SOME_TOKEN}'\n  system: 'you are \\${x} ${seed}'\n"
    )
    composed = compose_config(["experiment=shared", "tuner.lora_r=8"], str(tmp_path))
    assert composed.config.chat.prompt == "say ${oc.env:SOME_TOKEN}"
    assert composed.config.chat.system == "you are ${x} ${seed}"
    assert "hush" not in composed.yaml
    # Elsewhere a file of the user's own may refer to other keys, and sees what the command line
    # said.
    assert composed.config.run_name == "r-42-8"


@pytest.mark.parametrize(
    "text", ["run_name: r-${no.such.key}", "run_name: ${", "seed: ${oc.env:NO_SUCH_VARIABLE}"]
)
def test_an_interpolation_of_a_file_that_leads_nowhere_is_a_problem_of_the_configuration(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError):
        compose_config(["experiment=broken"], str(tmp_path))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("tuner.lora_r=8,16", "one value, because a command is one run"),
        ("zero.stage=2,3", "one value, because a command is one run"),
        ("model=tiny,smollm2_135m", "one value, because a command is one run"),
        ("optim.learning_rate=range(1,3)", "one value, because a command is one run"),
        ("seed=choice(1,2)", "one value, because a command is one run"),
        ("model.config.layer_types=a,b", "a list is written model.config.layer_types=[a,b]"),
        ("train.max_steps=${seed}", "nothing is interpolated on the command line"),
        ("data.train={path: par (1).jsonl}", "needs quotes: {path: 'a (1).jsonl'}"),
        ("tuner.target_modules=q_proj", "or a list such as [q_proj,v_proj]"),
    ],
)
def test_what_is_no_value_is_answered_with_how_to_write_it(override: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([override], more_rules=find_problems)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("tuner.target_modules=q_proj,v_proj", "tuner.target_modules", ["q_proj", "v_proj"]),
        ("tuner.target_modules=[q_proj, 'v_proj']", "tuner.target_modules", ["q_proj", "v_proj"]),
        ("tuner.target_modules=[q_proj]", "tuner.target_modules", ["q_proj"]),
        ("tuner.target_modules='all-linear'", "tuner.target_modules", "all-linear"),
        ("optim.betas=0.9,0.95", "optim.betas", [0.9, 0.95]),
        ("optim.betas=[0.9,0.95]", "optim.betas", [0.9, 0.95]),
        (
            "data.train=[a b.jsonl, 'c,d.jsonl', 1e5, {path: e.jsonl, limit: 3}]",
            "data.train",
            ["a b.jsonl", "c,d.jsonl", "1e5", {"path": "e.jsonl", "limit": 3}],
        ),
        ("data.train={path: 'f (1).jsonl'}", "data.train", {"path": "f (1).jsonl"}),
        (
            "data.train={path: a.jsonl},{path: b.jsonl}",
            "data.train",
            [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
        ),
        (
            "data.train=s3://b/a.jsonl,s3://b/c.jsonl",
            "data.train",
            ["s3://b/a.jsonl", "s3://b/c.jsonl"],
        ),
        ("data.train=https://h/a,b.jsonl", "data.train", "https://h/a,b.jsonl"),
        ("data.train=${HOME}/a\\b.jsonl", "data.train", "${HOME}/a\\b.jsonl"),
        ("data.eval=null", "data.eval", None),
        ("data.overlong=raise", "data.overlong.value", "raise"),
        ("hardware.gpu_memory_bytes=80GB", "hardware.gpu_memory_bytes", "80GB"),
    ],
)
def test_lists_and_names_of_files(override: str, key: str, value: object) -> None:
    data = [] if override.startswith("data.train") else ["data.train=x.jsonl"]
    assert read_key(compose_config([override, *data]).config, key) == value


@pytest.mark.parametrize(
    "name",
    ["a,b.jsonl", "par (1).jsonl", "[x].jsonl", "[y]", "{z}.jsonl", "q'.jsonl", "a,b@2.jsonl"],
)
def test_a_file_that_is_there_is_one_file_whatever_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    Path("c.jsonl").touch()
    assert compose_config([f"data.train={name}"]).config.data.train == name
    assert (
        compose_config([f"data.train={tmp_path}/{name}@3"]).config.data.train
        == f"{tmp_path}/{name}@3"
    )
    assert compose_config([f"data.train={quote(name)}"]).config.data.train == name
    assert compose_config([f"data.train=[c.jsonl,{quote(name)}]"]).config.data.train == [
        "c.jsonl",
        name,
    ]


def test_names_between_commas_are_a_list_where_each_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).touch()
    assert compose_config(["data.train=a.jsonl,b.jsonl@5"]).config.data.train == [
        "a.jsonl",
        "b.jsonl@5",
    ]
    assert compose_config(["data.train=a.jsonl,b*.jsonl"]).config.data.train == [
        "a.jsonl",
        "b*.jsonl",
    ]
    assert (
        compose_config(["data.train=a.jsonl,none.jsonl"]).config.data.train == "a.jsonl,none.jsonl"
    )
