"""The JavaScript that draws: Vega, Vega-Lite and vega-embed in one text, made once per version."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune.storage.atomic import write_cache_file

#: Package -> its module.
_PACKAGES = {"altair": "altair", "vl-convert-python": "vl_convert"}

_FOLDER = "report"


def find_missing() -> list[str]:
    """Find the packages for drawing that are not installed."""
    return [
        package for package, module in _PACKAGES.items() if importlib.util.find_spec(module) is None
    ]


def describe_missing(packages: list[str]) -> str:
    """Say what to install."""
    return f"report.html is not written: pip install {' '.join(packages)}"


def read_script(cache: Path) -> str:
    """Return the script, which defines ``vegaEmbed``; the cache keeps it, for it takes seconds.

    Raises:
        ImportError: vl-convert is not installed.
    """
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    name = f"vega-{metadata.version('vl-convert-python')}-{version}.js"
    file = cache / _FOLDER / re.sub(r"[^\w.-]", "_", name)
    # A crash of the machine may leave an empty file.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := file.read_text(encoding="utf-8"):
            return text
    # Its annotation does not know that the snippet may be left out.
    make: Any = vl_convert.javascript_bundle
    script: str = make(vl_version=version)
    with contextlib.suppress(OSError):
        write_cache_file(file, script)
    return script
