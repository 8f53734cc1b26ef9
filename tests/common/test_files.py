"""Files are replaced in one step or not at all."""

import contextlib
import errno
import threading
from pathlib import Path

import pytest

from kd_common.files import finish_replacing, locked, replace_folder, replacing_stopped, staging_paths, write_atomically


@pytest.mark.parametrize(("content", "stored"), [("naïve\n", "naïve\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_replaces_the_file(tmp_path, content, stored):
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == stored
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_replacing_a_folder_stopped_anywhere_is_finished(tmp_path, monkeypatch, kept):
    """Killed before the first rename, between the two, and never."""
    folder = tmp_path / "model"
    for path, content in ((folder, "old"), (staging_paths(folder)[0], "new")):
        path.mkdir()
        (path / "weights").write_text(content)
    rename, done = Path.rename, []

    def killed(self, target):
        if len(done) == kept:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        replace_folder(folder)
    assert replacing_stopped(folder) == (kept == 1)
    finish_replacing(folder)
    assert (folder / "weights").read_text() == ("new" if kept else "old")
    assert not staging_paths(folder)[1].exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the kernel's always full device")
def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_that_waits_for_another_says_for_what(tmp_path, caplog):
    path = tmp_path / "cache" / "thing.pt"
    seen = []

    def second():
        with locked(path, "the thing"):
            seen.append(path.read_text())

    with locked(path, "the thing"):
        waiting = threading.Thread(target=second)
        waiting.start()
        while not caplog.records:
            waiting.join(0.01)
        assert not seen
        path.write_text("made by the first")
    waiting.join()
    assert seen == ["made by the first"]
    assert [r.getMessage() for r in caplog.records] == [
        f"Waiting for another process, which is making the thing: {path}"
    ]


def test_nobody_waits_for_a_free_lock(tmp_path, caplog):
    for _ in range(2):
        with locked(tmp_path / "thing", "the thing"):
            pass
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    refused = pytest.raises(OSError, match=r"the thing is not there yet.*another place with KD_DATA")
    with refused as caught, locked(folder / "thing", "the thing", "KD_DATA"):
        raise AssertionError("entered")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotImplementedError("no flock here")])
def test_a_lock_that_cannot_be_taken_is_named_with_the_remedy(tmp_path, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(OSError, match=f"{tmp_path}|KD_CACHE"), locked(tmp_path / "thing", "the thing"):
        raise AssertionError("entered")
