"""The result of a run, ``adapter/`` or ``model/``: the model of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.checkpoint.best import BestSoFar
from llmtune.checkpoint.retention import find_best, list_checkpoints
from llmtune.config.best_model import BestModel
from llmtune.storage import layout
from llmtune.storage.atomic import aside_path, link_or_copy, make_empty
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import find_damage, publish, read_manifest, write_manifest
from llmtune.storage.signature import Signer

#: Files of a checkpoint that are no part of the trained model.
_STATE = {layout.TRAINER_STATE, layout.CONFIG, layout.METRICS}


def choose_result(
    last: Path, rule: BestModel | None, best: BestSoFar, say: Callable[[str], None]
) -> Path:
    """Return the checkpoint whose model a run publishes: the last one, or the best.

    Where the best one is gone or damaged, it is the best of the others, and the user is told.

    Args:
        last: The checkpoint of the last step, in the run folder.
    """
    if rule is None or not rule.load_at_end or best.step is None:
        return last
    chosen = layout.checkpoint_folder(last.parent, best.step)
    if chosen == last:
        return last
    problems = find_damage(chosen, left_out=layout.is_state_file)
    if not problems:
        return chosen
    others = [
        checkpoint
        for checkpoint in list_checkpoints(last.parent)
        if checkpoint.folder != chosen
        and not find_damage(checkpoint.folder, left_out=layout.is_state_file)
    ]
    found = find_best(others, rule)
    taken = last if found is None else found.folder
    say(
        f"warning: {rule.metric} was best at step {best.step} ({best.value}), and {chosen} cannot"
        f" be published ({'; '.join(problems[:3])}); {taken.name} is published instead"
    )
    return taken


def link_result(
    checkpoint: Path,
    result: Path,
    signer: Signer | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Hard-link the model of a complete checkpoint under another name.

    The hashes are those of the checkpoint's manifest.

    Args:
        about: Further values of the manifest.
    """
    manifest = read_manifest(checkpoint)
    aside = aside_path(result)
    make_empty(aside)
    files = {
        name: entry
        for name, entry in manifest["files"].items()
        if name not in _STATE and not layout.is_state_file(name)
    }
    for name in files:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        if not link_or_copy(checkpoint / name, aside / name):
            files[name] = hash_file(aside / name)
    described = {"kind": "result", "from": checkpoint.name, "step": manifest["step"]}
    write_manifest(aside, files, {**described, **(about or {})}, signer)
    publish(aside, result)
