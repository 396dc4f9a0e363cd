"""Python code of a model runs only where the command line of this call asks for it, whatever a
run's own configuration says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.config.stored import dump_yaml
from llmtune.errors import CheckpointError, ConfigError
from llmtune.model.own_code import find_own_code
from llmtune.storage import layout
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import mark_complete, write_manifest
from tests.export.conftest import make_adapter
from tests.support import TINY

#: An architecture that is Llama under another name, and leaves a file when it is imported.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class PlantedConfig(LlamaConfig):
    model_type = "planted"

class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig

class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""
ALLOWED = "model.trust_remote_code=true"
ROW = (
    '{{"messages": [{{"role": "user", "content": "hi"}}, {{"role": "assistant", "content":'
    ' "{answer}"}}]}}\n'
)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What planted code leaves behind.

    Libraries copy such code into a cache, which is this test's own.
    """
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "it-ran"


def plant_model(folder: Path, tiny_model: Path, marker: Path) -> Path:
    """A whole model folder whose architecture is its own."""
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "planted", "architectures": ["PlantedForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "planted.PlantedConfig",
        "AutoModelForCausalLM": "planted.PlantedForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "planted.py").write_text(CODE.format(marker=str(marker)))
    return folder


def plant_run(folder: Path, tiny_model: Path, marker: Path, rows: Path) -> tuple[str, str]:
    """A run as a stranger hands it over, complete by its own marks; and how it is named, whole and
    by its checkpoint.
    """
    folder.mkdir()
    model = plant_model(folder / layout.MODEL, tiny_model, marker)
    config = compose_config(
        [*TINY, "tuner=full", "precision=fp32", ALLOWED, f"data.eval={rows}", f"data.train={rows}"]
    ).config
    rows.with_name("train.jsonl").write_text(ROW.format(answer="to train on"))
    config.data.train = str(rows.with_name("train.jsonl"))
    config.model.config = None
    config.model.name_or_path = str(model)
    for place in (folder, model):
        (place / layout.CONFIG).write_text(dump_yaml(config))
    files = {file.name: hash_file(file) for file in sorted(model.iterdir())}
    write_manifest(model, files, {"step": 1})
    mark_complete(model)
    return f"run={folder}", f"checkpoint={model}"


@pytest.mark.parametrize("place", [0, 1], ids=["run", "checkpoint"])
@pytest.mark.parametrize(
    "verb", [["chat", "chat.prompt=hi", "chat.max_new_tokens=1"], ["eval"]], ids=["chat", "eval"]
)
def test_a_runs_own_configuration_does_not_turn_it_on(
    verb: list[str],
    place: int,
    tiny_model: Path,
    tmp_path: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROW.format(answer="held out"))
    given = plant_run(tmp_path / f"planted-{verb[0]}-{place}", tiny_model, marker, rows)[place]
    code = main([*verb, given])
    said = capsys.readouterr().err
    assert code == ConfigError.exit_code, said
    assert not marker.exists(), "its code ran"
    assert "needs its own Python code (planted.PlantedConfig, planted.PlantedForCausalLM)" in said
    assert (
        "asks for that itself, which does not count: it may be anybody's. Read it; if you trust"
        f" it, add {ALLOWED}" in said
    )

    assert main([*verb, given, ALLOWED]) == 0
    assert marker.exists()
    assert "note: Python code that" in capsys.readouterr().err, "it is said whose code runs"


def test_a_run_that_asks_for_code_and_needs_none_goes_on_working(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_model, folder)
    config = compose_config([*TINY, "tuner=full", "precision=fp32", ALLOWED]).config
    (folder / layout.CONFIG).write_text(dump_yaml(config))
    write_manifest(folder, {file.name: hash_file(file) for file in folder.iterdir()}, {"step": 1})
    mark_complete(folder)
    assert main(["chat", f"checkpoint={folder}", "chat.prompt=hi", "chat.max_new_tokens=1"]) == 0
    assert capsys.readouterr().err == ""


def test_to_allow_a_bases_code_is_not_to_allow_an_adapters(
    tiny_model: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base and adapter may be of different authors."""
    adapter = make_adapter(tiny_model, tmp_path / "planted-adapter")
    for file in (*tiny_model.glob("*token*"), *tiny_model.glob("*.jinja")):
        shutil.copyfile(file, adapter / file.name)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "PlantedTokenizer",
        "auto_map": {"AutoTokenizer": [None, "planted.PlantedTokenizer"]},
    }
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    (adapter / "planted.py").write_text(CODE.format(marker=str(marker)))
    command = [
        "chat",
        f"base={tiny_model}",
        f"adapter={adapter}",
        "chat.prompt=hi",
        "chat.max_new_tokens=1",
    ]
    assert main(command) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert "the code of an adapter never runs" in said
    assert f"{ALLOWED} has the base's class read its tokens" in said
    code = main([*command, ALLOWED])
    assert not marker.exists(), "the adapter's code ran"
    assert code == 0, capsys.readouterr().err


def test_code_of_another_repository_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "them/theirs--modeling.X"}}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": [null, "own.Y"]}')
    (tmp_path / "generation_config.json").write_text("[]")
    assert find_own_code(tmp_path) == ["own.Y", "them/theirs--modeling.X"]
    assert find_own_code(tmp_path / "nothing") == []


def test_a_stored_configuration_does_not_say_where_this_call_writes(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    from llmtune.run.artifact import resolve_target

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_model, folder)
    config = compose_config(
        [*TINY, "tuner=full", f"paths.cache_dir={tmp_path / 'elsewhere'}"]
    ).config
    (folder / layout.CONFIG).write_text(dump_yaml(config))
    write_manifest(folder, {file.name: hash_file(file) for file in folder.iterdir()}, {"step": 1})
    mark_complete(folder)
    target = resolve_target(compose_config([f"checkpoint={folder}"]))
    assert Path(target.config.paths.cache_dir) == cache
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_settings_of_an_adapter_that_are_none_are_an_error(
    text: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    code = main(["chat", f"base={tiny_model}", f"adapter={tmp_path}", "chat.prompt=hi"])
    assert code == CheckpointError.exit_code
    assert "adapter_config.json is damaged" in capsys.readouterr().err


def test_an_adapter_does_not_have_a_module_imported(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "planted_megatron.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings |= {"megatron_config": {"a": 1}, "megatron_core": "planted_megatron"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    code = main(["chat", f"base={tiny_model}", f"adapter={adapter}", "chat.prompt=hi"])
    assert not (tmp_path / "it-ran").exists()
    assert code == CheckpointError.exit_code
    assert "has peft import planted_megatron" in capsys.readouterr().err
