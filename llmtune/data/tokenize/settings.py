"""The settings that shape the tokens of a row, beside the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.config.groups.data import DataConfig, Overlong


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings:
    """The slice of the configuration that shapes tokens; part of their key in the cache."""

    max_seq_length: int
    overlong: Overlong
    train_on_inputs: bool
    allow_special_tokens: bool = False

    @classmethod
    def from_config(cls, config: DataConfig) -> EncodeSettings:
        """Take the settings from a configuration."""
        return cls(
            max_seq_length=config.max_seq_length,
            overlong=config.overlong,
            train_on_inputs=config.train_on_inputs,
            allow_special_tokens=config.allow_special_tokens,
        )
