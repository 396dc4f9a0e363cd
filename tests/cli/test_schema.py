"""``--schema`` prints a JSON Schema without loading the libraries."""

from __future__ import annotations

import json
import sys

import pytest

from llmtune.cli.main import main
from llmtune.cli.reference.schema import list_variants
from llmtune.config.reference.json_schema import DIALECT, make_json_schema
from tests.support import run


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == make_json_schema(list_variants())
    assert printed["$schema"] == DIALECT


def test_registered_variants_are_its_words() -> None:
    variants = list_variants()
    assert {"lora", "qlora", "full", "freeze"} <= set(variants["tuner.kind"])
    assert {"none", "gguf"} <= set(variants["export.format"])
    kind = make_json_schema(variants)["properties"]["optim"]["properties"]["kind"]
    assert set(variants["optim.kind"]) == set(kind["anyOf"][0]["enum"])


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_it_imports_no_torch() -> None:
    program = (
        "import sys; from llmtune.cli.main import main; code = main(['--schema']);"
        " sys.stderr.write(' '.join({name.split('.')[0] for name in sys.modules})); sys.exit(code)"
    )
    done = run([sys.executable, "-c", program])
    assert done.code == 0, done.err
    assert not {"torch", "transformers", "deepspeed", "datasets"} & set(done.err.split())
