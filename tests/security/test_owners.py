"""What llmtune keeps and believes later is its user's own; what is right is not refused, whatever
umask, uid or home.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtune.cli.main import main
from llmtune.config.cache_folder import find_cache, locate_cache, open_cache
from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.paths import PathsConfig
from llmtune.doctor.ownership import inspect_owners
from llmtune.errors import CheckpointError, ExportError, MissingPrerequisiteError
from llmtune.export.publish.folder import write_export
from llmtune.launch.preflight import deepspeed_ops
from llmtune.launch.preflight.nvme import hold_swap_folder, make_swap_folder, probe_disk
from llmtune.model.source import resolve_model_folder
from llmtune.security import trust
from llmtune.security.trust import close_run_folder, find_owner_problem, make_own, require_own
from tests.support import TINY, run_cli


@pytest.fixture
def shared_group(monkeypatch: pytest.MonkeyPatch) -> str:
    """The group of what this process makes seems to be one that others are in."""
    monkeypatch.setattr(
        grp, "getgrgid", lambda number: SimpleNamespace(gr_name="team", gr_mem=["ann", "bob"])
    )
    return "team"


@pytest.fixture
def private_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users have groups of their own, as on Debian and Red Hat."""
    monkeypatch.setattr(pwd, "getpwuid", lambda number: SimpleNamespace(pw_name="ann"))
    monkeypatch.setattr(grp, "getgrgid", lambda number: SimpleNamespace(gr_name="ann", gr_mem=[]))


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (0o700, None),
        (0o755, None),
        (0o775, "group team"),
        (0o757, "everybody"),
        (0o1777, "everybody"),
    ],
)
def test_modes(mode: int, said: str | None, tmp_path: Path, shared_group: str) -> None:
    tmp_path.chmod(mode)
    problem = find_owner_problem(tmp_path)
    assert (problem is None) if said is None else (problem is not None and said in problem)


