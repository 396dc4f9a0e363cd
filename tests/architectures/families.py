"""Tiny models of the field's architectures, as their ``config.json`` has them, and what of them is
refused.
"""

from __future__ import annotations

from typing import Any

_SIZE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED = {**_SIZE, "intermediate_size": 48, "num_key_value_heads": 2}
_HEADS = {**_GATED, "head_dim": 8}
_PLAIN = {**_SIZE, "intermediate_size": 48}
_GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_STATE = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "v_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "head_dim": 8,
}

#: Name in the table -> numbers of ``config.json``; ``model_type`` where it is not the name.
FAMILIES: dict[str, dict[str, Any]] = {
    # Dense, with rotary positions.
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": 8},
    "qwen2": _GATED,
    "qwen3": _HEADS,
    "gemma": _HEADS,
    "gemma2": {**_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_HEADS, **_WINDOWS},
    "gemma3n_text": {
        **_HEADS,
        **_WINDOWS,
        "intermediate_size": [48, 48],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "phi": _PLAIN,
    "phi3": _GATED,
    "olmo": _GATED,
    "olmo2": _GATED,
    "olmo3": {**_GATED, "sliding_window": 8},
    "starcoder2": _GATED,
    "stablelm": _GATED,
    "cohere": _GATED,
    "cohere2": {**_GATED, "sliding_window": 8},
    "granite": _GATED,
    "glm": _HEADS,
    "glm4": _HEADS,
    "smollm3": _GATED,
    "helium": _HEADS,
    "nemotron": _GATED,
    "ministral": _HEADS,
    "exaone4": {**_GATED, "sliding_window": 8},
    "arcee": _GATED,
    "ernie4_5": _HEADS,
    "seed_oss": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "apertus": _GATED,
    "diffllama": _GATED,
    "persimmon": _PLAIN,
    "gpt_neox": _PLAIN,
    "gpt_neox_japanese": {**_SIZE, "intermediate_multiple_size": 2},
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "falcon": {**_SIZE, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "modernbert-decoder": {**_PLAIN, "local_attention": 16},
    # Learned, sinusoidal or no positions.
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 48,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
    },
    "openai-gpt": _GPT,
    "ctrl": {**_GPT, "dff": 48},
    "opt": {**_SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": _PLAIN,
    "xglm": {
        "vocab_size": 128,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
    },
    "bloom": {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {
        "vocab_size": 128,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "expansion_ratio": 2,
    },
    "falcon-alibi": {
        **_SIZE,
        "model_type": "falcon",
        "alibi": True,
        "new_decoder_architecture": False,
        "max_position_embeddings": 2048,
    },
    "bert": {**_PLAIN, "is_decoder": True},
    # Mixtures of experts.
    "mixtral": {**_GATED, "num_local_experts": 4},
    "qwen2_moe": {
        **_GATED,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "olmoe": {**_GATED, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_GATED, "num_local_experts": 4},
    "granitemoe": {**_GATED, **_LOCAL_EXPERTS},
    "gpt_oss": {**_HEADS, **_LOCAL_EXPERTS, "sliding_window": 8},
    "llama4_text": {
        **_HEADS,
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
    },
    "jetmoe": {
        **_SIZE,
        **_LOCAL_EXPERTS,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 32,
    },
    "deepseek_v3": {
        **_PLAIN,
        **_LATENT,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "dbrx": {
        "vocab_size": 128,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    # Recurrent layers: what stands before in a row is in their state.
    "qwen3_next": {**_HEADS, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**_HEADS, **_DELTA},
    "lfm2": {
        **_GATED,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "falcon_h1": {**_HEADS, **_MAMBA, "mamba_d_ssm": 64},
    "bamba": {**_GATED, **_MAMBA, "attn_layer_indices": [1]},
    "jamba": {
        **_GATED,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "granitemoehybrid": {
        **_GATED,
        **_LOCAL_EXPERTS,
        **_MAMBA,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
    },
    "minimax": {**_HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16},
    "recurrent_gemma": {
        **_HEADS,
        "lru_width": 32,
        "num_hidden_layers": 3,
        "attention_window_size": 8,
    },
    "mamba": {**_STATE, "state_size": 4},
    "mamba2": {
        **_STATE,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "falcon_mamba": {**_STATE, "state_size": 4},
    "rwkv": {**_STATE, "attention_hidden_size": 32, "context_length": 64},
}

#: Those whose documents would reach into each other in a packed row, or whose positions do not
#: begin anew.
MIXING = frozenset(
    {
        "openai-gpt",
        "falcon-alibi",
        "qwen3_next",
        "qwen3_5_text",
        "lfm2",
        "falcon_h1",
        "bamba",
        "jamba",
        "granitemoehybrid",
        *("minimax", "recurrent_gemma", "mamba", "mamba2", "falcon_mamba", "rwkv"),
    }
)

#: Those that ZeRO 3 cannot partition.
WHOLE = frozenset({"gemma3n_text"})

#: Those that the ordinary suite trains; the others are in the slow tier.
USUAL = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "cohere",
    "granite",
    "gpt_neox",
    "gptj",
    "falcon",
    "gpt2",
    "gpt_neo",
    "opt",
    "biogpt",
    "xglm",
    "bloom",
    "mpt",
    "falcon-alibi",
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"),
    *("qwen3_next", "qwen3_5_text", "lfm2", "falcon_h1", "mamba", "rwkv"),
)
