"""``eval``, ``predict`` and ``chat`` of runs whose adapter has more than matrices for layers: what
transformers and peft say of the stored adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.cli.main import main
from llmtune.data.prepared_data import open_rows
from llmtune.plan.run_record import RunRecord
from tests.predict.models import read_rows, write_rows
from tests.support import first

pytestmark = pytest.mark.process

EXPERTS = [
    *("model.config.model_type=qwen3_moe", "+model.config.num_experts=4"),
    *("+model.config.moe_intermediate_size=32", "+model.config.num_experts_per_tok=2"),
]
#: Overrides of a run, and what its answers have.
KINDS: dict[str, tuple[list[str], str]] = {
    "experts": (
        [*EXPERTS, "tuner.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"],
        "",
    ),
    "token rows": (["tuner.trainable_token_indices=[11,40,3]"], ""),
    "new tokens": (["tuner.new_tokens=['<call>','</call>']"], "call>"),
    "qlora with new tokens": (["tuner=qlora", "tuner.new_tokens=['<call>','</call>']"], "call>"),
}
WORDS = ("str", "int", "dict", "list", "open")
LENGTH = 8


@pytest.fixture(
    scope="module",
    params=first(2, ["experts", "qlora with new tokens", "token rows", "new tokens"]),
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has seen a few rows, with a name that says which."""
    folder = tmp_path_factory.mktemp("run")
    said = [f"<call>{word}</call> <call>{number}</call>" for number, word in enumerate(WORDS * 6)]
    asked = [f"What is {word}?" for word in WORDS * 6]
    rows = [
        {"messages": [as_turn("user", question), as_turn("assistant", answer)]}
        for question, answer in zip(asked, said, strict=True)
    ]
    tuner, _ = KINDS[request.param]
    command = [
        *("model=tiny", f"data.train={write_rows(folder / 'rows.jsonl', rows)}", *tuner),
        *("data.max_seq_length=128", "data.val_set_size=6", "train.max_steps=5", "precision=fp32"),
        *("train.global_batch_size=8", "optim.learning_rate=2e-2", "train.sample_answers=false"),
        *("launch.nproc=1", "export=none"),
    ]
    run = folder / str(request.param).replace(" ", "-")
    assert main([*command, f"output_dir={run}"]) == 0
    return run


def as_turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def load(run: Path) -> tuple[Any, Any, RunRecord]:
    """The model and the tokenizer by peft and transformers alone, and the record of the run."""
    record = RunRecord.from_json((run / "plan.json").read_text())
    assert record.model_folder is not None
    base = AutoModelForCausalLM.from_pretrained(record.model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    return model, AutoTokenizer.from_pretrained(run / "adapter"), record


def test_eval_predict_and_chat_say_what_peft_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, record = load(run)
    expected = [answer(model, tokenizer, f"What is {word}?") for word in WORDS]
    part = KINDS[run.name.replace("-", " ")][1]
    assert part in expected[0]
    with model.disable_adapter():
        assert answer(model, tokenizer, f"What is {WORDS[0]}?") != expected[0]
    questions = [{"messages": [as_turn("user", f"What is {word}?")]} for word in WORDS]
    given = write_rows(tmp_path / "in.jsonl", questions)
    out = tmp_path / "out.jsonl"
    command = [f"run={run}", f"predict.input={given}", f"predict.output={out}"]
    assert main(["predict", *command, f"predict.max_new_tokens={LENGTH}"]) == 0
    assert [row["text"] for row in read_rows(out)] == expected

    capsys.readouterr()
    asked = [f"chat.prompt={questions[0]['messages'][0]['content']}"]
    assert main(["chat", f"run={run}", *asked, f"chat.max_new_tokens={LENGTH}"]) == 0
    assert capsys.readouterr().out.strip() == expected[0].strip()

    assert main(["eval", f"run={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "warning" not in found
    assert found["eval_loss"] == pytest.approx(held_out_loss(model, record), abs=1e-5)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer of transformers to one question by itself."""
    turns = [as_turn("user", question)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(
        **encoded,
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    said = output[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True))


def held_out_loss(model: Any, record: RunRecord) -> float:
    """The mean cross entropy of the tokens of the answers that were held out."""
    assert record.data is not None
    rows = open_rows(record.data, "eval")
    total, count = 0.0, 0
    for number in range(len(rows)):
        row = rows.row(number)
        ids, judged = torch.tensor(row.ids.astype("int64")), torch.tensor(row.mask[1:])
        with torch.no_grad():
            likelihoods = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        losses = -likelihoods.gather(1, ids[1:, None])[:, 0]
        total, count = total + float(losses[judged].sum()), count + int(judged.sum())
    return total / count