@pytest.mark.parametrize("mode", [0o775, 0o770, 0o700])
@pytest.mark.usefixtures("private_group")
def test_a_umask_of_002_with_a_group_of_ones_own_is_right(mode: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    assert find_owner_problem(tmp_path) is None
    assert close_run_folder(tmp_path) is None
    tmp_path.chmod(mode | 0o002)
    assert find_owner_problem(tmp_path) is not None


@pytest.mark.parametrize(("gid", "private"), [(1234, True), (0, False), (100, False)])
def test_a_container_that_does_not_know_its_user(
    gid: int, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    assert trust._is_private_group(gid, 1234) is private


def test_another_owner_is_named_with_the_next_step(tmp_path: Path, another_user: int) -> None:
    owner = tmp_path.stat().st_uid
    with pytest.raises(MissingPrerequisiteError) as caught:
        require_own(tmp_path, "paths.cache_dir", "set LLMTUNE_CACHE")
    said = str(caught.value)
    assert f"uid {owner}), and this is uid {another_user}" in said
    assert f"chown -R {another_user} {tmp_path}, as root), or set LLMTUNE_CACHE" in said


def test_root_in_a_container_is_told_how_to_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a folder of the host's user mounted into it."""
    status = SimpleNamespace(st_uid=1000, st_gid=1001, st_mode=stat.S_IFDIR | 0o755)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(Path, "stat", lambda self, **_: status)
    with pytest.raises(
        MissingPrerequisiteError,
        match=r"docker run --user 1000:1001\), or give it to root \(chown -R 0",
    ):
        require_own(tmp_path, "paths.cache_dir", "set LLMTUNE_CACHE")
    status.st_uid = 0
    require_own(tmp_path, "paths.cache_dir", "set LLMTUNE_CACHE")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    require_own(tmp_path, "paths.cache_dir", "set LLMTUNE_CACHE")


def test_a_shared_group_is_told_what_to_do(tmp_path: Path, shared_group: str) -> None:
    tmp_path.chmod(0o2775)
    with pytest.raises(
        MissingPrerequisiteError,
        match=r"group team .*: chmod -R go-w .*, or name a folder of your own",
    ):
        open_cache(PathsConfig(str(tmp_path)))
    assert open_cache(PathsConfig(str(tmp_path / "mine"))) == tmp_path / "mine"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_is_made_is_for_nobody_else_to_open(
    umask: int, tmp_path: Path, shared_group: str
) -> None:
    before = os.umask(umask)
    try:
        for attempt in range(2):
            make_own(tmp_path / "a" / "b", "x", "y")
            make_swap_folder(tmp_path / "swap")
            assert open_cache(PathsConfig(str(tmp_path / "cache"))).is_dir(), attempt
    finally:
        os.umask(before)
    assert [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a/b", "swap", "cache")
    ] == [0o700] * 3


def test_a_place_that_is_no_folder_or_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/x")):
        with pytest.raises(MissingPrerequisiteError, match=r"cannot be made \(.*; take another"):
            make_own(folder, "x", "take another")
        if folder != tmp_path / "file":
            assert find_cache(PathsConfig(str(folder))) == folder, "planning does without"


# --- the cache
# -----------------------------------------------------------------------------------------------------  # noqa: E501


def test_without_a_home_nothing_shared_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMTUNE_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert locate_cache(compose_config(["model=tiny"]).config.paths) == Path(
        "/somewhere/.cache/llmtune"
    )
    monkeypatch.delenv("HOME")
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert locate_cache(compose_config(["model=tiny"]).config.paths) == home / ".cache" / "llmtune"

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    paths = compose_config(["model=tiny"]).config.paths
    with pytest.raises(
        MissingPrerequisiteError,
        match=r"HOME is not set, .* name a folder of your own with LLMTUNE_CACHE",
    ):
        locate_cache(paths)
    with pytest.raises(MissingPrerequisiteError, match="name a folder of your own"):
        locate_cache(PathsConfig(""))


@pytest.mark.parametrize("how", ["variable", "key"])
def test_without_a_home_a_cache_that_is_named_is_enough(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("LLMTUNE_CACHE")
    key = []
    if how == "variable":
        monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    else:
        key = [f"paths.cache_dir={tmp_path / 'cache'}"]
    assert main(["chat", "model=tiny", "chat.prompt=hi", "chat.max_new_tokens=1", *key]) == 0, (
        capsys.readouterr().err
    )
    assert list((tmp_path / "cache" / "models").glob("random-*/model.safetensors"))


@pytest.mark.parametrize(
    "verb", [["chat", "chat.prompt=hi"], ["plan"], ["data"], ["eval"]], ids=lambda verb: verb[0]
)
def test_another_users_cache_is_refused(
    verb: list[str], tmp_path: Path, another_user: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").mkdir()
    code = main([*verb, *TINY, f"paths.cache_dir={tmp_path / 'cache'}"])
    said = capsys.readouterr().err
    assert code == MissingPrerequisiteError.exit_code, said
    assert f"paths.cache_dir: {tmp_path / 'cache'} belongs to" in said
    assert not list((tmp_path / "cache").iterdir()), "nothing is left"


def test_a_cached_model_that_others_may_write_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(
        name_or_path="random", config=dict(compose_config(["model=tiny"]).config.model.config or {})
    )
    folder = resolve_model_folder(config, tmp_path)
    assert resolve_model_folder(config, tmp_path) == folder
    folder.chmod(0o777)
    with pytest.raises(MissingPrerequisiteError, match="may be written by everybody"):
        resolve_model_folder(config, tmp_path)


# --- compiled ops
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of compiled ops, in which torch has put one for a version of Python."""
    folder = tmp_path / "ops"
    built = folder / "py311_cpu" / "deepspeed_shm_comm"
    built.mkdir(parents=True)
    (built / "deepspeed_shm_comm.so").touch(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


#: What others may write to, of the folders above.
SPOILT: dict[str, Callable[[Path], Path]] = {
    "the folder": lambda folder: folder,
    "that of a version": lambda folder: folder / "py311_cpu",
    "the op's": lambda folder: folder / "py311_cpu" / "deepspeed_shm_comm",
    "the op": lambda folder: folder / "py311_cpu" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so",
}


@pytest.mark.parametrize("what", SPOILT)
def test_ops_that_others_may_have_written_are_not_loaded(what: str, extensions: Path) -> None:
    place = SPOILT[what](extensions)
    from llmtune.plan.memory.placement import Placement

    assert deepspeed_ops.missing_ops("cpu", Placement(0)) == []
    with deepspeed_ops.hold_ops():
        pass
    place.chmod(0o777)
    for attempt in (
        lambda: deepspeed_ops.missing_ops("cpu", Placement(0)),
        lambda: deepspeed_ops.load_ops("cpu", Placement(0)),
    ):
        with pytest.raises(
            MissingPrerequisiteError, match=f"compiled ops: {place} may be written by everybody"
        ):
            attempt()
    finding, *_ = inspect_owners(extensions.parent / "no-cache")
    assert (finding.state, finding.command) == (
        "bad",
        f"chmod -R go-w {place}",
    )


def test_another_users_folder_of_ops_is_refused(extensions: Path, another_user: int) -> None:
    with (
        pytest.raises(
            MissingPrerequisiteError, match="or name a folder of your own with TORCH_EXTENSIONS_DIR"
        ),
        deepspeed_ops.hold_ops(),
    ):
        pass
    assert not list(extensions.glob(".llmtune*"))


def test_a_new_folder_of_ops_is_for_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    before = os.umask(0)
    try:
        with deepspeed_ops.hold_ops():
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_an_environment_that_others_may_write_holds_no_ops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune.launch.launchers.environment import extensions_dir

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "venv"))
    monkeypatch.setattr("sys.base_prefix", "/usr")
    (tmp_path / "venv").mkdir()
    assert extensions_dir() == tmp_path / "venv" / "torch_extensions"
    (tmp_path / "venv").chmod(0o777)
    assert extensions_dir() == tmp_path / ".cache" / "torch_extensions"


# --- run folders, swap, exports
# ------------------------------------------------------------------------------------


def test_a_run_folder_that_others_may_write_is_closed_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_group: str
) -> None:
    def mode() -> int:
        return stat.S_IMODE(tmp_path.stat().st_mode)

    tmp_path.chmod(0o755)
    assert close_run_folder(tmp_path) is None
    tmp_path.chmod(0o777)
    assert "by everybody; took that right away (chmod go-w)" in (close_run_folder(tmp_path) or "")
    assert mode() == 0o755
    tmp_path.chmod(0o2775)
    assert "by the group team" in (close_run_folder(tmp_path) or "")
    assert mode() == 0o2755
    tmp_path.chmod(0o1777)
    with pytest.raises(CheckpointError, match="take another output_dir="):
        close_run_folder(tmp_path)
    for given, who in ((0o777, "everybody"), (0o775, "the group team")):
        tmp_path.chmod(given)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
            with pytest.raises(
                CheckpointError, match=f"{who}.* may write there.*such as a new folder in it"
            ):
                close_run_folder(tmp_path)
        assert mode() == given
    tmp_path.chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert close_run_folder(tmp_path) is None, (
        "of the host's user, whom a container's root works for"
    )


def test_swap_is_closed_and_another_users_is_not_taken(tmp_path: Path, another_user: int) -> None:
    folder = tmp_path / "llmtune-swap-x"
    with (
        pytest.raises(MissingPrerequisiteError, match="take another offload.nvme_path="),
        hold_swap_folder(folder),
    ):
        pass


def test_a_planted_probe_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / f".llmtune-probe-{os.getpid()}").symlink_to(victim)
    probe_disk(tmp_path)
    assert victim.read_text() == "kept"


def test_an_export_does_not_go_on_with_what_another_user_left_aside(
    tmp_path: Path, another_user: int
) -> None:
    (tmp_path / "out.tmp").mkdir()
    with pytest.raises(ExportError, match="output_dir: .*out.tmp belongs to"):
        write_export(tmp_path / "out", "job", lambda *_: None, {})
    assert not (tmp_path / "out").exists()


@pytest.fixture
def umask_002() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.process
@pytest.mark.usefixtures("umask_002")
def test_a_run_under_umask_002_starts_goes_on_and_is_closed_to_the_group(tmp_path: Path) -> None:
    command = [
        *TINY,
        "export=none",
        "data.train=stdlib_docs@64",
        "data.val_set_size=0",
        f"output_dir={tmp_path / 'run'}",
    ]
    command += ["train.save_steps=1", f"paths.cache_dir={tmp_path / 'cache'}"]
    for steps in (1, 2):
        done = run_cli(*command, f"train.max_steps={steps}")
        assert done.code == 0, done.err
    made = [
        tmp_path / "cache",
        *(tmp_path / "cache").rglob("*"),
        tmp_path / "run",
        *(tmp_path / "run").rglob("*"),
    ]
    assert not [path for path in made if path.lstat().st_mode & 0o022 and not path.is_symlink()]
