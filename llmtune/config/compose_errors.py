"""Describe errors of Hydra, OmegaConf and YAML with the file, the key and the next step."""

from __future__ import annotations

import re

import yaml

from llmtune.config.foreign import meant_by
from llmtune.config.keys import YAML_ALIASES, known_keys
from llmtune.config.nearest import nearest
from llmtune.config.stored import first_line


def describe_compose_error(error: BaseException) -> str:
    """Describe an error with its key, and with a suggestion for an unknown one."""
    if isinstance(error, yaml.YAMLError):
        text = " ".join(line.strip() for line in str(error).splitlines())
        return f"a file of the configuration is no YAML: {text}"
    unknown = re.search(r"Key '([^']+)' (?:is )?not in ", str(error))
    full_key = re.search(r"full_key: ([\w.]+)", str(error))
    if unknown is None:
        return first_line(error) + (f" ({full_key[1]})" if full_key else "")
    known = known_keys() | set(YAML_ALIASES)
    if full_key is not None:
        # A key of the same group is the likelier one.
        group = full_key[1].rpartition(".")[0]
        close = nearest(full_key[1], {key for key in known if key.rpartition(".")[0] == group})
        if close:
            return first_line(error) + close
    return first_line(error) + meant_by(unknown[1], known)
