"""Ask a language model for its loss in the place of its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmtune.task.language_head.chunked_loss import HeadLossSettings, sum_head_losses
from llmtune.task.language_head.logit_map import LogitMap, find_logit_map
from llmtune.task.targets import Targets


class HeadLoss:
    """Computes the loss inside the module of a model's output projection.

    ZeRO 3 gathers a module's weights around its forward and backward pass, and the embeddings that
    are tied to it have their gradient from it as always. While a loss is asked for, the module
    returns empty logits, so that nothing the model does with them has an effect; the loss leaves
    through the last of its hooks, behind those of DeepSpeed. Otherwise it returns logits.
    """

    def __init__(self, head: nn.Linear, logit_map: LogitMap):
        """Args:
        head: The module; its name and its weights stay as they are.
        logit_map: What the model does with its logits.
        """
        self.settings = HeadLossSettings(logit_map=logit_map)
        self._head = head
        self._project = head.forward
        self._asked: tuple[Targets, HeadLossSettings] | None = None
        self._answers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def install(self) -> None:
        """Change the module's forward pass. With DeepSpeed, after its engine was built."""
        self._head.forward = self._forward  # type: ignore[method-assign, assignment]
        self._head.register_forward_hook(self._take_out)

    def find(
        self,
        run: Callable[[], Any],
        targets: Targets,
        smoothing: float = 0.0,
        counts: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a forward pass of the model, and return the loss of its targets.

        Args:
            run: The forward pass.
            smoothing: Share of a target that is spread over all words.
            counts: Count the targets that are the likeliest word, too.

        Returns:
            The summed loss in fp32, and the count, int64; scalars.
        """
        self._asked = (targets, replace(self.settings, smoothing=smoothing, counts=counts))
        try:
            run()
            (answer,) = self._answers
            return answer
        finally:
            self._asked = None
            self._answers.clear()

    def _forward(self, hidden: torch.Tensor) -> Any:
        if self._asked is None:
            return self._project(hidden)
        targets, settings = self._asked
        # By index: with a mask the host would wait for the GPU to count them.
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, targets.positions)
        return sum_head_losses(picked, self._head.weight, self._head.bias, targets.values, settings)

    def _take_out(self, _: nn.Module, inputs: tuple[torch.Tensor], output: Any) -> Any:
        if self._asked is None:
            return output
        self._answers.append(output)
        (hidden,) = inputs
        return hidden.new_zeros(*hidden.shape[:-1], 0)


def find_head_loss(model: Any) -> HeadLoss | None:
    """Find what computes a model's loss in its output projection, to be installed.

    Args:
        model: A transformers model, wrapped by peft or not, before DeepSpeed's engine is built.

    Returns:
        None where the output projection is more than a product (:func:`plain_head`), or where it
        is not known what the model does with its logits.
    """
    head = plain_head(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    logit_map = find_logit_map(inner) if head is not None else None
    return HeadLoss(head, logit_map) if head is not None and logit_map is not None else None


def plain_head(model: Any) -> nn.Linear | None:
    """Find the module of a model's output projection; None where it is more than a product.

    An adapter on it, rows of its own for new tokens, 4 bits, and a device of its own are more.

    Args:
        model: A transformers model, wrapped by peft or not, before DeepSpeed's engine is built.
    """
    head = model.get_output_embeddings()
    # peft's copy that is trained in the place of the module.
    copies = getattr(head, "modules_to_save", None)
    if copies is not None:
        head = copies[head.active_adapters[0]]
    # accelerate spreads a model over several GPUs with a forward pass of its own in every module.
    is_changed = head is not None and hasattr(head, "_hf_hook")
    if type(head) is not nn.Linear or is_changed or head._forward_hooks or list(head.children()):
        return None
    return head
