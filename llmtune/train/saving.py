"""Checkpoints during the run, and the trained model at its end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoint import names
from llmtune.checkpoint.find import prune_checkpoints
from llmtune.checkpoint.manifest import hash_file, publish, write_manifest
from llmtune.checkpoint.save import save_checkpoint
from llmtune.checkpoint.weights import write_model_config, write_weights
from llmtune.engine.module import TrainModule
from llmtune.model.adapters import to_file_name, write_adapter_config
from llmtune.train.loop import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: In a checkpoint only, and no part of the trained model.
_STATE = (names.TRAINER_STATE, names.MANIFEST, names.COMPLETE, names.CONFIG)


class CheckpointSaver:
    """Writes ``checkpoint-<step>`` folders, keeps the newest, and links the last one's model as the result."""

    def __init__(
        self,
        module: TrainModule,
        tokenizer: PreTrainedTokenizerBase,
        run: Path,
        adapter_only: bool,
        data_fingerprint: str,
        save_total_limit: int | None,
        max_shard_bytes: int,
    ):
        self.module = module
        self.tokenizer = tokenizer
        self.run = run
        self.adapter_only = adapter_only
        self.data_fingerprint = data_fingerprint
        self.save_total_limit = save_total_limit
        self.max_shard_bytes = max_shard_bytes
        self._newest: Path | None = None

    def save(self, progress: Progress) -> Path:
        """Publish the checkpoint of this step, unless it is there. Collective."""
        folder = names.checkpoint_folder(self.run, progress.step)
        if folder == self._newest:
            return folder
        self.module.rank.phases.enter("save")
        save_checkpoint(
            self.module,
            folder,
            progress.step,
            progress.tokens,
            self.data_fingerprint,
            progress.data_position,
            self._write_model,
        )
        if self.module.rank.is_first:
            prune_checkpoints(self.run, self.save_total_limit)
        self._newest = folder
        return folder

    def publish_result(self, progress: Progress) -> Path:
        """``adapter/`` or ``model/``: the last checkpoint's model, hard-linked, and marked as the end of the run."""
        result = self.run / (names.ADAPTER if self.adapter_only else names.MODEL)
        if self.module.rank.is_first:
            self._link_result(names.checkpoint_folder(self.run, progress.step), result)
            finished = {"step": progress.step, "tokens": progress.tokens}
            (self.run / names.FINISHED).write_text(json.dumps(finished))
        return result

    def _write_model(self, folder: Path) -> None:
        write_weights(
            self.module,
            folder,
            self.adapter_only,
            self.max_shard_bytes,
            to_file_name if self.adapter_only else str,
        )
        if not self.module.rank.is_first:
            return
        if self.adapter_only:
            write_adapter_config(self.module.model, folder)
        else:
            write_model_config(self.module.model, folder)
        self.tokenizer.save_pretrained(str(folder))
        shutil.copyfile(self.run / names.CONFIG, folder / names.CONFIG)

    def _link_result(self, checkpoint: Path, result: Path) -> None:
        aside = result.with_name(result.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for file in checkpoint.iterdir():
            if file.name not in _STATE and not file.match(names.STATE_FILES):
                try:
                    os.link(file, aside / file.name)
                except OSError:
                    # No hard links on this file system.
                    shutil.copyfile(file, aside / file.name)
        files = {file.name: hash_file(file) for file in aside.iterdir()}
        write_manifest(aside, files, {"from": checkpoint.name})
        shutil.rmtree(result, ignore_errors=True)
        publish(aside, result)
