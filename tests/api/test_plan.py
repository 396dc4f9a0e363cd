"""``llmtune.plan`` is what the verb prints, and leaves the program that calls it as it was."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from contextlib import redirect_stdout

import pytest
import transformers

import llmtune
import llmtune.plan.resolve
from llmtune.cli.main import main
from llmtune.errors import ConfigError

JOB = ["model=tiny", "hardware=2x3090", "hardware.host_memory_bytes=2TB", "tuner=full"]


def test_it_is_what_the_verb_prints(capfd: pytest.CaptureFixture[str]) -> None:
    found = llmtune.plan(*JOB)
    assert found.fits
    assert found.misfit is None
    assert found.chosen is not None
    assert found.chosen.placement.rung == "none"
    assert main(["plan", *JOB, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads(json.dumps(found.to_json()))
    assert "* none" in str(found)


def test_a_job_that_does_not_fit_is_no_error() -> None:
    small = {"hardware.gpu_memory_bytes": "1GB", "hardware.host_memory_bytes": "1GB"}
    found = llmtune.plan(*JOB, small, "model.config.vocab_size=20000000")
    assert not found.fits
    assert found.chosen is None
    assert found.misfit is not None
    assert "does not fit" in found.misfit
    assert found.advice


def test_every_problem_of_the_configuration_is_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"(?s)model=tinny.*unknown key 'lr'"):
        llmtune.plan("model=tinny", {"lr": 3})


def test_libraries_are_as_talkative_as_before() -> None:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        before = (list(warnings.filters), logging.root.manager.disable, dict(os.environ))
        with redirect_stdout(io.StringIO()) as out:
            llmtune.plan("model=tiny", "hardware=laptop")
        assert (list(warnings.filters), logging.root.manager.disable, dict(os.environ)) == before
        assert transformers.logging.get_verbosity() == logging.INFO
        assert out.getvalue() == ""
    finally:
        transformers.logging.set_verbosity(verbosity)


def test_the_room_is_still_a_package() -> None:
    assert llmtune.plan.resolve is sys.modules["llmtune.plan.resolve"]  # type: ignore[attr-defined]
    assert "frozen plan" in (llmtune.plan.__doc__ or "")
    with pytest.raises(AttributeError, match="no attribute 'pan'"):
        llmtune.pan  # type: ignore[attr-defined] # noqa: B018
