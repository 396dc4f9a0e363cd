"""What a tuner trains of the model itself."""

from __future__ import annotations

import torch

from llmtune.config.groups.tuner import TunerConfig
from llmtune.tuner.tuner import TUNERS, mark_trained


def _model() -> torch.nn.Module:
    """A layer and two parameters that no gradient may change, as mixtures of experts have them."""
    model = torch.nn.Linear(4, 3)
    model.register_parameter("balance", torch.nn.Parameter(torch.zeros(3), requires_grad=False))
    counts = torch.zeros(3, dtype=torch.int64)
    model.register_parameter("counts", torch.nn.Parameter(counts, requires_grad=False))
    return model


def test_full_fine_tuning_leaves_frozen_what_the_architecture_freezes() -> None:
    """A buffer kept as a parameter would get an optimizer state, and integers have no gradient."""
    model = _model()
    mark_trained(TUNERS.find("full"), model, TunerConfig(kind="full"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"weight", "bias"}


def test_adapters_freeze_every_parameter_of_the_model() -> None:
    """The base of an adapter stays as it is."""
    model = _model()
    mark_trained(TUNERS.find("lora"), model, TunerConfig(kind="lora"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
