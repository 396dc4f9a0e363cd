"""No form of a secret gets through: 200 secrets of all kinds in 44 forms, alone, in longer text, in
pieces and in chunks.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data.report.html import DataReport, write_page
from llmtune.data.report.statistics import TextSpan, redact_texts
from llmtune.security.redaction import (
    has_secrets,
    redact,
    redact_pieces,
    redact_values,
    split_unfinished,
)
from tests.security.planted import FORMS, plant, traces


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name not in ("PATH", "HOME"):
            monkeypatch.delenv(name)


#: Of so many at a time, so that looking for all of them takes a tenth.
BATCH = 20


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_there_are_enough_of_them() -> None:
    variables = plant(200)
    assert len(set(variables.values())) == 200
    assert len(FORMS) >= 40
    assert all(traces(value) for value in variables.values())
    # Each form is found again by its traces where nothing takes it out.
    for value in variables.values():
        for form in FORMS.values():
            assert any(trace in form(value) for trace in traces(value)), (value, form(value))


@pytest.mark.parametrize("batch", range(200 // BATCH))
def test_no_form_of_any_secret_is_left(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(list(plant(200).items())[batch * BATCH : (batch + 1) * BATCH])
    set_all(monkeypatch, variables)
    for name, value in variables.items():
        shown = redact(
            "\n".join(f"{number} {form(value)} |" for number, form in enumerate(FORMS.values()))
        )
        assert not [trace for trace in traces(value) if trace in shown], (name, value, shown)
        assert redact(shown) == shown, "twice is once"
        assert f"***{name}***" in shown


@pytest.mark.parametrize(
    "name", ["DB_PASS", "MYSQL_PWD", "SSHPASS", "REDISCLI_AUTH", "HTTP_AUTHORIZATION", "JWT"]
)
@pytest.mark.parametrize("value", ["abc", "1234", "hunter2", "S3cr3t!"])
def test_a_short_value_is_hidden_behind_its_name_and_alone_where_it_is_no_word(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert has_secrets()
    for text in (
        f"{name}={value}",
        str({name: value}),
        f'{{"{name}": "{value}"}}',
        f"{name}: {value}\nmore",
    ):
        assert value not in redact(text).replace(name, "")
    mixed = not (value.isalpha() or value.isdigit())
    assert redact(f"it is {value}, so") == (
        f"it is ***{name}***, so" if mixed else f"it is {value}, so"
    )
    assert redact(f"x{value}y") == f"x{value}y", "within a word it is none"


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("HTTPS_PROXY", "http://me:pr0xy%2Fpw@proxy:3128", ["pr0xy%2Fpw", "pr0xy/pw"]),
        ("DATABASE_URL", "postgres://app:pa/ss@db/x", ["pa/ss@"]),
        (
            "STORAGE",
            "https://a.blob.core.windows.net/c?sv=1&sig=abc%2Bdef12345&se=2",
            ["abc%2Bdef12345", "abc+def12345"],
        ),
        (
            "AZURE_STORAGE_CONNECTION_STRING",
            "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=abcdEFGH1234+/==;EndpointSuffix=core.windows.net",
            ["abcdEFGH1234+/=="],
        ),
        (
            "SLACK_WEBHOOK_URL",
            "https://hooks.slack.com/services/T0/B0/XyZ0123456789",
            ["POST /services/T0/B0/XyZ0123456789"],
        ),
        (
            "DOCKER_AUTH_CONFIG",
            '{"auths": {"h": {"auth": "dXNlcjpodW50ZXIyLW1vcmU="}}}',
            ["dXNlcjpodW50ZXIyLW1vcmU=", "hunter2-more"],
        ),
        (
            "GCP_CREDENTIALS_JSON",
            '{"type": "service_account", "private_key": "MIIEvQIBADANBg"}',
            ["MIIEvQIBADANBg"],
        ),
    ],
)
def test_what_is_secret_within_a_value_is_hidden_alone(
    name: str, value: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for part in parts:
        secret = part.removeprefix("POST ").removesuffix("@")
        assert secret not in redact(f"sent {part} there")
    assert (
        redact("service_account https core.windows.net acc")
        == "service_account https core.windows.net acc"
    )


#: No parameters of a test: pytest puts those into the environment, where passwords in URLs are
#: secrets.
OPENED = [
    ("https://u:pa/ss@host/x", "https://***@host/x"),
    ("https://u:p@s/s@host.de/x", "https://***@host.de/x"),
    ("HTTPS://tok@h", "HTTPS://***@h"),
    ("git+https://tok@github.com/a/b@main", "git+https://***@github.com/a/b@main"),
    ("ftp://tok3n0123456789abcdef@h/x", "ftp://***@h/x"),
    ("https://x/y?a=1&sig=ab%2Fc&b=2", "https://x/y?a=1&sig=***&b=2"),
    (
        "GET /x?X-Amz-Signature=abc&amp;X-Amz-Security-Token=xyz HTTP",
        "GET /x?X-Amz-Signature=***&amp;X-Amz-Security-Token=*** HTTP",
    ),
    ("https://h/x?access_token=abc#top", "https://h/x?access_token=***#top"),
    ("https:\\/\\/u:p@h", "https:\\/\\/***@h"),
    ("to=https%3A%2F%2Fu%3Apw%40host%2Fx", "to=https%3A%2F%2Fu%3A***%40host%2Fx"),
    ("Authorization: Basic dTpw", "Authorization: Basic ***"),
    ("https://u:p@h/x,https://v:q@i/y", "https://***@h/x,https://***@i/y"),
]


def test_what_opens_something_in_a_url_is_hidden_whoevers_it_is() -> None:
    for text, shown in OPENED:
        assert redact(text) == shown
        assert redact(shown) == shown


ORDINARY = [
    "the research of ksshaskpass goes on in /no/such/folder",
    "100%|####| 5/5 [00:01<00:00, 4.2it/s] loss=1.5",
    "https://host:8080/a@b",
    "http://[::1]:80/x@y",
    "ssh://git@host/x",
    "git+ssh://git@github.com/x",
    "a@b.de",
    "hf://datasets/user/name@main/file",
    "s3://bucket/a:b@c",
    "sftp://deploy-user@host/x",
    "max_tokens=5&x=1",
    "abfss://container-with-name1@acc.dfs.core.windows.net/p",
    "?tokenizer=gpt2&design=blue",
    "the key=value pair",
    "authorization is required",
    "a cookie: with chocolate",
    "def f(token=None, key=1): ...",
    "x = a[key] ; y = {'auth': 1}",
    "https://example.com/?q=monkey&page=2",
]


def test_ordinary_text_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcDEF123456")
    monkeypatch.setenv("OLDPWD", "/no/such/folder")
    monkeypatch.setenv("SSH_ASKPASS", "ksshaskpass")
    monkeypatch.setenv("GIT_REMOTE", "https://research@host.example/x")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for text in ORDINARY:
        assert redact(text) == text


@given(
    st.text(max_size=60),
    st.text(max_size=60),
    st.sampled_from([value for value in plant(20).values() if len(value) >= 8]),
    st.lists(st.integers(0, 180)),
)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_pieces_of_a_text_show_no_more_than_the_whole(
    before: str, behind: str, value: str, cuts: list[int]
) -> None:
    environment = dict(os.environ)
    os.environ.update(plant(BATCH))
    try:
        text = before + value + behind
        borders = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
        shown = redact_pieces(pieces)
        assert len(shown) == len(pieces)
        assert "".join(shown) == redact(text)
        assert value[:4] not in "".join(shown).replace(before, "").replace(behind, "")
    finally:
        os.environ.clear()
        os.environ.update(environment)


def test_a_secret_in_two_colors_of_the_page_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcDEF<123456")
    pieces = [
        TextSpan("masked hf_abc", False),
        TextSpan("DEF<123", True),
        TextSpan("456 more", False),
    ]
    report = DataReport(
        title="Data",
        numbers={"read by": "hf_abcDEF<123456"},
        lengths=None,
        padding=None,
        problems=[],
        rows=[("a:1", redact_texts(pieces))],
    )
    write_page(report, None, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "hf_abc" not in page
    assert "DEF" not in page
    assert "123456" not in page
    assert "masked ***HF_TOKEN***" in page
    assert page.count("***HF_TOKEN***") == 2
    assert " more</span>" in page


@pytest.mark.parametrize(
    "kind",
    [
        "itself",
        "JSON in JSON",
        "percent in small letters",
        "HTML",
        "Basic",
        "YAML in double quotes",
    ],
)
def test_a_log_that_is_read_in_chunks_shows_no_half_of_any_form(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = plant(12)
    set_all(monkeypatch, variables)
    for name, value in variables.items():
        text = f"45% {FORMS[kind](value)} done"
        for cut in range(0, len(text), 2):
            shown, rest = split_unfinished(text[:cut])
            assert shown + rest == text[:cut]
            whole = redact(shown) + redact(rest + text[cut:])
            assert not [trace for trace in traces(value) if trace in whole], (name, cut, whole)


def test_nests_of_values_hold_none_either(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = plant(BATCH)
    set_all(monkeypatch, variables)
    values = list(variables.values())
    text = str(redact_values({"a": values, "b": [{value: (value, 1)} for value in values]}))
    assert not [value for value in values if value[:4] in text]


def test_many_secrets_slow_no_log_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of ordinary lines in an environment of a dozen secrets takes well under ten
    seconds on a slow machine.
    """
    set_all(monkeypatch, plant(12))
    line = "step 12  loss 1.2345  12345 tokens/s, and what a library says: /usr/lib/python3/x.py:17: 50% of {'a': \"b\"}\n"  # noqa: E501
    text = line * (1_000_000 // len(line))
    began = time.monotonic()
    assert redact(text) == text
    assert time.monotonic() - began < 10
    backslashes = "\\" * 100_000 + "%5C" * 10_000
    assert redact(backslashes) == backslashes
    assert time.monotonic() - began < 20
