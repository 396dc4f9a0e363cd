"""GGUF: the same tensors, the same tokens and the same ids, read back by transformers and, where it
is there, by llama.cpp.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from llmtune.config.groups.export import ExportConfig, GgufType
from llmtune.errors import ExportError
from llmtune.export.open_model import open_export_model
from llmtune.export.publish.shards import Journal
from llmtune.export.request import ExportRequest
from llmtune.export.writers.gguf.gguf_file import write_gguf
from tests.export.conftest import TOKENS, copy_tokenizer, make_adapter, make_base

#: An interpreter that has llama-cpp-python.
LLAMA_CPP = os.environ.get("LLMTUNE_LLAMA_CPP_PYTHON")
CHECK = Path(__file__).with_name("llama_cpp_check.py")

needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP, reason="LLMTUNE_LLAMA_CPP_PYTHON names no interpreter with llama-cpp-python"
)

TEXTS = [
    "Hello world",
    "def add(a, b):\n    return a + b  # 1234 567\n\n\tprint('x')",
    "naïve café, Ünïcode, Привет, 你好，世界, こんにちは, 🦙🚀",
    "We'll see, I'M sure; they've 3.14159 and 10,000 of it!",
    "many    spaces   and\ttabs \n\n\n lines  ",
    "don't 'RE 42nd --- ... ??? <b>tag</b> a_b camelCase",
]
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

#: Name -> class of the configuration, of the model, and settings.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, another head_dim": (
        LlamaConfig,
        LlamaForCausalLM,
        {"head_dim": 32, "num_key_value_heads": 1},
    ),
    "llama, no grouped heads": (
        LlamaConfig,
        LlamaForCausalLM,
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2, biases": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    # transformers' reader takes Qwen3's head_dim to be 128.
    "qwen3, norms of heads": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
}
#: transformers' reader of GGUF files leaves out what these bring; llama.cpp does not.
MORE_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama, rope of Llama 3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama, odd widths": (
        LlamaConfig,
        LlamaForCausalLM,
        {"hidden_size": 48, "intermediate_size": 112},
    ),
    "llama, all biases": (
        LlamaConfig,
        LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen2, yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN}),
    "qwen3, yarn with its own factor": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 32, "rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
}


def make_model(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A random model whose logits are far from each other, norms and biases off their defaults."""
    config, model_class, settings = {**KINDS, **MORE_KINDS}[kind]
    torch.manual_seed(3)
    model = model_class(config(**{**SMALL, **settings}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.ndim < 2:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def write(
    base: Path,
    folder: Path,
    kind: str = "f32",
    adapter: Path | None = None,
    said: list[str] | None = None,
) -> Path:
    """The file that is written."""
    config = ExportConfig(format="gguf", gguf_type=GgufType[kind])
    folder.mkdir(parents=True, exist_ok=True)
    say = (said if said is not None else []).append
    request = ExportRequest(
        base=base, base_name="tiny", adapter=adapter, run=None, output=folder, say=say
    )
    write_gguf(open_export_model(request, config), folder, Journal(folder, "test"), config)
    return folder / f"model-{kind}.gguf"


def read_model(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


def read_tensors(file: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Name -> type and numbers."""
    reader = gguf.GGUFReader(file)
    return {
        tensor.name: (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }


def read_keys(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def greedy(model: Any, ids: torch.Tensor, new_tokens: int = 20) -> list[int]:
    with torch.no_grad():
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return list(
            model.generate(ids, max_new_tokens=new_tokens, **settings)[0, ids.shape[1] :].tolist()
        )


def top_tokens(model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        return list(model(torch.tensor([ids])).logits[0].argmax(-1).tolist())


def same_share(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def ask_llama_cpp(file: Path, **request: Any) -> dict[str, Any]:
    """What llama.cpp answers."""
    asked = {"texts": [], "prompt": [], "ids": [], "new_tokens": 0, **request}
    answer = subprocess.run(
        [str(LLAMA_CPP), str(CHECK), str(file)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_f32_holds_the_same_bits_and_transformers_goes_on_with_the_same_tokens(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model(kind, tmp_path / "base", tiny_model)
    file = write(base, tmp_path / "out")
    original, found = AutoModelForCausalLM.from_pretrained(base).eval(), read_model(file)
    expected = original.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert greedy(found, TOKENS) == greedy(original, TOKENS)
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "Modelfile",
        "journal.jsonl",
        "model-f32.gguf",
    ]


@needs_llama_cpp
@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_llama_cpp_computes_what_transformers_computes(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model(kind, tmp_path / "base", tiny_model)
    file = write(base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(9)
    ids = torch.randint(3, 300, (150,)).tolist()
    answer = ask_llama_cpp(file, ids=ids, prompt=TOKENS[0].tolist(), new_tokens=20)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(np.array(answer["logits"]) - expected).max() < 2e-3 * np.abs(expected).max()
    assert answer["greedy"] == greedy(model, TOKENS)
    assert same_share(answer["top"], top_tokens(model, ids)) >= 0.99


def test_the_keys_are_the_numbers_of_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("llama, another head_dim", tmp_path / "base", tiny_model)
    keys = read_keys(write(base, tmp_path / "out", "q8_0"))
    expected = {
        "general.architecture": "llama",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: keys[key] for key in expected} == expected
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert keys["tokenizer.chat_template"] == (tiny_model / "chat_template.jinja").read_text()


def test_the_frequencies_of_llama_3_1_are_divided_as_transformers_divides_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model("llama, rope of Llama 3.1", tmp_path / "base", tiny_model)
    kind, factors = read_tensors(write(base, tmp_path / "out", "f16"))["rope_freqs.weight"]
    used = AutoModelForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq.numpy()
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    assert kind == "F32"
    assert np.allclose(plain / factors, used, rtol=1e-6)
    assert factors.min() == pytest.approx(1.0)
    assert factors.max() == pytest.approx(8.0)


def test_biases_of_rotated_projections_change_places_with_their_rows(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model("llama, all biases", tmp_path / "base", tiny_model)
    found = read_tensors(write(base, tmp_path / "out"))
    stored = load_file(base / "model.safetensors")
    for short, long, heads in (("q", "q_proj", 4), ("k", "k_proj", 2)):
        half = 64 // 4 // 2
        for part in ("weight", "bias"):
            tensor = stored[f"model.layers.1.self_attn.{long}.{part}"].numpy()
            turned = found[f"blk.1.attn_{short}.{part}"][1]
            for head in range(heads):
                for place in range(half):
                    first = head * 2 * half
                    assert np.array_equal(turned[first + 2 * place], tensor[first + place])
                    assert np.array_equal(
                        turned[first + 2 * place + 1], tensor[first + half + place]
                    )
    assert np.array_equal(
        found["blk.0.ffn_gate.bias"][1], stored["model.layers.0.mlp.gate_proj.bias"].numpy()
    )


@pytest.mark.parametrize("kind", [kind.name for kind in GgufType])
def test_every_type_stays_within_its_rounding(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("llama", tmp_path / "base", tiny_model)
    found = read_tensors(write(base, tmp_path / "out", kind))
    stored = load_file(base / "model.safetensors")
    down = stored["model.layers.0.mlp.down_proj.weight"].numpy()
    blocks = np.abs(down.reshape(-1, 32)).max(1, keepdims=True)
    spread = np.ptp(down.reshape(-1, 32), axis=1, keepdims=True)
    # Half a step, and for the symmetric types the largest number of the other sign, which is one
    # step short.
    bounds = {
        "f32": 0.0 * blocks,
        "f16": blocks * 2**-11,
        "bf16": blocks * 2**-8,
        "q8_0": blocks / 127 * 0.51,
        "q5_0": blocks / 16 * 1.01,
        "q4_0": blocks / 8 * 1.01,
        "q5_1": spread / 31 * 0.52,
        "q4_1": spread / 15 * 0.52,
    }
    stored_as, numbers = found["blk.0.ffn_down.weight"]
    assert stored_as == kind.upper()
    assert (np.abs(numbers - down).reshape(-1, 32) <= bounds[kind] + 1e-4 * (kind[0] == "q")).all()
    assert found["token_embd.weight"][0] == kind.upper()
    assert found["output.weight"][0] == ("Q8_0" if kind[:2] in ("q4", "q5") else kind.upper())
    norm_as, norm = found["blk.0.attn_norm.weight"]
    assert norm_as == "F32"
    assert np.array_equal(norm, stored["model.layers.0.input_layernorm.weight"].numpy())


def test_rows_that_blocks_do_not_divide_are_stored_in_f16_and_it_is_said(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model("llama, odd widths", tmp_path / "base", tiny_model)
    said: list[str] = []
    file = write(base, tmp_path / "out", "q8_0", said=said)
    found = read_tensors(file)
    assert found["blk.0.attn_q.weight"][0] == "F16", "rows of 48"
    assert found["blk.0.ffn_down.weight"][0] == "F16", "rows of 112"
    modelfile = (file.parent / "Modelfile").read_text()
    assert "# rows of output.weight, token_embd.weight, " in modelfile
    assert "stored in f16, not in q8_0" in modelfile
    assert said == [f"model-q8_0.gguf: {modelfile.splitlines()[0].removeprefix('# ')}"]
    assert "\nFROM ./model-q8_0.gguf\n" in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


def test_an_adapter_is_merged_and_the_sum_is_rounded_once(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("llama, tied", tmp_path / "base", tiny_model)
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "down_proj", "lm_head"]
    )
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    file = write(base, tmp_path / "out", adapter=adapter)
    with torch.no_grad():
        assert torch.allclose(read_model(file)(TOKENS).logits, merged(TOKENS).logits, atol=2e-4)
    assert "output.weight" in read_tensors(file), "input and output are no longer one matrix"


def test_rows_that_no_token_uses_become_padding(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("llama", tmp_path / "base", tiny_model)
    known = len(AutoTokenizer.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(known + 40)
    model.save_pretrained(base)
    keys = read_keys(write(base, tmp_path / "out"))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[-1] == f"[PAD{known + 39}]"
    assert len(set(tokens)) == len(tokens) == keys["llama.vocab_size"] == known + 40
    assert types[known:] == [int(gguf.TokenType.UNUSED)] * 40


def test_an_output_that_is_tied_is_left_out_although_the_file_has_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_model("llama, tied", tmp_path / "base", tiny_model)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    assert "output.weight" not in read_tensors(write(base, tmp_path / "out"))


def test_what_llama_cpp_would_not_load_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="cannot write GPT2LMHeadModel; it can write LlamaForCausalLM"
    ):
        write(make_base("gpt2", tmp_path / "gpt2", tiny_model), tmp_path / "out")
    base = make_model("llama", tmp_path / "base", tiny_model)
    stored = load_file(base / "model.safetensors")

    def refused(changed: dict[str, torch.Tensor], match: str, kind: str = "f32") -> None:
        save_file(changed, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(ExportError, match=match):
            write(base, tmp_path / "out", kind)

    refused(
        {**stored, "model.layers.0.extra.weight": torch.ones(2, 2)},
        "no place for model.layers.0.extra.weight",
    )
    without = {
        name: tensor for name, tensor in stored.items() if "layers.1.mlp.up_proj" not in name
    }
    refused(without, "needs blk.1.ffn_up.weight")
    large = stored["model.layers.0.mlp.up_proj.weight"] * 1e7
    refused(
        {**stored, "model.layers.0.mlp.up_proj.weight": large},
        "f16 cannot hold .*gguf_type=bf16",
        "f16",
    )
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ExportError, match="for LlamaForCausalLM it can write default, linear, yarn, llama3"
    ):
        write(base, tmp_path / "out")


def test_a_finished_file_is_not_written_again(tiny_model: Path, tmp_path: Path) -> None:
    base = make_model("llama", tmp_path / "base", tiny_model)
    file = write(base, tmp_path / "out")
    before = file.stat().st_mtime_ns, file.read_bytes()
    (file.parent / "companions.tmp").mkdir()
    write(base, tmp_path / "out")
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    assert not (file.parent / "companions.tmp").exists()


# ---- tokenizers


def save_tokenizer(folder: Path, backend: Tokenizer, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        **settings,
    }
    PreTrainedTokenizerFast(tokenizer_object=backend, **given).save_pretrained(folder)
    return folder


def byte_level(*steps: Any, use_regex: bool = True, ignore_merges: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [*TEXTS, str(str.__doc__), str(dict.__doc__), "1 12 123 1234 12345 " * 9], trainer
    )
    return backend


def split(name: str) -> Any:
    return pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")


#: llama.cpp's name -> a tokenizer that splits so, by transformers' own table.
SPLITTING: dict[str, Any] = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(split("llama-bpe"), use_regex=False, ignore_merges=True),
    "smaug-bpe": lambda: byte_level(split("smaug-bpe"), use_regex=False),
    "qwen2": lambda: byte_level(split("qwen2"), use_regex=False),
    "tekken": lambda: byte_level(split("tekken"), use_regex=False, ignore_merges=True),
    "gpt-4o": lambda: byte_level(split("gpt-4o"), use_regex=False),
}


def model_with(tokenizer: Path, folder: Path) -> Path:
    """A tiny model with one row for every token."""
    torch.manual_seed(3)
    rows = len(AutoTokenizer.from_pretrained(tokenizer))
    LlamaForCausalLM(
        LlamaConfig(**{**SMALL, "vocab_size": rows, "num_hidden_layers": 1})
    ).save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("name", SPLITTING)
def test_a_byte_level_tokenizer_is_known_by_how_it_splits(name: str, tmp_path: Path) -> None:
    backend = SPLITTING[name]()
    backend.add_tokens(["<think>", "</think>"])
    base = model_with(save_tokenizer(tmp_path / "tokenizer", backend), tmp_path / "base")
    file = write(base, tmp_path / "out")
    keys = read_keys(file)
    assert keys["tokenizer.ggml.pre"] == name
    texts = [*TEXTS, CHAT, "a <think>b</think> c"]
    expected = encode(AutoTokenizer.from_pretrained(base), texts)
    if name != "smollm":
        # transformers' reader knows no rule of that name and splits as GPT-2 does.
        assert (
            encode(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), texts)
            == expected
        )
    if LLAMA_CPP:
        assert ask_llama_cpp(file, texts=texts)["tokenized"] == expected


def test_a_tokenizer_that_llama_cpp_would_run_otherwise_is_refused(tmp_path: Path) -> None:
    def refused(name: str, backend: Tokenizer, match: str) -> None:
        base = model_with(save_tokenizer(tmp_path / f"t-{name}", backend), tmp_path / name)
        with pytest.raises(ExportError, match=match):
            write(base, tmp_path / "out")

    words = pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated")
    refused(
        "splitting", byte_level(words, use_regex=False), "no splitting rule of llama.cpp is known"
    )
    prefixed = byte_level()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    refused("prefix", prefixed, "no splitting rule of llama.cpp is known")
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    refused("lower", lower, "changes text by .*Lowercase")
    around = byte_level()
    around.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    refused("around", around, "can add bos_token and eos_token only")
    unigram = Tokenizer(
        models.Unigram(
            [("<|endoftext|>", 0.0), ("<|im_start|>", 0.0), ("<|im_end|>", 0.0), ("a", -1.0)], 0
        )
    )
    refused("unigram", unigram, "is a Unigram model")


def test_bos_and_eos_are_added_where_transformers_adds_them(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    base = model_with(save_tokenizer(tmp_path / "tokenizer", backend), tmp_path / "base")
    file = write(base, tmp_path / "out")
    keys = read_keys(file)
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is True
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.ggml.padding_token_id"] == 0
    if LLAMA_CPP:
        assert ask_llama_cpp(file, texts=["Hello"])["tokenized"] == encode(
            AutoTokenizer.from_pretrained(base), ["Hello"]
        )


def test_the_token_that_ends_an_answer_is_named_beside_the_one_that_ends_a_text(
    tmp_path: Path,
) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", byte_level(), eos_token="<|endoftext|>")
    (tokenizer / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
    )
    file = write(model_with(tokenizer, tmp_path / "base"), tmp_path / "out")
    keys = read_keys(file)
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (0, 2)
    assert 'PARAMETER stop "<|im_end|>"' in (file.parent / "Modelfile").read_text()


def sentencepiece(folder: Path, whole: bool = True) -> Path:
    """A tokenizer as Llama 2 has it: bytes, pieces with scores, and every pair of pieces that makes
    a piece is a merge.

    Args:
        whole: Without it, one merge is taken away.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    words = " ".join([*TEXTS, str(str.__doc__), str(dict.__doc__)] * 2)
    backend.train_from_iterator([words], trainers.BpeTrainer(vocab_size=250, show_progress=False))
    learned = backend.get_vocab()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned, key=lambda piece: (len(piece) == 1, learned[piece]))
    vocab = {piece: number for number, piece in enumerate(pieces)}
    scores = {piece: -float(number) for piece, number in vocab.items() if number >= 259}
    merges = generate_merges({piece: vocab[piece] for piece in scores}, scores)
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges if whole else merges[:-1], add_bos_token=True
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_sentencepiece_tokenizer_comes_with_scores_that_give_the_same_ids(tmp_path: Path) -> None:
    base = model_with(sentencepiece(tmp_path / "tokenizer"), tmp_path / "base")
    file = write(base, tmp_path / "out")
    texts = [*TEXTS, "unseen: ☃ ẞ 𝔘", "a\n\nb"]
    keys = read_keys(file)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    types = keys["tokenizer.ggml.token_type"]
    assert types[:3] == [
        int(gguf.TokenType.UNKNOWN),
        int(gguf.TokenType.CONTROL),
        int(gguf.TokenType.CONTROL),
    ]
    assert types[3:259] == [int(gguf.TokenType.BYTE)] * 256
    expected = encode(AutoTokenizer.from_pretrained(base), texts)
    assert (
        encode(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), texts) == expected
    )
    assert any(token < 259 for ids in expected for token in ids[1:]), "bytes are used"
    if LLAMA_CPP:
        assert ask_llama_cpp(file, texts=texts)["tokenized"] == expected


def test_pieces_that_llama_cpp_would_join_and_the_tokenizer_does_not_are_refused(
    tmp_path: Path,
) -> None:
    base = model_with(sentencepiece(tmp_path / "tokenizer", whole=False), tmp_path / "base")
    with pytest.raises(ExportError, match="1 such pairs are no merge of the tokenizer"):
        write(base, tmp_path / "out")


# ---- the real model

LONG_TEXT = """A context manager is an object that defines the runtime context to be established when executing a with
statement. It handles the entry into, and the exit from, the desired runtime context for the execution of the block of code.
Typical uses include saving and restoring various kinds of global state, locking and unlocking resources, and closing files
that were opened. Water boils at a lower temperature on a mountain because the pressure of the air is lower there; this is
why an egg takes longer to cook. In 1969 two people walked on the Moon, and a third one stayed in orbit around it. The sum of
the first n odd numbers is n squared: 1 + 3 + 5 + 7 = 16. Put the flour, the sugar and the butter into a bowl, mix them well,
and bake the dough for twenty minutes.
def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""  # noqa: E501
#: Least share of positions of the text with the same most likely token as the safetensors in fp32.
AGREEMENT = {"f32": 1.0, "f16": 0.98, "q8_0": 0.95}
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def real_model(smollm2: Path) -> tuple[Path, Any, list[int], list[int]]:
    """SmolLM2-135M: its folder, itself, its top tokens over the long text, and how it goes on from
    the prompt.
    """
    folder = smollm2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    return (
        folder,
        model,
        top_tokens(model, tokenizer(LONG_TEXT)["input_ids"]),
        greedy(model, prompt),
    )


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("kind", AGREEMENT)
def test_the_real_model_says_the_same_when_transformers_reads_it(
    kind: str, real_model: Any, tmp_path: Path
) -> None:
    folder, original, expected_top, expected_greedy = real_model
    file = write(folder, tmp_path / "out", kind)
    tokenizer, found = AutoTokenizer.from_pretrained(folder), read_model(file)
    assert (
        same_share(top_tokens(found, tokenizer(LONG_TEXT)["input_ids"]), expected_top)
        >= AGREEMENT[kind]
    )
    if kind == "f32":
        bits = original.state_dict()
        assert all(torch.equal(tensor, bits[name]) for name, tensor in found.state_dict().items())
        assert greedy(found, torch.tensor([tokenizer(PROMPT)["input_ids"]])) == expected_greedy
        texts = [*TEXTS, CHAT, LONG_TEXT]
        read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        assert encode(read, texts) == encode(tokenizer, texts)
        assert read.apply_chat_template(
            [{"role": "user", "content": "Hi"}]
        ) == tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.process
@needs_llama_cpp
@pytest.mark.parametrize("kind", AGREEMENT)
def test_the_real_model_says_the_same_when_llama_cpp_runs_it(
    kind: str, real_model: Any, tmp_path: Path
) -> None:
    folder, _, expected_top, expected_greedy = real_model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, CHAT, LONG_TEXT]
    answer = ask_llama_cpp(
        write(folder, tmp_path / "out", kind),
        texts=texts,
        ids=tokenizer(LONG_TEXT)["input_ids"],
        prompt=tokenizer(PROMPT)["input_ids"],
        new_tokens=20,
    )
    # In f32 the two add in another order, which may turn a tie.
    assert same_share(answer["top"], expected_top) >= min(AGREEMENT[kind], 0.99)
    assert answer["tokenized"] == encode(tokenizer, texts)
    if kind == "f32":
        assert answer["greedy"] == expected_greedy
