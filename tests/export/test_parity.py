"""The parity check passes what is right, in every kind of adapter, and names the module that is
wrong.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from llmtune.config.groups.export import ExportConfig, ExportDtype, GgufType
from llmtune.errors import ExportError
from llmtune.export.merge.peft_adapter import read_adapter
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.export.sources.tensor_source import SafetensorsSource
from llmtune.export.verify.export_checks import find_serving_problems
from llmtune.export.verify.parity import (
    ComparedModels,
    Parity,
    measure_parity,
    measure_parity_in_memory,
    probe_tokens,
)
from llmtune.export.verify.streamed_model import StreamedModel
from llmtune.model.skeleton import is_hollow
from tests.export.conftest import TOKENS, copy_tokenizer, make_adapter, make_base
from tests.export.test_merge import KINDS, export


def compare(
    base: Path, adapter: Path, merged: Path, dtype: torch.dtype = torch.float32, **settings: Any
) -> Parity:
    opened = read_adapter(adapter)
    sides = ComparedModels(
        base_folder=base,
        base=SafetensorsSource(base),
        adapter=opened,
        merged_folder=merged,
        merged=SafetensorsSource(merged),
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    return measure_parity(sides, probe_tokens(tokenizer, 512, [2, 9, 511]), dtype, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_kind_of_adapter_passes_when_it_was_merged_rightly(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    name, settings, _ = KINDS[kind]
    base = make_base(name, tmp_path / "base", tiny_model)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    parity = compare(base, adapter, export(base, adapter, tmp_path / "out"))
    assert parity.logits is not None
    assert parity.logits < 1e-4
    assert parity.agreement.modules
    assert not parity.output_errors, "every module is recomputed"
    assert 0.999 < parity.agreement.total.share < 1.001


def test_bf16_is_within_its_rounding(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    parity = compare(base, adapter, export(base, adapter, tmp_path / "out"), torch.bfloat16)
    assert parity.logits is not None
    assert parity.logits < parity.bound == 48 * 2**-9
    assert len(parity.agreement.modules) == 14
    assert parity.agreement.unchanged == 0
    assert 0.99 < parity.agreement.total.share < 1.01


def test_a_streamed_model_has_the_logits_of_the_whole_one(tiny_model: Path, tmp_path: Path) -> None:
    for kind in ("llama", "llama-tied", "gpt2"):
        base = make_base(kind, tmp_path / kind, tiny_model, torch.bfloat16)
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        streamed = StreamedModel(base, SafetensorsSource(base))
        with torch.no_grad():
            assert torch.allclose(streamed.logits(TOKENS), whole(TOKENS).logits, atol=1e-6)
        assert all(is_hollow(parameter) for parameter in streamed.model.parameters()), (
            "nothing stays"
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_encoder_without_a_head_is_compared_by_its_states(
    tiny_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
    )
    BertModel(config).save_pretrained(tmp_path / "base")
    copy_tokenizer(tiny_model, tmp_path / "base")
    wrapped = get_peft_model(
        BertModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["query", "dense"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 if "lora_" in name else 0)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    parity = compare(
        tmp_path / "base",
        tmp_path / "adapter",
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"),
    )
    assert len(parity.agreement.modules) == 9
    assert parity.logits is not None
    assert parity.logits < 1e-4
    merged, tokens = BertModel.from_pretrained(tmp_path / "out").eval(), TOKENS
    with torch.no_grad():
        difference = merged(tokens).last_hidden_state - wrapped.eval()(tokens).last_hidden_state
    assert difference.abs().max() < 2e-5
    assert not (tmp_path / "out" / "generation_config.json").exists(), "it writes no text"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_output_of_any_name_is_untied(tiny_model: Path, tmp_path: Path) -> None:
    """Of GPT-NeoX the output is ``embed_out``; it gets a matrix of its own under that name."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    assert "embed_out.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    copy_tokenizer(tiny_model, tmp_path / "base")
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["embed_in", "query_key_value"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 if "lora_" in name else 0)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    folder = export(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = GPTNeoXForCausalLM.from_pretrained(folder).eval()
    assert merged.config.tie_word_embeddings is False
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS).logits, wrapped.eval()(TOKENS).logits, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_module_that_was_left_out_is_named(
    dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model, dtype)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = export(base, adapter, tmp_path / "out")
    file, name = merged / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({**load_file(file), name: load_file(base / "model.safetensors")[name]}, file)
    wrong = (
        r"1 of 21 tensors are not .*: model\.layers\.1\.mlp\.up_proj\.weight \(5,3\d\d of 5,376 .*"
        r" 0% of its change arrived"
    )
    with pytest.raises(ExportError, match=wrong):
        compare(base, adapter, merged, dtype)


