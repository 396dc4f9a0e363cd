"""What a model's files hold of it, in words: what is refused, and what is worth a line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import MissingPrerequisiteError

#: Names that are shown of many.
_SHOWN = 6

#: Prefixes that wrappers put before all names, and who they are.
_WRAPPERS = {
    "module.": "torch's DataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "peft",
    "_forward_module.": "Lightning Fabric",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """What a model's files hold of it."""

    missing: tuple[str, ...]
    """Parameters that are nowhere in the files."""
    reshaped: tuple[str, ...]
    """Sentences on tensors whose shape is not the model's."""
    tied: tuple[str, ...]
    """Parameters that are not in the files because the configuration makes them another's."""
    untied: tuple[str, ...]
    """Pairs that the configuration makes one, and the files hold with two values."""
    defaults: tuple[str, ...]
    """Buffers that are not in the files and keep the values that the architecture gives them."""
    unused: tuple[str, ...]
    """In the files, and no part of the model."""
    meaningless: tuple[str, ...] = ()
    """Stored as packed numbers, and the folder does not say how to unpack them."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WeightReport:
        """From what JSON made of it."""
        return cls(**{key: tuple(names) for key, names in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def refuse(self, name: str, folder: Path) -> None:
        """
        Args:
            name: Of the model, as the user has it.

        Raises:
            MissingPrerequisiteError: The model would not be the one that is in the files.
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
        held = (
            f" (they hold {len(self.unused)} others, such as {some(self.unused[:3])})"
            if self.unused
            else ""
        )
        return f"Fetch the model again, or save it whole with transformers' save_pretrained{held}"

    def notes(self) -> list[str]:
        """What is as it should be and worth a line in the log."""
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
    """A few of many, and how many there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
