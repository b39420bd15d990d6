"""Files are written as a whole or not at all, one by one or a folder of them, and killed processes leave nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reftheads._utils import atomic
from reftheads._utils.atomic import filling, replacing


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_and_its_folder_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "results.md"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.name == "results.md" and not path.exists() or path.read_text() == "old"
        assert contents(tmp_path) == {"a/b/results.md": text}
    assert os.listdir(path.parent) == ["results.md"]


def test_a_relative_path_without_a_folder_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with replacing("results.md") as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"results.md": "new"}


@pytest.mark.parametrize("fails", [True, False], ids=["raises", "writes nothing"])
def test_a_block_that_raises_or_writes_nothing_leaves_the_file_as_it_is(tmp_path, fails):
    path = tmp_path / "results.md"
    path.write_text("old")
    try:
        with replacing(path) as temporary:
            if fails:
                temporary.write_text("half")
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert contents(tmp_path) == {"results.md": "old"} and os.listdir(tmp_path) == ["results.md"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_is_filled_in_the_order_given_and_other_files_stay(tmp_path, monkeypatch, exists):
    target, moved, replace = tmp_path / "adapter", [], os.replace
    if exists:
        target.mkdir()
        (target / "a").write_text("old")
        (target / "notes").write_text("mine")
    monkeypatch.setattr(os, "replace", lambda source, place: moved.append(Path(place).name) or replace(source, place))
    with filling(target, first=("c", "b")) as temporary:
        for name in "abc":
            (temporary / name).write_text("new")
        (temporary / "below").mkdir()
        (temporary / "below" / "d").write_text("new")
        assert contents(temporary).keys() == {"a", "b", "c", "below/d"}
    assert moved[:2] == ["c", "b"] and sorted(moved[2:]) == ["a", "d"]
    kept = {"notes": "mine"} if exists else {}
    assert contents(target) == {"a": "new", "b": "new", "c": "new", "below/d": "new"} | kept
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_folder_whose_block_raises_is_left_as_it_is(tmp_path):
    target = tmp_path / "adapter"
    for before in ({}, {"a": "old"}):
        with pytest.raises(OSError, match="full"):
            with filling(target) as temporary:
                (temporary / "a").write_text("half")
                raise OSError("the disk is full")
        assert contents(tmp_path) == {f"adapter/{name}": text for name, text in before.items()}
        target.mkdir(exist_ok=True)
        (target / "a").write_text("old")


def test_a_link_is_followed_and_a_file_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with filling(tmp_path / "link") as temporary:
        (temporary / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"a": "new"}
    with pytest.raises(ValueError, match="real/a is a file: give a directory to save into"):
        with filling(tmp_path / "real" / "a"):
            pytest.fail("refused before anything is written")


def test_files_move_once_all_of_them_are_on_the_disk(tmp_path, monkeypatch):
    steps, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: steps.append("replace") or replace(*paths))
    with filling(tmp_path) as temporary:
        for name in "ab":
            (temporary / name).write_text("new")
    assert steps == ["fsync", "fsync", "replace", "replace"]


_WRITE_FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])  # alone, since the whole package takes seconds to import
from atomic import filling, replacing
print("ready", flush=True)
while True:
    for text in ("1" * 10**6, "2" * 10**6):
        with replacing(sys.argv[1] + "/one") as temporary:
            temporary.write_text(text)
        with filling(sys.argv[1] + "/many") as temporary:
            (temporary / "a").write_text(text)
"""


def test_a_kill_leaves_whole_files_and_a_folder_that_the_next_write_removes(tmp_path):
    arguments = [sys.executable, "-c", _WRITE_FOREVER, str(tmp_path), str(Path(atomic.__file__).parent)]
    for i in range(5):
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.013 * i)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        written = [path for path in (tmp_path / "one", tmp_path / "many" / "a") if path.exists()]
        assert all(path.read_text() in ("1" * 10**6, "2" * 10**6) for path in written)
    for folder in (tmp_path, tmp_path / "many"):
        (folder / f".{folder.name}.saving-x").mkdir(exist_ok=True)
    (tmp_path / ".one.saving-x").mkdir()
    with replacing(tmp_path / "one") as one, filling(tmp_path / "many") as many:
        one.write_text("new")
        (many / "a").write_text("new")
    left = {path.name.partition(".saving-")[0] for path in tmp_path.rglob(".*")}
    assert left <= {f".{tmp_path.name}", ".many"} and not any((tmp_path / "many").glob(".*"))
    assert contents(tmp_path)["one"] == contents(tmp_path)["many/a"] == "new"


@pytest.mark.parametrize("locks", [True, False])
def test_only_folders_of_that_prefix_that_nobody_writes_into_are_removed(tmp_path, monkeypatch, locks):
    old, young, other = (tmp_path / name for name in (".[a].saving-x", ".[a].saving-y", ".a.saving-x"))
    for folder in (old, young, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (time.time() - 3601,) * 2)
    if not locks:  # nobody knows whether the young one is written into
        monkeypatch.setattr(atomic, "fcntl", None)
    with filling(tmp_path / "[a]") as mine:
        atomic.remove_abandoned(tmp_path, ".[a].saving-")
        assert (old.exists(), young.exists(), other.exists()) == (False, not locks, True)
        assert mine.exists()
        (mine / "file").write_text("new")
    assert (tmp_path / "[a]" / "file").read_text() == "new"


def test_a_folder_that_another_process_took_for_abandoned_is_made_again(tmp_path, monkeypatch):
    lock, made = atomic._lock, []

    def late(handle, wait):
        if wait and not made:
            made.extend(tmp_path.glob(".*.saving-*"))
            made[0].rmdir()  # as another process may, before this one has the lock
        return lock(handle, wait)

    monkeypatch.setattr(atomic, "_lock", late)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert len(made) == 1 and contents(tmp_path) == {"file": "new"}


def test_a_name_as_long_as_names_can_be_is_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("new")
        with filling(tmp_path / "folder" / name) as folder:
            (folder / "file").write_text("new")
        assert (tmp_path / name).read_text() == (tmp_path / "folder" / name / "file").read_text() == "new"
