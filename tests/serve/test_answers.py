"""A client of OpenAI's API gets from the server what ``chat`` says, greedy, token for token.

The packages are those of the extra ``serve``, and ``llama-cpp-python[server]``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, free_port, run_cli

pytestmark = [pytest.mark.process, pytest.mark.slow]

PROMPTS = ["What does the function len do?", "Name three colors.", "2 + 2 ="]
TOKENS = 24
JOBS = {
    "tiny": ["model=tiny", "optim.learning_rate=2e-3", "train.max_steps=20"],
    "smollm2": ["model=smollm2_135m", "train.max_steps=3"],
}


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, int]]:
    """A server of llmtune: what it said at its start, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "llmtune", "serve", *arguments, f"serve.port={port}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        said = "".join(next(iter(process.stderr or [])) for _ in range(4))
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                # Not /v1/models, for which transformers asks the hub.
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield said, port
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()


def ask(openai: Any, port: int, model: str, prompt: str) -> str:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=TOKENS,
    )
    return str(reply.choices[0].message.content).strip()


@pytest.fixture(scope="module", params=JOBS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose merge is exact.

    One that is rounded to the base's bf16 may prefer another word than base and adapter do.
    """
    folder = tmp_path_factory.mktemp("served") / str(request.param)
    settings = ["data.train=stdlib_docs@60", "data.val_set_size=4", "launch.nproc=1"]
    settings += [
        "precision=fp32",
        "train.sample_answers=false",
        "export.dtype=fp32",
        f"output_dir={folder}",
    ]
    done = run_cli("train", *JOBS[request.param], *settings, timeout=1200)
    assert done.code == 0, done.err + done.out
    return folder


def test_transformers_serve_answers_as_chat_does(run: Path) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    in_fp32 = "serve.arguments=[--dtype,float32]"
    with served(f"run={run}", "serve.engine=transformers", in_fp32) as (said, port):
        model = said.splitlines()[-1].split("model", 1)[1].strip()
        answers = [ask(openai, port, model, prompt) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        command = [f"chat.prompt={prompt}", f"chat.max_new_tokens={TOKENS}", "precision=fp32"]
        by_merged = run_cli("chat", f"base={run}/merged", *command)
        by_run = run_cli("chat", f"run={run}", *command)
        assert answer == by_merged.out.strip() == by_run.out.strip()
    assert any(answers)


def test_llama_cpp_answers_for_the_gguf_file(run: Path) -> None:
    """Its arithmetic is its own, so that only the first words have to be those of ``chat``."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("llama_cpp.server")
    if "tiny" in run.name:
        pytest.skip("random weights have no words that two programs agree on")
    assert run_cli("export", f"run={run}", "export=gguf").code == 0
    with served(f"run={run}", "serve.engine=llama_cpp") as (said, port):
        model = said.splitlines()[-1].split("model", 1)[1].strip()
        answer = ask(openai, port, model, PROMPTS[0])
    chat = run_cli("chat", f"base={run}/merged", f"chat.prompt={PROMPTS[0]}", "precision=fp32")
    assert answer.split()[:5] == chat.out.split()[:5]


def test_a_signal_ends_it_and_nothing_is_left(tmp_path: Path) -> None:
    """The server is the process itself: no child of it stays behind."""
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$@" > "$0.said"\nexec sleep 60\n')
    program.chmod(0o755)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    command = [sys.executable, "-m", "llmtune", "serve", f"base={model}"]
    command.append(f"serve.port={free_port()}")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    said = Path(f"{program}.said")
    while not said.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    assert Path(f"/proc/{process.pid}/comm").read_text().strip() in ("sleep", "sh", "vllm")
    assert said.read_text().startswith(f"serve {model} ")
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM
