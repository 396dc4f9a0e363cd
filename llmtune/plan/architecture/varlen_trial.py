"""Try whether an architecture attends as it should with the borders of documents alone.

This is tried, not looked up: a small model with random weights of the same architecture computes
documents one by one with eager attention, and once more all of them in one row with
:mod:`llmtune.varlen_attention`. An architecture that does not hand borders down to its layers, that
mixes documents elsewhere (recurrent layers, convolutions), or that asks for what the kernel lacks
(soft caps, sinks, dropout) gives other logits, or none.
"""

from __future__ import annotations

import logging
from typing import Any

from llmtune.draws import Draw, torch_seed
from llmtune.plan.architecture.shrink import VOCABULARY, shrink
from llmtune.varlen_attention import LARGEST_HEAD, VARLEN, leave_out_masks, register_varlen

#: Tokens of the documents: longer than windows and chunks of the small model, and as short as can
#: be.
LENGTHS = (40, 24, 1)
#: Largest difference of a logit, in units of their spread, that is rounding in fp32.
LIMIT = 2e-5
#: Keys of configurations that have linear attention, state spaces or convolutions.
_RECURRENT = ("linear_", "mamba_", "ssm_", "conv_", "full_attention_interval")


def takes_borders(architecture: Any) -> bool:
    """Tell whether a causal language model can be given documents without padding.

    Args:
        architecture: A transformers configuration, not of code of the model's own.
    """
    try:
        text = architecture.get_text_config()
        if _is_recurrent(text) or _widest_head(text) > LARGEST_HEAD:
            return False
        return _largest_difference(architecture) <= LIMIT
    except Exception as error:
        # A narrow model of an architecture may raise anything, and so may a configuration whose
        # layers have heads of several widths.
        logging.getLogger(__name__).info("no %s attention: %s", VARLEN, error)
        return False


def _is_recurrent(text: Any) -> bool:
    """Tell whether layers are known to mix all tokens of a row, which spares a slow trial."""
    return any(key.startswith(_RECURRENT) and value for key, value in vars(text).items())


def _widest_head(text: Any) -> int:
    latent = (getattr(text, "qk_nope_head_dim", 0) or 0) + (
        getattr(text, "qk_rope_head_dim", 0) or 0
    )
    heads = getattr(text, "num_attention_heads", None) or 1
    hidden = getattr(text, "hidden_size", None) or 0
    named = (getattr(text, "head_dim", None), getattr(text, "global_head_dim", None))
    return max(latent, *(width or 0 for width in named), 0 if any(named) else hidden // heads)


def _largest_difference(architecture: Any) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    small = shrink(architecture)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(torch_seed(0, Draw.packing_probe))
        register_varlen()
        # Some architectures choose a class by the kernel when they are built.
        eager, model = (
            AutoModelForCausalLM.from_config(
                small, dtype=torch.float32, attn_implementation=kernel
            ).eval()
            for kernel in ("eager", VARLEN)
        )
        model.load_state_dict(eager.state_dict())
        vocabulary = min(VOCABULARY, int(small.vocab_size))
        documents = [torch.randint(1, vocabulary, (1, length)) for length in LENGTHS]
        alone = torch.cat([eager(ids, use_cache=False).logits[0] for ids in documents])

        leave_out_masks(model)
        inputs = _join(documents)
        joined = model(**inputs, use_cache=False).logits[0]
        # Dropout of attention, which the kernel lacks and refuses, is there in training alone.
        model.train()(**inputs, use_cache=False)
    finite = alone[alone.isfinite()]
    spread = float((finite - finite.mean()).square().mean().sqrt()) or 1.0
    return float(torch.where(joined == alone, 0.0, joined - alone).abs().max()) / spread


def _join(documents: list[Any]) -> dict[str, Any]:
    """The inputs of one row of documents, as the collator makes them."""
    import torch

    borders = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }
    for side in ("q", "k"):
        inputs[f"cu_seq_lens_{side}"] = borders
        inputs[f"max_length_{side}"] = max(LENGTHS)
    return inputs
