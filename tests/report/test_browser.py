"""Chromium opens a page from the disk: every chart is drawn, and nothing is reported or requested.

It is tried where the machine has Chromium.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from llmtune.report.compare_page import build_compare_page
from llmtune.report.page import Page
from llmtune.report.run_facts import read_run
from llmtune.report.run_page import build_run_page
from llmtune.report.write import write_page
from tests.report.run_folder import make_run
from tests.report.test_html import HOSTILE
from tests.support import run

BROWSER = next(
    (found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), ""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(not BROWSER, reason="this machine has no Chromium"),
]


def open_page(file: Path, profile: Path) -> tuple[str, str]:
    """What the page has become in the browser, and what the browser reported."""
    done = run(
        [
            BROWSER,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--enable-logging=stderr", "--log-level=0", "--v=0", "--no-first-run"),
            *(f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"),
            file.as_uri(),
        ],
        timeout=300,
    )
    assert done.code == 0, done.err
    return done.out, done.err


@pytest.fixture(scope="module")
def script_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("text", ["plain", HOSTILE[0], HOSTILE[3], HOSTILE[6]])
@pytest.mark.parametrize("several", [False, True])
def test_a_page_is_drawn_without_an_error_or_a_request(
    several: bool, text: str, script_cache: Path, tmp_path: Path
) -> None:
    first = read_run(make_run(tmp_path / "a", text))
    page: Page = build_run_page(first)
    if several:
        page = build_compare_page([first, read_run(make_run(tmp_path / "b", text))])
    file = tmp_path / "page.html"
    write_page(page, file, script_cache)
    assert file.stat().st_size < 2_000_000
    found, reported = open_page(file, tmp_path / "profile")
    assert len(page.charts) > 3
    drawn = re.sub(r"<script.*?</script>", "", found, flags=re.DOTALL)
    assert len(re.findall(r"<svg[ >]", drawn)) == len(page.charts)
    # What a page writes to its console, and what its policy refuses to load.
    assert [line for line in reported.splitlines() if "CONSOLE" in line] == []


def test_an_error_and_a_request_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<script>console.error('a mistake')</script>")
    assert "a mistake" in open_page(file, tmp_path / "profile")[1]
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    file.write_text(f"{policy}<img src='http://127.0.0.1:9/x.png'>")
    assert "CONSOLE" in open_page(file, tmp_path / "profile")[1]
