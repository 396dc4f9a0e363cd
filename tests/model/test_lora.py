"""Adapters are put on without what only 4-bit bases need."""

from __future__ import annotations

import sys

import pytest

from tests.support import run

_PROGRAM = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from llmtune.config.compose import compose_config
from llmtune.model.adapter.lora import add_lora
numbers = compose_config(["model=tiny"]).config.model.config
model = LlamaForCausalLM(LlamaConfig(**numbers))
wrapped = add_lora(model, compose_config(["model=tiny"]).config.tuner, "base", 0)
print("bitsandbytes" in sys.modules, any("lora_A" in name for name, _ in wrapped.named_parameters()))
import peft
from peft.import_utils import is_bnb_available
print(is_bnb_available())
"""  # noqa: E501


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_bitsandbytes_is_not_imported_and_can_be_later() -> None:
    """It brings torch's compiler along, which would cost every rank a second."""
    done = run([sys.executable, "-c", _PROGRAM])
    assert done.out.split() == ["False", "True", "True"], done.out + done.err
