"""``predict`` of language models: what is answered, and that no row changes another's answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmtune.cli.main import main
from llmtune.model.sampling import make_sampler
from tests.predict.models import read_rows, write_rows

SHORT = ["precision=fp32", "predict.max_new_tokens=6"]
QUESTIONS = [f"what is {'very ' * (number % 9)}{number}?" for number in range(11)]


def predict(model: Path, rows: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    command = ["predict", f"base={model}", f"predict.input={rows}", f"predict.output={out}"]
    assert main([*command, *SHORT, *more]) == 0
    return read_rows(out)


def answer_alone(model: Path, text: str, special: bool) -> str:
    """The greedy answer of transformers to one text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    encoded = tokenizer(text, add_special_tokens=special, return_tensors="pt")
    output = loaded.generate(
        **encoded, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    answer = output[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_every_shape_of_row_is_answered_as_by_itself(writer: Path, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "hi there"}
    before = {"role": "assistant", "content": "hello"}
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": [asked, before, asked]},
        "answered": {"messages": [asked, before, asked, {"role": "assistant", "content": ""}]},
        "conversations": {"conversations": [{"from": "human", "value": "hi there"}]},
        "instruction": {"instruction": "add", "input": "1 2", "output": "3"},
        "prompt": {"prompt": "once upon"},
        "text": {"text": "once upon", "label": 1},
    }
    files = [write_rows(tmp_path / f"{name}.jsonl", [row]) for name, row in rows.items()]
    source = "[" + ",".join(map(str, files)) + "]"
    (tmp_path / "source.txt").write_text(source)
    command = ["predict", f"base={writer}", f"predict.input={source}", *SHORT]
    assert main([*command, f"predict.output={tmp_path / 'out.jsonl'}"]) == 0
    found = dict(zip(rows, read_rows(tmp_path / "out.jsonl"), strict=True))
    tokenizer: Any = AutoTokenizer.from_pretrained(writer)

    def chat(*turns: dict[str, str]) -> str:
        text = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=True
        )
        return answer_alone(writer, text, False).strip()

    assert found["messages"]["text"] == chat(asked, before, asked)
    assert found["answered"]["text"] == found["messages"]["text"]
    assert found["answered"]["messages"] == rows["answered"]["messages"]
    assert found["conversations"]["text"] == chat(asked)
    assert found["instruction"]["text"] == chat({"role": "user", "content": "add\n\n1 2"})
    assert found["instruction"]["output"] == "3"
    assert found["prompt"]["text"] == answer_alone(writer, "once upon", True)
    assert len({row["text"] for row in found.values()}) > 3
    assert found["text"] == {
        "input_text": "once upon",
        "label": 1,
        "row": 5,
        "text": found["prompt"]["text"],
    }


@pytest.fixture(scope="module")
def writer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token depends on all before it."""
    folder = tmp_path_factory.mktemp("writer")
    torch.manual_seed(6)
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    config.initializer_range = 0.3
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", [[], ["predict.temperature=0.9", "predict.top_p=0.95"]])
def test_no_row_changes_the_answer_of_another(how: list[str], writer: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"instruction": text} for text in QUESTIONS])
    together = predict(writer, rows, tmp_path / "a.jsonl", *how)
    alone = predict(writer, rows, tmp_path / "b.jsonl", *how, "predict.batch_size=1")
    assert together == alone
    assert len({row["text"] for row in together}) > 5
    if how:
        other = predict(writer, rows, tmp_path / "c.jsonl", *how, "predict.seed=7")
        assert [row["text"] for row in other] != [row["text"] for row in together]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -torch.inf]])
    draws = (torch.arange(4000) + 0.5) / 4000
    for top_p, left in ((1.0, 4), (0.9, 2)):
        sampler = make_sampler(draws[:, None], 3, 0.5, top_p)
        chosen = sampler(torch.zeros(4000, 3), logits.expand(4000, -1)).argmax(-1)
        shares = (logits / 0.5).softmax(-1)[0]
        shares[left:] = 0
        expected = shares / shares.sum()
        found = torch.bincount(chosen, minlength=5) / 4000
        assert torch.allclose(found, expected, atol=1e-3)


def test_what_cannot_be_answered_is_refused_by_its_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    lines: list[Any] = [
        {"messages": [good, answer]},
        {"messages": [answer]},
        "{broken",
        {"messages": [{"role": "user", "content": " "}]},
        {"messages": [{"role": "user", "content": "a <|im_end|> b"}]},
        {"messages": [{"role": "user", "content": "word " * 9000}]},
        {"messages": [good]},
    ]
    rows = write_rows(tmp_path / "in.jsonl", lines)
    out = tmp_path / "out.jsonl"
    command = ["predict", f"base={tiny_model}", f"predict.input={rows}", *SHORT]
    assert main([*command, f"predict.output={out}"]) == 4
    error = capsys.readouterr().err
    for line, part in {
        2: "all of 'messages' is the assistant's: there is nothing to answer",
        3: "broken JSON",
        4: "nothing but white space",
        5: "holds '<|im_end|>'",
        6: "leave room for an answer",
    }.items():
        assert f"{rows}:{line}: " in error, error
        assert part in error
    assert "no row has been predicted" in error
    assert not out.exists()

    assert main([*command, f"predict.output={out}", "data.on_bad_row=skip", "--json"]) == 0
    found = read_rows(out)
    assert [row["row"] for row in found] == list(range(7))
    assert [row["text"] is None for row in found] == [False, *[True] * 5, False]
    assert all(("error" in row) == (row["text"] is None) for row in found)
    assert set(found[2]) == {"row", "text", "error"}
