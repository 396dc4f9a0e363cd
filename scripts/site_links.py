"""Turn links to files outside of ``docs/`` into addresses of the repository, for the site.

On GitHub ``[conf/](../conf/)`` works as it is. A site has no such file, so that the hook that
``mkdocs.yml`` names puts the repository's address in its place. The address is ``extra.repository``
of ``mkdocs.yml``, or that of the repository in which GitHub Actions builds the site. Where neither
is known, the text stays, without a link.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def find_repository(extra: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    """Return the address of the repository; None where nothing names it."""
    if named := extra.get("repository"):
        return str(named).rstrip("/")
    server, name = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    return f"{server}/{name}" if server and name else None


def link_outside(markdown: str, repository: str | None, branch: str = "main") -> str:
    """Replace the links of a page that lead out of ``docs/``.

    Raises:
        FileNotFoundError: There is no such file in the repository.
    """

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        target = ROOT / path
        if not target.exists():
            raise FileNotFoundError(f"a page links to {path}, which is not there")
        if repository is None:
            return text
        kind = "tree" if target.is_dir() else "blob"
        return f"[{text}]({repository}/{kind}/{branch}/{path.rstrip('/')}{anchor})"

    return _OUTSIDE.sub(replace, markdown)


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Be called by mkdocs for each page."""
    extra = config["extra"]
    repository = find_repository(extra, os.environ)
    return link_outside(markdown, repository, str(extra.get("branch", "main")))
