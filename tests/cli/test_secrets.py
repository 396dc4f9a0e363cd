"""A real run that prints its whole environment, in every form, and crashes with it leaves no secret
below its folder.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from tests.security.planted import FORMS, plant, traces
from tests.support import ROOT, TINY, Finished, run_cli

WANDB_KEY = "0123456789abcdef0123456789abcdefplanted1"
HF_TOKEN = "hf_planted2ABCDEFGHIJKLMNOPQRSTUV"
FROM_FILE = "planted3-only-in-the-file"
URL_PASSWORD = "planted4-of-a-url"

#: One of each kind of name.
PLANTED = plant(25)

#: Every Python process prints its environment at its start; rank 1 crashes with it, in all forms,
#: in its third step.
SITECUSTOMIZE = """
import importlib.machinery, os, subprocess, sys

print(dict(os.environ), flush=True)

def crash(train_step):
    def wrapped(self, *arguments):
        wrapped.calls += 1
        if wrapped.calls == 3:
            print(open(os.environ["FORMS"], encoding="utf-8", newline="").read(), flush=True)
            os.write(1, f"{dict(os.environ)}\\n".encode())
            subprocess.run(["env"])
            raise RuntimeError(str(os.environ))
        return train_step(self, *arguments)
    wrapped.calls = 0
    return wrapped

class Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        module.TrainModule.train_step = crash(module.TrainModule.train_step)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "llmtune.engine.train_module":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Loader(name, spec.origin)
        return spec

if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Finder)
"""


def write_forms(file: Path, planted: dict[str, str]) -> None:
    """A text with every form of every secret."""
    lines = [form(value) for value in planted.values() for form in FORMS.values()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


def find_traces(folder: Path, planted: dict[str, str]) -> list[tuple[str, str]]:
    """Files below a folder with what they show of which secret; tensors and pictures may hold any
    four letters.
    """
    found = []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        content = re.sub(rb"data:image/png;base64,[A-Za-z0-9+/=]+", b"", file.read_bytes())
        for name, value in planted.items():
            shown = (
                {value}
                if file.suffix in (".safetensors", ".npy", ".png")
                else {value, *traces(value)}
            )
            found += [(str(file), name) for text in shown if text.encode() in content]
    return found


@pytest.fixture
def crashed(tmp_path: Path) -> tuple[Finished, Path]:
    """A run of two ranks, and its folder."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / ".env").write_text(
        f"MY_SERVICE_PASS={FROM_FILE}\nHF_TOKEN=hf_which_the_environment_overrides\n"
    )
    write_forms(tmp_path / "forms", PLANTED)
    folder = tmp_path / "run"
    before = os.umask(0)
    try:
        done = run_cli(
            *TINY,
            "launch.nproc=2",
            "train.max_steps=4",
            "train.save_steps=1",
            "train.eval_max_rows=8",
            "tracker=wandb",
            "tracker.mode=offline",
            "export=none",
            f"output_dir={folder}",
            "launch.max_restarts=0",
            f"tracker.project=llmtune-{HF_TOKEN}",
            cwd=tmp_path,
            env={
                **PLANTED,
                "FORMS": str(tmp_path / "forms"),
                "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
                "WANDB_API_KEY": WANDB_KEY,
                "HF_TOKEN": HF_TOKEN,
            },
        )
    finally:
        os.umask(before)
    return done, folder


@pytest.mark.process
def test_no_secret_is_found_below_the_run_folder_after_a_crash(
    crashed: tuple[Finished, Path],
) -> None:
    done, folder = crashed
    assert done.code == 1, done.out[-2000:] + done.err
    log = (folder / "train.log").read_text()
    assert log.count("'HF_TOKEN': '***HF_TOKEN***'") >= 2, "printed, and in the traceback"
    assert "MY_SERVICE_PASS=***MY_SERVICE_PASS***" in log, (
        "printed by a program that the rank started"
    )
    assert "WANDB_API_KEY=***WANDB_API_KEY***" in log
    assert list(folder.glob("checkpoint-*")), "crashed later than the first checkpoint"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))

    secrets = [text.encode() for text in (WANDB_KEY, HF_TOKEN, FROM_FILE)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [
        (path.name, secret) for path in files for secret in secrets if secret in path.read_bytes()
    ]
    assert not found
    assert not find_traces(folder, PLANTED)
    for name in PLANTED:
        assert log.count(f"***{name}***") > len(FORMS) // 2, "all forms of it were printed"
    assert not any(secret.decode() in done.err for secret in secrets)
    assert "***HF_TOKEN***" in done.err

    open_to_others = [
        path
        for path in (folder, *folder.rglob("*"))
        if path.lstat().st_mode & (stat.S_IWOTH | stat.S_IWGRP)
    ]
    assert not [path for path in open_to_others if not path.is_symlink()]


@pytest.mark.process
@pytest.mark.parametrize("trace", [[], ["debug=trace"]])
def test_messages_on_the_terminal_hold_no_secret(tmp_path: Path, trace: list[str]) -> None:
    (tmp_path / ".env").write_text(f"MY_SERVICE_PASS={FROM_FILE}\n")
    url = f"https://me:{URL_PASSWORD}@127.0.0.1:9/{FROM_FILE}.jsonl"
    for arguments in (["data", f"data.train=[{url}]", *TINY, *trace], [f"no_such_key={FROM_FILE}"]):
        done = run_cli(*arguments, cwd=tmp_path)
        assert done.code not in (0, 1)
        assert FROM_FILE not in done.out + done.err
        assert URL_PASSWORD not in done.out + done.err


@pytest.mark.process
def test_a_printed_configuration_holds_no_secret(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"MY_SERVICE_PASS={FROM_FILE}\n")
    done = run_cli(
        "--cfg",
        "job",
        "run_name=${oc.env:MY_SERVICE_PASS}",
        f"model.revision={FROM_FILE}",
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert FROM_FILE not in done.out
    assert (
        "revision: '***MY_SERVICE_PASS***'" in done.out
        or "revision: ***MY_SERVICE_PASS***" in done.out
    )
