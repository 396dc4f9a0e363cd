"""The facts that the code and commands of a model card need to load and serve an export."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llmtune.export.architecture import TEXT, TEXT_TO_TEXT, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The facts that the commands need; templates read them as ``usage``."""

    folder: Path
    """Folder of the written files, which is renamed later: texts name files by paths within it."""
    loads_from_hub: bool
    """Loaders of the format take the name of a repository, and not only a folder."""
    name: str
    """Name of the model at a server: letters, digits, dots and dashes."""
    repo: str | None
    """The repository on the hub that it is uploaded to."""
    base: str
    """Hub id of the base, or a path for the reader to fill in."""
    has_template: bool
    """True if the tokenizer has a chat template."""
    task: Task
    own_code: bool
    """The base brings Python code that transformers has to be allowed to run."""
    adapter: dict[str, Any]
    """peft's settings."""
    base_rows: int | None
    """Rows of the embedding that the adapter needs, where the published base may have others."""

    @property
    def place(self) -> str:
        """Return the repository or folder that loaders of transformers, peft and vLLM are given."""
        return self.repo if self.repo is not None and self.loads_from_hub else "."

    @property
    def writes_text(self) -> bool:
        """Tell whether the model continues a text, rather than giving labels or numbers for it."""
        return self.task in (TEXT, TEXT_TO_TEXT)

    def find_file(self, pattern: str, default: str) -> Markup:
        """Find the first file of a pattern whose name Markdown, a shell and Python take as it is.

        Returns:
            Its name; ``default`` where there is none.
        """
        names = sorted(file.name for file in self.folder.glob(pattern))
        plain = bool(names) and re.fullmatch(r"[\w.-]+", names[0]) is not None
        return Markup(names[0] if plain else default)
