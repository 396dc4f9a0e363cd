"""Being somebody else than the owner of the files that a test has made."""

from __future__ import annotations

import os

import pytest

from llmtune.security import trust


@pytest.fixture
def another_user(monkeypatch: pytest.MonkeyPatch) -> int:
    """This process seems to be of an ordinary user who owns none of the files that it makes; the
    uid.
    """
    uid = os.getuid() + 4242
    monkeypatch.setattr(os, "getuid", lambda: uid)
    # Tests may run as root, whose files everybody trusts.
    monkeypatch.setattr(trust, "trusted_owners", lambda: {uid})
    return uid
