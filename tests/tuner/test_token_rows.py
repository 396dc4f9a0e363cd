"""Rows of single tokens are trained as peft trains them, and what cannot be is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmtune.config.compose import compose_config
from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.config.groups.tuner import TunerConfig
from llmtune.engine.distributed import Rank
from llmtune.errors import ConfigError
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.model.source import resolve_model_folder
from llmtune.model.token_folder import find_token_numbers, resolve_base_folder
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.run.prepare import check_token_rows
from llmtune.run.settings import find_problems
from llmtune.storage.layout import ADAPTER_WEIGHTS
from llmtune.train.adapters.attach import attach_tuner
from llmtune.tuner.head import NO_HEAD
from llmtune.tuner.kinds.lora import LoraTuner
from llmtune.tuner.peft_model import write_adapter_config
from llmtune.tuner.stored_adapter import to_file_name
from llmtune.tuner.token_rows.settings import TOKEN_ROWS
from tests.architectures.families import FAMILIES
from tests.support import largest_difference
from tests.tuner.test_coverage import note

TOKENS = [3, 9, 11]
ALONE = Rank(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
#: A scaled table, positions beside the table, a projection in front of the layers, experts.
TRIED = ["llama", "gpt2", "gemma3_text", "opt", "mixtral", "bloom", "cohere"]


def make_model(family: str, tied: bool) -> Any:
    settings = AutoConfig.for_model(family, **FAMILIES[family])
    settings.tie_word_embeddings = tied
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


def tuner(**keys: Any) -> TunerConfig:
    return replace(compose_config(["model=tiny"]).config.tuner, lora_r=2, **keys)


def plain(name: str) -> str:
    return name.replace(".default", "")


def results(model: Any, ids: torch.Tensor) -> dict[str, list[float]]:
    """Logits and gradients, with adapters that are not what they were drawn as."""
    drawn = torch.Generator().manual_seed(1)
    trained = {plain(name): one for name, one in model.named_parameters() if one.requires_grad}
    with torch.no_grad():
        for name in sorted(trained):
            trained[name].copy_(torch.randn(trained[name].shape, generator=drawn) / 4)
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    found = {name: one.grad.flatten().tolist() for name, one in trained.items()}
    return {"logits": logits.flatten().tolist(), **found}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TRIED)
def test_logits_and_gradients_are_pefts(family: str, tied: bool) -> None:
    base = make_model(family, tied)
    names = {id(module): name for name, module in base.named_modules()}
    inputs, output = base.get_input_embeddings(), base.get_output_embeddings()
    assert (output.weight is inputs.weight) is tied
    asked: Any = TOKENS
    if not tied:
        asked = {names[id(inputs)]: TOKENS, names[id(output)]: [5]}
    settings = tuner(trainable_token_indices=asked)
    ours = LoraTuner().attach(copy.deepcopy(base), settings, "base", 0)
    targets = LoraTuner().choose_layers(base, settings).endings
    theirs = get_peft_model(
        base, LoraConfig(r=2, target_modules=targets, trainable_token_indices=asked, lora_alpha=32)
    ).eval()
    assert ours.peft_config["default"].trainable_token_indices == asked
    ids = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(2))
    own, other = results(ours.eval(), ids), results(theirs, ids)
    assert own.keys() == other.keys()
    for name, values in own.items():
        largest = max(map(abs, other[name])) or 1
        assert largest_difference(values, other[name]) < 1e-4 * largest, name


def test_padding_has_no_gradient_as_in_torch() -> None:
    base = make_model("llama", tied=False)
    base.model.embed_tokens.padding_idx = 9
    model = LoraTuner().attach(base, tuner(trainable_token_indices=TOKENS), "base", 0)
    found = results(model, torch.tensor([[9, 3, 9]]))
    rows = (
        torch.tensor(
            found["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
        )
        .view(3, -1)
        .abs()
        .sum(1)
    )
    assert rows.gt(0).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tuner.trainable_token_indices=[3,-1]"], "-1 is neither the number of a token"),
        (["tuner.trainable_token_indices=[3,5,3]"], "3 is there twice"),
        (["tuner.trainable_token_indices=[true]"], "True is neither the number of a token"),
        (["tuner.trainable_token_indices=['']"], "'' is neither the number of a token"),
        (["tuner.trainable_token_indices=[1.5]"], "1.5 is neither the number of a token"),
        (["tuner.trainable_token_indices=[a,3,a]"], "a is there twice"),
        (["tuner.trainable_token_indices=5"], "a list of tokens, by number or text"),
        (["tuner.trainable_token_indices={lm_head: []}"], "lists by table"),
        (["tuner.trainable_token_indices=[]"], "a list of tokens, by number or text"),
        (["tuner=full", "tuner.trainable_token_indices=[3]"], "needs tuner=lora"),
        (
            ["tuner.trainable_token_indices=[3]", "tuner.adapter_path=some/folder"],
            "merge it with `export base= adapter= output_dir=`",
        ),
    ],
)
def test_impossible_values_are_found_before_anything(overrides: list[str], message: str) -> None:
    config = compose_config(["model=tiny", *overrides]).config
    (problem,) = find_problems(config)
    assert "tuner.trainable_token_indices=" in problem
    assert message in problem


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tuner.trainable_token_indices=[3,512]"], "512 is no row of model.embed_tokens"),
        (["tuner.trainable_token_indices={lm_head: [3]}"], "lm_head is not one of the tables"),
        (["tuner.trainable_token_indices={q_proj: [3]}"], "q_proj is not one of the tables"),
        (
            ["tuner.trainable_token_indices=[3]", "tuner.target_modules=[lm_head]"],
            "lm_head has an adapter",
        ),
        (
            [
                *("tuner.trainable_token_indices=[3]", "tuner.modules_to_save=[embed_tokens]"),
                "model.config.tie_word_embeddings=false",
            ],
            "is trained whole",
        ),
    ],
)
def test_what_the_model_does_not_allow_is_found_by_the_plan(
    overrides: list[str], message: str
) -> None:
    config = compose_config(["model=tiny", *overrides]).config
    with pytest.raises(ConfigError, match=r"tuner\.trainable_token_indices") as error:
        resolve_shape(config.model, config.tuner)
    assert message in str(error.value)


def test_a_projection_with_a_bias_is_refused_where_rows_of_it_are_trained() -> None:
    model = make_model("phi", tied=False)
    assert LoraTuner().find_token_tables(model, tuner(trainable_token_indices=TOKENS))
    with pytest.raises(ConfigError, match="lm_head has a bias"):
        LoraTuner().find_token_tables(model, tuner(trainable_token_indices={"lm_head": TOKENS}))


def test_the_plan_counts_the_rows_and_says_their_share() -> None:
    rows = "tuner.trainable_token_indices=[3,9,11]"
    untied = [
        "model.config.tie_word_embeddings=false",
        "tuner.trainable_token_indices={embed_tokens: [3,9], lm_head: [5]}",
    ]

    def trained(*overrides: str) -> int:
        config = compose_config(["model=tiny", *overrides]).config
        return resolve_shape(config.model, config.tuner).trainable_parameters

    assert trained(rows) - trained() == 3 * 64
    # How many rows there are is known before any text is looked up.
    assert trained("tuner.trainable_token_indices=[3,'<think>',x]") == trained(rows)
    assert trained(*untied) - trained(untied[0]) == 3 * 64
    # 3 of 512 rows.
    assert "embeddings 0.586 %" in note(None, rows)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_stored_is_merged_as_peft_merges_it(
    tied: bool, cache: Path, tmp_path: Path
) -> None:
    config = compose_config(["model=tiny", f"model.config.tie_word_embeddings={tied}"]).config
    folder = resolve_model_folder(config.model, cache)
    asked: Any = TOKENS if tied else {"embed_tokens": TOKENS, "lm_head": [5]}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = tuner(trainable_token_indices=asked)
    model = LoraTuner().attach(base, settings, str(folder), 0).eval()
    ids = torch.arange(16).view(1, 16)
    results(model, ids)
    trained = {
        to_file_name(name): one for name, one in model.named_parameters() if one.requires_grad
    }
    adapter = tmp_path / "adapter"
    write_adapter_config(model, adapter)
    save_file({name: one.detach() for name, one in trained.items()}, adapter / ADAPTER_WEIGHTS)
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(adapter))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert float((theirs.eval()(input_ids=ids).logits - logits).abs().max()) < 1e-5
    request = ExportRequest(
        base=folder, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "merged"
    )
    merged = AutoModelForCausalLM.from_pretrained(
        run_export(request, ExportConfig(dtype=ExportDtype.fp32)), dtype=torch.float32
    )
    expected = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert float((merged(input_ids=ids).logits - logits).abs().max()) < 1e-4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = compose_config(["model=tiny"]).config.model
    return resolve_model_folder(config, tmp_path_factory.mktemp("cache"))


def single_tokens(tokenizer: Any, count: int) -> dict[str, int]:
    """Texts that the tokenizer encodes as one token each, with their numbers."""
    texts = (tokenizer.decode([number]) for number in range(len(tokenizer)))
    encoded = ((text, tokenizer.encode(text, add_special_tokens=False)) for text in texts if text)
    found = {text: ids[0] for text, ids in encoded if len(ids) == 1}
    return dict(list(found.items())[-count:])


@pytest.mark.parametrize("by_table", [False, True])
def test_a_text_that_is_one_token_is_trained_as_its_number(tiny: Path, by_table: bool) -> None:
    words = single_tokens(AutoTokenizer.from_pretrained(tiny), 3)
    end = AutoTokenizer.from_pretrained(tiny).eos_token
    texts = [*words, end]
    numbers = [*words.values(), AutoTokenizer.from_pretrained(tiny).eos_token_id]
    given: Any = [3, *texts]
    wanted: Any = [3, *numbers]
    if by_table:
        given, wanted = {"embed_tokens": given}, {"embed_tokens": wanted}
    found = []
    for asked in (given, wanted):
        config = compose_config(["model=tiny", "data.train=a.jsonl"]).config
        config.tuner.trainable_token_indices, config.tuner.lora_r = asked, 2
        request: Any = SimpleNamespace(
            config=config, model_folder=tiny, base_name="tiny", resume_from=None
        )
        base = AutoModelForCausalLM.from_pretrained(tiny)
        model = attach_tuner(base, request, ALONE, NO_HEAD)
        stored = model.peft_config["default"].trainable_token_indices
        rows = {name: one for name, one in model.named_parameters() if TOKEN_ROWS in name}
        found.append((stored, rows))
    (stored, rows), (by_number, other) = found
    assert stored == by_number == [3, *numbers]
    assert rows.keys() == other.keys()
    assert rows
    assert all(torch.equal(one, other[name]) for name, one in rows.items())


@given(text=st.text(st.sampled_from("abde <|>_é"), max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_text_is_a_token_exactly_where_its_encoding_is(tiny: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1:
        assert find_token_numbers(tokenizer, [text], "tiny") == {text: ids[0]}
        return
    with pytest.raises(ConfigError, match=r"tuner\.trainable_token_indices") as error:
        find_token_numbers(tokenizer, [text], "tiny")
    message = str(error.value)
    assert f"tuner.new_tokens=[{text!r}]" in message
    tokens = tokenizer.convert_ids_to_tokens(ids)
    said = f"{len(ids)} tokens of tiny ({', '.join(map(repr, tokens))})"
    assert (said if ids else "is no token of tiny") in message


def test_what_only_the_tokenizer_knows_is_found_before_ranks_start(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (word,) = words = single_tokens(tokenizer, 1)

    def problem(asked: Any, new: list[str], folder: Path = tiny) -> str:
        config = compose_config(["model=tiny", "data.train=a.jsonl"]).config
        config.tuner.trainable_token_indices, config.tuner.new_tokens = asked, new
        with pytest.raises(ConfigError, match=r"tuner\.trainable_token_indices") as error:
            check_token_rows(config, AutoTokenizer.from_pretrained(folder), folder)
        return str(error.value)

    assert "are the same token; leave one of them out" in problem([words[word], word], [])
    assert "a b" in problem(["a b c d"], [])
    grown = resolve_base_folder(
        compose_config(["model=tiny"]).config.model, ["<|a|>"], tiny.parent, lambda _: None
    )
    for asked in ([512], ["<|a|>"], {"embed_tokens": [3, 512]}):
        said = problem(asked, ["<|a|>"], grown)
        assert "<|a|> of tuner.new_tokens is token 512, whose row is trained already" in said
    tokenizer.add_tokens(["<|far|>"])
    config = compose_config(["model=tiny", "data.train=a.jsonl"]).config
    config.tuner.trainable_token_indices = ["<|far|>"]
    with pytest.raises(ConfigError, match="token 512 of the tokenizer of .*model has 512 rows"):
        check_token_rows(config, tokenizer, tiny)
