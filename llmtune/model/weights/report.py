"""Report how a model's files match the model: what is refused, and what is noted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import MissingPrerequisiteError

#: Names that are shown of a long list.
_SHOWN = 6

#: Prefixes that wrappers put before all names -> the wrapper.
_WRAPPERS = {
    "module.": "torch's DataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "peft",
    "_forward_module.": "Lightning Fabric",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """The differences between a model's files and the model."""

    missing: tuple[str, ...]
    """Parameters that no file holds."""
    reshaped: tuple[str, ...]
    """Sentences on tensors whose shape is not the model's."""
    tied: tuple[str, ...]
    """Parameters that are not in the files because the configuration ties them to another."""
    untied: tuple[str, ...]
    """Pairs that the configuration ties, and the files hold with different values."""
    defaults: tuple[str, ...]
    """Buffers that are not in the files and keep the values that the architecture gives them."""
    unused: tuple[str, ...]
    """Names in the files that are no part of the model."""
    meaningless: tuple[str, ...] = ()
    """Weights stored as packed values in a folder that does not say how to unpack them."""

    def refuse(self, name: str, folder: Path) -> None:
        """Refuse a model that would not be the one in the files.

        Args:
            name: The model's name in messages.

        Raises:
            MissingPrerequisiteError: With what differs.
        """
        where = f"model.name_or_path={name}"
        if self.missing:
            raise MissingPrerequisiteError(
                f"{where}: {_count(len(self.missing))} in none of the files of {folder}:"
                f" {some(self.missing)}. transformers would draw random numbers instead, and other"
                f" ones on every rank and after every restart. {self._explain_missing()}"
            )
        if self.meaningless:
            raise MissingPrerequisiteError(
                f"{where}: {folder} holds packed numbers in the place of {some(self.meaningless)},"
                " and its config.json has no quantization_config that says how to unpack them; put"
                " the model's own config.json back, or fetch the model again"
            )
        if self.reshaped:
            raise MissingPrerequisiteError(
                f"{where}: {folder} has another shape than its config.json: {some(self.reshaped)}"
            )
        if self.untied:
            raise MissingPrerequisiteError(
                f"{where}: config.json makes one weight of {some(self.untied)}, and the files of"
                f" {folder} hold them with different values; set tie_word_embeddings to false in"
                " its config.json, or leave one out of the files"
            )

    def _explain_missing(self) -> str:
        for prefix, wrapper in _WRAPPERS.items():
            if self.unused and all(name.startswith(prefix) for name in self.unused):
                return (
                    f"The names in the files begin with '{prefix}', which {wrapper} puts there:"
                    " save the model inside the wrapper, or take the prefix off the names"
                )
        held = ""
        if self.unused:
            held = f" (they hold {len(self.unused)} others, such as {some(self.unused[:3])})"
        return f"Fetch the model again, or save it whole with transformers' save_pretrained{held}"

    def notes(self) -> list[str]:
        """List what is in order and worth a line in the log."""
        texts = {
            "tied by the configuration (one weight under two names), and not in the files": (
                self.tied
            ),
            "buffers that are not in the files, and have the architecture's own values": (
                self.defaults
            ),
            "in the files, and not used": self.unused,
        }
        return [f"weights: {what}: {some(names)}" for what, names in texts.items() if names]


def _count(weights: int) -> str:
    return "one weight of the model is" if weights == 1 else f"{weights} weights of the model are"


def some(names: tuple[str, ...]) -> str:
    """Join the first few names, and count the rest."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