def test_a_tensor_that_no_adapter_touches_must_be_the_bases(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = export(base, adapter, tmp_path / "out")
    file = merged / "model.safetensors"
    tensors = load_file(file)
    for number in (1.5, torch.nan):
        tensors["model.norm.weight"][3] = number
        save_file(tensors, file)
        with pytest.raises(
            ExportError, match=r"1 of 21 tensors are not .*: model\.norm\.weight \(1 of 48 numbers"
        ):
            compare(base, adapter, merged)


def test_a_configuration_that_makes_another_function_of_the_numbers_is_seen_in_the_logits(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = export(base, adapter, tmp_path / "out")
    file = merged / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(ExportError, match=r"logits differ .* by .*export\.parity_bound"):
        compare(base, adapter, merged)
    found = compare(base, adapter, merged, bound=10.0).logits
    assert found is not None
    assert found > 1e-3


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_answers_otherwise_at_the_least_has_the_bound_of_its_own_rounding(
    whole: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """Attention that is all or nothing, as experts that are chosen: one rounding of the weights
    moves the logits by more.
    """
    base = make_base("llama", tmp_path / "base", tiny_model, torch.bfloat16)
    file = base / "model.safetensors"
    save_file(
        {name: tensor * (60 if "proj" in name else 1) for name, tensor in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = export(base, adapter, tmp_path / "out")
    sides = ComparedModels(
        base_folder=base,
        base=SafetensorsSource(base),
        adapter=read_adapter(adapter),
        merged_folder=merged,
        merged=SafetensorsSource(merged),
    )
    check = measure_parity_in_memory if whole else measure_parity
    parity = check(sides, probe_tokens(None, 512, []), torch.bfloat16)
    assert parity.logits is not None
    assert 48 * 2**-9 < parity.logits < parity.bound < 2
    with pytest.raises(ExportError, match="logits differ"):
        check(sides, probe_tokens(None, 512, []), torch.bfloat16, 48 * 2**-9)


def test_a_change_below_the_rounding_is_told(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: tensor * (1e-8 if "lora_B" in name else 1) for name, tensor in tensors.items()}, file
    )
    parity = compare(base, adapter, export(base, adapter, tmp_path / "out"), torch.bfloat16)
    assert parity.agreement.unchanged == 14
    assert (
        "0.0% of the change arrived, 100.0% of it is below the rounding, and 14 modules stay"
        in parity.describe()
    )
    assert parity.loss_note is not None
    assert parity.loss_note.endswith("or export=adapter keeps it")
    save_file(
        {name: tensor * (1e-3 if "lora_B" in name else 1) for name, tensor in tensors.items()}, file
    )
    parity = compare(base, adapter, export(base, adapter, tmp_path / "again"), torch.bfloat16)
    assert 0.01 < parity.agreement.total.below_rounding < 0.99
    assert parity.agreement.unchanged == 0


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "bfloat16"),
        ({"format": "pt", "dtype": ExportDtype.fp16}, "float16"),
        ({"format": "gguf"}, "float16"),
        ({"format": "gguf", "gguf_type": GgufType.bf16}, "bfloat16"),
        ({"format": "gguf", "gguf_type": GgufType.q8_0}, "float32"),
    ],
)
def test_the_rounding_that_is_told_is_that_of_the_format(
    settings: dict[str, Any], kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """A change below the rounding of a bf16 base is not lost in a file of fp16 or of fp32."""
    base = make_base("llama", tmp_path / "base", tiny_model, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(
        {
            name: tensor * (2e-4 if "lora_B" in name else 1)
            for name, tensor in load_file(file).items()
        },
        file,
    )
    said: list[str] = []
    request = ExportRequest(
        base=base,
        base_name="tiny",
        adapter=adapter,
        run=None,
        output=tmp_path / "out",
        say=said.append,
    )
    run_export(request, ExportConfig(**settings))
    text = " ".join(said)
    assert f"every number is the sum rounded once to {kind}" in text
    assert ("is smaller than the rounding of bfloat16" in text) is (kind == "bfloat16"), text


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_whose_names_are_translated_are_compared_whole_or_by_their_numbers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    sizes |= (
        {"num_local_experts": 4}
        if kind == "Mixtral"
        else {"num_experts": 4, "moe_intermediate_size": 32}
    )
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().save_pretrained(
        tmp_path / "base"
    )
    adapter = make_adapter(
        tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "v_proj"]
    )
    said: list[str] = []

    def run(**settings: Any) -> str:
        said.clear()
        config = ExportConfig(**settings)
        output = tmp_path / f"out-{config.format}"
        run_export(
            ExportRequest(
                base=tmp_path / "base",
                base_name="tiny",
                adapter=adapter,
                run=None,
                output=output,
                say=said.append,
            ),
            config,
        )
        return " ".join(said)

    text = run()
    assert "parity: logits within" in text
    assert "4 adapted modules recomputed" in text
    text = run(format="pt")
    assert (
        "the logits of this architecture are not compared: it can be loaded from safetensors only"
        in text
    )
    assert "parity: logits not compared; 4 adapted modules recomputed" in text
    monkeypatch.setattr("llmtune.export.verify.export_checks._MEMORY_FACTOR", 10**9)
    assert "they need the whole model in memory" in run()
    monkeypatch.setattr("llmtune.export.merge.adapter.Adapter.scale", lambda *_: 0.5)
    with pytest.raises(ExportError, match=r"4 of 4[15] tensors are not"):
        run()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"vocab_size": 100}, "config.json has vocab_size 100"),
        ({"eos_token_id": 600}, "eos_token_id 600 is outside the vocabulary of 512"),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing"),
        (
            {"num_hidden_layers": 1},
            r"model.layers.1.input_layernorm.weight is not in the architecture",
        ),
        ({"intermediate_size": 64}, r"is \(48, 112\), config.json makes it \(48, 64\)"),
    ],
)
def test_what_nobody_could_serve_is_refused(
    changes: dict[str, Any], part: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model)
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    problems = find_serving_problems(base, SafetensorsSource(base))[0]
    assert any(re.search(part, problem) for problem in problems), problems


def test_the_tokenizer_must_fit_the_rows(tiny_model: Path, tmp_path: Path) -> None:
    small = make_base("llama", tmp_path / "small", tiny_model, rows=320)
    problems, _ = find_serving_problems(small, SafetensorsSource(small))
    assert [problem.partition(":")[0] for problem in problems] == [
        "the tokenizer knows token 511, the model has 320 rows"
    ]
    assert find_serving_problems(tiny_model, SafetensorsSource(tiny_model)) == ([], [])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ 1 / 0 }}"
    other = make_base("llama", tmp_path / "other", tiny_model)
    tokenizer.save_pretrained(other)
    request = ExportRequest(
        base=other, base_name="tiny", adapter=None, run=None, output=tmp_path / "out"
    )
    with pytest.raises(
        ExportError, match="cannot be served: 1 problems: the chat template .*nothing was published"
    ):
        run_export(request, ExportConfig())
    assert not (tmp_path / "out").exists()
