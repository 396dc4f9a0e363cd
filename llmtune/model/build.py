"""The model object of a rank: whole, or under ZeRO 3 only its own slice of every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.model import ModelConfig
from llmtune.config.schema import Precision
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.model.attention import answer_on_host, group_heads_only_for_flash
from llmtune.model.weights.files import read_entries
from llmtune.model.weights.quantized import find_meaningless, quantization
from llmtune.model.weights.report import WeightReport
from llmtune.model.weights.zero3_loading import load_partitions, restore_buffers
from llmtune.process import no_collection
from llmtune.storage.tensors.dtypes import configured_dtype


@dataclass(frozen=True, slots=True)
class WeightsTo:
    """Where the weights go as they are read."""

    device_map: Any = None
    """Of whole ones, as transformers has it."""
    partitioned: Callable[[], AbstractContextManager[Any]] | None = None
    """DeepSpeed's ``zero.Init`` for ZeRO 3: they are read slice by slice."""
    rank: int = 0
    """Whose slices."""


def build_model(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    gradient_checkpointing: bool,
    attn_implementation: str,
    weights: WeightsTo = WeightsTo(),
) -> Any:
    """A causal language model in the training dtype, ready for adapters and for DeepSpeed.

    Args:
        folder: Model folder with safetensors.
        weights: Where they go; without it, whole to the host.

    Raises:
        ConfigError: Weights in fewer bits are to be cut into slices, whose bytes are no numbers of
            the model.
        MissingPrerequisiteError: ``model.attn_implementation`` needs a package that is not there.
    """
    with no_collection():
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

    model: Any
    dtype = configured_dtype(precision.value)
    settings = {
        "attn_implementation": attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        if weights.partitioned is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                device_map=weights.device_map,
                output_loading_info=True,
                **settings,
            )
            model, found = loaded
            _refuse_random(model, found["missing_keys"], folder)
        elif quantization(folder) is not None:
            raise ConfigError(
                f"{folder} holds weights in fewer bits, which ZeRO 3 cannot cut into slices"
            )
        else:
            architecture = AutoConfig.from_pretrained(
                str(folder), trust_remote_code=config.trust_remote_code
            )

            def make(of: torch.dtype) -> Any:
                return AutoModelForCausalLM.from_config(architecture, dtype=of, **settings)

            with no_init_weights():
                with weights.partitioned():
                    model = make(dtype)
                    # Part of the initialization that no_init_weights leaves out.
                    model.tie_weights()
                restore_buffers(model, make, dtype)
            load_partitions(model, folder, weights.rank)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingPrerequisiteError(
            f"model.attn_implementation={attn_implementation}: {reason}"
        ) from error
    model.config.use_cache = False
    answer_on_host(model)
    group_heads_only_for_flash()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # Frozen embeddings would leave the first checkpoint without an input that needs a gradient.
        model.enable_input_require_grads()
    return model


def _refuse_random(model: Any, missing: Iterable[str], folder: Path) -> None:
    """transformers draws what the files lack, on every rank anew, and takes packed numbers for
    weights. Before a run both were looked for already."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    random = tuple(sorted(parameters & set(missing)))
    meaningless: list[str] = []
    if quantization(folder) is None:
        stored = read_entries(folder)
        meaningless = find_meaningless(
            {name: name for name in parameters & stored.keys()}, stored, parameters
        )
    WeightReport(
        missing=random,
        reshaped=(),
        tied=(),
        untied=(),
        defaults=(),
        unused=(),
        meaningless=tuple(meaningless),
    ).refuse(str(folder), folder)


def sees_padding(model: Any) -> bool:
    """Whether tokens see what comes after them, so that the model must be told where padding is.

    Configurations say it of some; of BERT and its kin, which look ahead unless they are told to be
    decoders, the layers do.
    """
    text = model.config.get_text_config()
    if getattr(text, "is_causal", True) is False or bool(
        getattr(text, "use_bidirectional_attention", False)
    ):
        return True
    return any(getattr(module, "is_causal", True) is False for module in model.modules())
