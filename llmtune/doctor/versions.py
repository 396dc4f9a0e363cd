"""Compare installed versions with the requirements and with pairs that are known to break."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

#: DeepSpeed whose buffers the plan computes and whose faults ``engine/deepspeed_fixes.py`` fixes.
TRIED_DEEPSPEED = "0.19"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadPair:
    """Versions of two packages that do not work together."""

    first: str
    first_versions: str
    second: str
    second_versions: str
    symptom: str
    command: str


KNOWN_BAD = [
    BadPair(
        first="deepspeed",
        first_versions="<0.14.4",
        second="numpy",
        second_versions=">=2",
        symptom="importing deepspeed fails: cannot import name 'BUFSIZE' from 'numpy'",
        command="pip install 'deepspeed>=0.19.8,<0.20'",
    ),
    BadPair(
        first="deepspeed",
        first_versions="<0.16.3",
        second="torch",
        second_versions=">=2.6",
        symptom="torch.load refuses DeepSpeed's checkpoints (weights_only became the default)",
        command="pip install 'deepspeed>=0.19.8,<0.20'",
    ),
    BadPair(
        first="peft",
        first_versions="<0.18",
        second="transformers",
        second_versions=">=5",
        symptom="peft imports what transformers 5 no longer has",
        command="pip install 'peft>=0.21,<0.22'",
    ),
    BadPair(
        first="bitsandbytes",
        first_versions="<0.43",
        second="torch",
        second_versions=">=2.5",
        symptom="bitsandbytes finds no CUDA library of that torch",
        command="pip install -U bitsandbytes",
    ),
]


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_bad_pairs(versions: dict[str, str | None]) -> list[BadPair]:
    """Return the known bad pairs among installed versions.

    Args:
        versions: Package -> its version, None where it is not installed.
    """
    return [
        pair
        for pair in KNOWN_BAD
        if _within(versions.get(pair.first), pair.first_versions)
        and _within(versions.get(pair.second), pair.second_versions)
    ]


def find_unmet_requirements() -> list[tuple[str, str | None]]:
    """Return each unmet requirement with the installed version (None: not installed)."""
    unmet = []
    for text in metadata.requires("llmtune") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append((f"{requirement.name}{requirement.specifier}", version))
    return unmet


def _within(version: str | None, specifier: str) -> bool:
    return version is not None and Version(version) in SpecifierSet(specifier, prereleases=True)
