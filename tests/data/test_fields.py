"""What a row says beside its text is understood, refused by name, known to be harmless, or listed:
never dropped in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig
from llmtune.data.formats.format import FORMATS
from llmtune.data.formats.recipe import Recipe
from llmtune.data.prepare import prepare_data
from llmtune.data.read.parse_sources import parse_sources
from llmtune.data.rows.fields import HARMLESS, MASKED, TRAINED
from llmtune.data.rows.problems import RowError
from llmtune.errors import ConfigError, DataError
from llmtune.plan.prepared_data import PreparedData

QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

#: A good row of every format.
GOOD: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "messages": {"messages": [QUESTION, ANSWER]},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
    "classification": {"text": "a", "label": "x"},
}

#: Fields that change what is to be learned, with a value that they have in public data.
CHANGING: list[tuple[str, Any]] = [
    ("label", False),
    ("kto_tag", True),
    ("preference", "A"),
    ("rejected", "no"),
    ("rejected_response", "no"),
    ("chosen", "yes"),
    ("score", 0),
    ("score_chosen", 8.0),
    ("instruct_reward", -3.5),
    ("rating", 4),
    ("rank", 2),
    ("is_correct", False),
    ("feedback", "bad"),
    ("margin", 0.3),
    ("images", ["a.png"]),
    ("image_url", "a.png"),
    ("imageUrl", "a.png"),
    ("audio", {"path": "a.wav"}),
    ("videos", ["a.mp4"]),
    ("weight", 0.5),
    ("weight", 0),
    ("loss", False),
    ("train", 0),
    ("masked", True),
    ("loss_mask", [0, 1]),
    ("sample_weight", 2.0),
    ("mask", 1),
    ("input_ids", [1, 2]),
    ("labels", [-100, 2]),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("system_prompt", "Be brief."),
    ("reasoning", "because"),
    ("refusal", "no"),
    ("train_detail", [{"begin": 0}]),
    ("negative_answer", "no"),
    ("hard_negatives", ["no"]),
    ("dispreferred", "no"),
    ("non_preferred_answer", "no"),
    ("is_safe", False),
    ("toxic", True),
    ("better_response_id", 1),
    ("winner_model", "b"),
    ("is_wrong", True),
    ("incorrect", True),
    ("valid", False),
    ("passed", False),
    ("helpfulness", 0.5),
    ("verdict", "no"),
    ("best", "x"),
    *(("img", "a.png"), ("photo", "a.png"), ("mm_inputs", [1]), ("pictures", ["a"]), ("pixel", 1)),
    ("is_loss", False),
    ("include_in_loss", False),
    ("calculate_loss", False),
    ("do_train", False),
    ("skip", True),
    ("ignore", True),
    ("learnable", False),
    ("not_trained", True),
    ("use_for_training", False),
    ("turn_weight", 0.1),
    ("thought", "hm"),
    ("thoughts", "hm"),
    ("rationale", "hm"),
    ("chain_of_thought", "hm"),
    ("cot", "hm"),
    ("documents", ["a"]),
    ("reasoning_effort", "high"),
    ("thinking_budget", 3),
    ("add_generation_prompt", True),
]

#: Fields whose names look like those, and that say nothing of what is learned.
LOOKING_SO = (
    "weight_loss",
    "body_weight",
    "hair_loss",
    "skipping",
    "training_ground",
    "learner",
    "safety_belt",
    "validity",
)


@pytest.mark.parametrize("data_format", GOOD, ids=str)
@pytest.mark.parametrize(
    ("name", "value"), CHANGING, ids=[f"{name}={value}" for name, value in CHANGING]
)
def test_a_field_that_changes_what_is_learned_is_refused_by_name(
    data_format: str, name: str, value: Any
) -> None:
    if name in FORMATS.find(data_format).fields:
        return
    with pytest.raises(RowError) as caught:
        Recipe(data_format, {}).read({**GOOD[data_format], name: value})
    assert f"the field {name!r} (" in str(caught.value)
    assert f"ignore: [{name}]" in str(caught.value), "the next step"
    kept, unknown = Recipe(data_format, {}, frozenset({name})).read(
        {**GOOD[data_format], name: value}
    )
    assert kept == Recipe(data_format, {}).read(GOOD[data_format])[0]
    assert not unknown


MESSAGE_LEVEL = [
    (name, value)
    for name, value in [*CHANGING, ("tools", [{"name": "f"}]), ("attachments", ["a"])]
    if name not in (*TRAINED, *MASKED, "reasoning")
]


@pytest.mark.parametrize("data_format", ["messages", "sharegpt", "prompt_completion"])
@pytest.mark.parametrize(
    ("name", "value"), MESSAGE_LEVEL, ids=[f"{name}={value}" for name, value in MESSAGE_LEVEL]
)
def test_so_it_is_in_a_message(data_format: str, name: str, value: Any) -> None:
    row = GOOD[data_format]
    if data_format == "prompt_completion":
        row = {"prompt": [QUESTION], "completion": [{**ANSWER, name: value}]}
        place = "completion[0]"
    else:
        (field, turns), place = next(iter(row.items())), f"{next(iter(row))}[1]"
        row = {field: [turns[0], {**turns[1], name: value}]}
    with pytest.raises(RowError) as caught:
        Recipe(data_format, {}).read(row)
    assert str(caught.value).startswith(f"{place}: the field {name!r} (")
    Recipe(data_format, {}, frozenset({name})).read(row)


def test_so_it_is_in_a_part_of_a_message_and_in_a_call() -> None:
    def message(part: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        calls = [{"function": {"name": "f", "arguments": {}}, **call}]
        return {
            "role": "assistant",
            "content": [{"type": "text", "text": "b", **part}],
            "tool_calls": calls,
        }

    def read(part: dict[str, Any], call: dict[str, Any]) -> set[str]:
        return Recipe("messages", {}).read({"messages": [QUESTION, message(part, call)]})[1]

    assert (
        read(
            {"cache_control": {"type": "ephemeral"}, "train": True, "image_url": None},
            {"id": "x", "index": 0},
        )
        == set()
    )
    assert read({"color": "red"}, {"color": "red"}) == {
        "messages[].content[].color",
        "messages[].tool_calls[].color",
    }
    for part, call, where in (
        ({"train": False}, {}, "content[0]: the field 'train'"),
        ({"weight": 0}, {}, "content[0]: the field 'weight'"),
        ({"image_url": "x"}, {}, "content[0]: the field 'image_url'"),
        ({}, {"weight": 0}, "tool_calls[0]: the field 'weight'"),
        ({}, {"reward": 1}, "tool_calls[0]: the field 'reward'"),
    ):
        with pytest.raises(RowError) as caught:
            read(part, call)
        assert str(caught.value).startswith(f"messages[1].{where} (")


@pytest.mark.parametrize("data_format", GOOD, ids=str)
def test_a_name_that_only_looks_so_is_listed(data_format: str) -> None:
    _, unknown = Recipe(data_format, {}).read(
        {**GOOD[data_format], **dict.fromkeys(LOOKING_SO, "x")}
    )
    assert unknown == set(LOOKING_SO)


@pytest.mark.parametrize("name", [*TRAINED, *MASKED])
@pytest.mark.parametrize("value", [True, False, 1, 0, 1.0, 0.0, None])
def test_a_message_says_by_any_name_whether_it_is_trained(name: str, value: Any) -> None:
    row = {"messages": [QUESTION, {**ANSWER, name: value}, QUESTION, ANSWER]}
    conversation, unknown = Recipe("messages", {}).read(row)
    expected = None if value is None else bool(value) is not (name in MASKED)
    assert [message.train for message in conversation.messages] == [None, expected, None, None]
    assert not unknown
    turns = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"], **m}
        for m in row["messages"]
    ]
    shared = [{key: turn[key] for key in turn if key not in ("role", "content")} for turn in turns]
    assert Recipe("sharegpt", {}).read({"conversations": shared})[0] == conversation


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss": 0.5}, "messages[1]: 'loss' must be true or false, not 0.5"),
        ({"weight": 2}, "messages[1]: 'weight' must be true or false, not 2"),
        ({"training": "false"}, "messages[1]: 'training' must be true or false, not 'false'"),
        ({"train": True, "loss": False}, "messages[1]: 'loss' and 'train' contradict each other"),
        ({"masked": True, "weight": 1}, "messages[1]: 'masked' and 'weight' contradict each other"),
    ],
)
def test_what_is_ambiguous_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        Recipe("messages", {}).read({"messages": [QUESTION, {**ANSWER, **more}]})
    assert message in str(caught.value)


def test_switches_that_agree_are_one() -> None:
    row = {"messages": [QUESTION, {**ANSWER, "masked": True, "weight": 0, "loss": False}]}
    assert Recipe("messages", {}).read(row)[0].messages[1].train is False


@pytest.mark.parametrize("data_format", GOOD, ids=str)
def test_harmless_fields_and_empty_ones_are_ignored_in_silence(data_format: str) -> None:
    row = GOOD[data_format]
    harmless = dict.fromkeys(HARMLESS, "x") | {
        "prompt_id": 3,
        "created_at": "2024",
        "dataSource": "x",
        "licence": "MIT",
        "license": "MIT",
        "Task-ID": 1,
    }
    nothing: tuple[Any, ...] = (None, "", [], {})
    empty = {name: value for name, _ in CHANGING if name not in row for value in nothing}
    neutral = {"weight": 1.0, "train": True, "loss": 1, "masked": False, "training": "true"}
    conversation, unknown = Recipe(data_format, {}).read({**empty, **harmless, **neutral, **row})
    assert (conversation, unknown) == Recipe(data_format, {}).read(row)
    assert unknown == set()


@settings(deadline=None)
@given(
    more=st.dictionaries(
        st.text("bcdfghjk", min_size=1, max_size=6), st.none() | st.booleans() | st.text(max_size=3)
    ),
    data_format=st.sampled_from(list(GOOD)),
)
def test_a_field_that_nobody_knows_is_listed(more: dict[str, Any], data_format: str) -> None:
    _, unknown = Recipe(data_format, {}).read({**more, **GOOD[data_format]})
    assert unknown == {
        name for name, value in more.items() if value not in (None, "") and name not in HARMLESS
    }


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def prepare(tokenizer: Any, cache: Path, source: Any, **values: Any) -> PreparedData:
    return prepare_data(
        DataConfig(train=source, max_seq_length=128, val_set_size=0, **values), tokenizer, 1, cache
    )


def test_unknown_fields_are_listed_once_over_all_rows(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [{**GOOD["messages"], "mood": "good", "id": n} for n in range(3)]
    rows.append({"messages": [{**QUESTION, "avatar": "x"}, ANSWER], "mood": "bad"})
    source.write_text("\n".join(map(json.dumps, rows)))
    assert prepare(tokenizer, tmp_path, str(source)).unknown_fields == ["messages[].avatar", "mood"]
    assert prepare(tokenizer, tmp_path, str(source)).unknown_fields == [
        "messages[].avatar",
        "mood",
    ], "from the cache too"
    ignoring = {"path": str(source), "ignore": ["mood", "avatar"]}
    assert prepare(tokenizer, tmp_path, ignoring).unknown_fields == []


def test_a_preference_label_is_refused_by_its_line_unless_it_is_ignored(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q{n}", "completion": "x", "label": bool(n)} for n in range(2)]
    source.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        prepare(tokenizer, tmp_path, str(source))
    assert f"{source}:1: the field 'label' (False) says how good an answer is" in str(caught.value)
    assert "(2 like it)" in str(caught.value), "one kind, whatever the value"
    assert prepare(tokenizer, tmp_path, {"path": str(source), "ignore": ["label"]}).train.rows == 2


def test_what_is_ignored_does_not_name_the_format(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "once", "label": 3}))
    data = prepare(tokenizer, tmp_path, {"path": str(source), "ignore": ["label"]})
    assert (data.classes, data.train.rows) == ([], 1)


@pytest.mark.parametrize("ignore", ["label", [1]])
def test_what_is_to_be_ignored_is_a_list_of_names(ignore: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"data.train.ignore=.*: a list of fields such as \[label, score\]"
    ):
        parse_sources({"path": "a.jsonl", "ignore": ignore}, "data.train", "auto")


def test_a_column_of_labels_is_told_how_it_becomes_the_label(
    tokenizer: Any, tmp_path: Path
) -> None:
    """The name that transformers gives its targets; its rows look like continued pre-training."""
    rows = [{"text": f"t{n}", "labels": n % 2} for n in range(4)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match=r"add fields: \{label: labels\} to the source"):
        prepare(tokenizer, tmp_path, {"path": str(source)})
    named = {"path": str(source), "fields": {"label": "labels"}}
    assert prepare(tokenizer, tmp_path, named).classes == [0, 1]
