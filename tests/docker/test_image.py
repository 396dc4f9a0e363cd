"""The Dockerfile, compose.yaml and the manifests agree with each other and with llmtune."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath
from typing import Any

import pytest

import llmtune
from llmtune.cli.arguments import parse
from llmtune.cli.verbs import VERBS
from llmtune.config.compose import compose_config
from llmtune.config.groups.launch import LaunchConfig
from llmtune.config.groups.tracker import TrackerConfig
from llmtune.config.schema import Config
from llmtune.errors import ERRORS_BY_CODE, EXIT_STOPPED
from tests.docker.files import (
    DOCKER,
    DOCKERFILE,
    default,
    folders_of_the_image,
    read_manifests,
    read_services,
)
from tests.support import ROOT

JOB = read_manifests(DOCKER / "k8s" / "job.yaml")
PYTORCH_JOB = read_manifests(DOCKER / "k8s" / "pytorchjob.yaml")["PyTorchJob"]
REPLICAS = PYTORCH_JOB["spec"]["pytorchReplicaSpecs"]
PODS = {
    "job": JOB["Job"]["spec"]["template"]["spec"],
    **{name: replica["template"]["spec"] for name, replica in REPLICAS.items()},
}
SERVICES = read_services()
#: Those that llmtune's image runs.
OWN = {name: service for name, service in SERVICES.items() if "llmtune" in service["image"]}


def compose(arguments: list[str]) -> Config:
    parsed = parse(arguments, VERBS)
    return compose_config(parsed.overrides).config


def test_what_is_copied_is_there_and_nothing_else_reaches_the_engine() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
        if not source.startswith("--")
    ]
    assert len(copied) > 10
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {PurePosixPath(source).parts[0] for source in copied} == let_through
    assert "docker/.env" in lines


def test_the_image_is_of_this_version_and_runs_as_no_root() -> None:
    assert default("VERSION") == llmtune.__version__
    stages = DOCKERFILE.split("\nFROM ")[1:]
    names = [re.findall(r" AS (\w+)$", stage.splitlines()[0])[0] for stage in stages]
    assert names == ["base", "build", "runtime", "jupyter", "ssh", "train"]
    for name, stage in zip(names, stages, strict=True):
        if name in ("runtime", "jupyter", "ssh"):
            assert re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1] == "${USER_ID}"
        if name in ("jupyter", "ssh", "train"):
            assert "\nHEALTHCHECK " in stage
    # A key in an ARG or ENV would stand in a layer.
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|PASSWORD|SECRET|KEY)", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_reached_from_this_machine_alone(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # Other images have a version, whose tag does not move.
    assert name in OWN or re.search(r":v?\d+\.\d+\.\d+$", service["image"])


@pytest.mark.parametrize("name", OWN)
def test_a_service_mounts_what_the_image_has(name: str) -> None:
    targets = {mount.split(":")[1] for mount in OWN[name]["volumes"]}
    assert targets - {"/home/llmtune/.host-keys"} <= folders_of_the_image()
    assert "/data:ro" in "".join(OWN[name]["volumes"]) or name == "tensorboard"


def test_what_compose_trains_is_what_prometheus_reads() -> None:
    service = SERVICES["train"]
    config = compose(shlex.split(service["command"]))
    assert config.tracker.prometheus_host == "0.0.0.0"
    scraped = (DOCKER / "prometheus" / "prometheus.yml").read_text()
    assert f'"train:{TrackerConfig().prometheus_port}"' in scraped
    assert f"EXPOSE {TrackerConfig().prometheus_port}" in DOCKERFILE
    minutes = int(service["stop_grace_period"].removesuffix("m"))
    assert minutes * 60 > LaunchConfig().stop_timeout


def test_the_example_of_settings_composes() -> None:
    text = (DOCKER / "env.example").read_text()
    (arguments,) = re.findall(r'^LLMTUNE_ARGS="(.*)"$', text, re.MULTILINE)
    assert compose(arguments.split()).output_dir == "/workspace/runs/first"
    named = set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE))
    read = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    assert read - {"BASE", "DIGEST"} == named


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_a_pod_trains_into_a_folder_of_a_volume(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    arguments = container["args"]
    config = compose(arguments[arguments.index("llmtune") + 1 :])
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts - {"/dev/shm"} <= folders_of_the_image()
    assert str(PurePosixPath(str(config.output_dir)).parent) in mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert container["command"] == ["/opt/llmtune/node.py"]
    assert "docker/node.py /opt/llmtune/" in DOCKERFILE
    assert container["image"].endswith(f":{llmtune.__version__}")
    assert pod["securityContext"]["runAsUser"] == int(default("USER_ID"))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["terminationGracePeriodSeconds"] > LaunchConfig().stop_timeout


def test_a_job_tells_what_would_fail_again_from_what_was_stopped() -> None:
    rules = JOB["Job"]["spec"]["podFailurePolicy"]["rules"]
    by_action: dict[str, set[int]] = {}
    for rule in rules:
        by_action.setdefault(rule["action"], set()).update(
            rule.get("onExitCodes", {}).get("values", [])
        )
    assert by_action == {"FailJob": set(ERRORS_BY_CODE) - {EXIT_STOPPED}, "Ignore": {EXIT_STOPPED}}
    # A policy of failures is for pods that are not restarted in place.
    assert PODS["job"]["restartPolicy"] == "Never"


def test_the_first_pod_of_a_job_has_the_name_that_the_others_ask_for() -> None:
    spec, service = JOB["Job"]["spec"], JOB["Service"]
    name = f"{JOB['Job']['metadata']['name']}-0.{service['metadata']['name']}"
    arguments = PODS["job"]["containers"][0]["args"]
    assert f"--master_addr={name}" in arguments
    assert PODS["job"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert f"--nnodes={spec['completions']}" in arguments
    assert spec["completions"] == spec["parallelism"]
    assert REPLICAS["Master"]["replicas"] == 1
