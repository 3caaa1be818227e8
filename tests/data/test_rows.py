from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from lora_dpo.errors import OutputError
from lora_dpo.files import atomic_file, atomic_folder, disk_errors, refuse_existing, refuse_unwritable, sha256_of

DISK_REFUSALS = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "quota",
    errno.EACCES: "a folder you may write to",
    errno.EPERM: "a folder you may write to",
    errno.EROFS: "a writable disk",
    errno.EIO: "look after it",
    errno.EFBIG: "may not grow so large",
    errno.ENOTDIR: "is a file, not a folder",
}


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- whole or nothing -----------------------------------------------------------------------------


def test_a_finished_folder_is_whole_and_alone(tmp_path):
    target = tmp_path / "deep" / "er" / "result"
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("b")
        assert not target.exists()
        assert folder.parent == target.parent  # the same file system, or the rename is no single step
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["a.txt", "sub", "sub/b.txt"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_leaves_nothing(tmp_path, exception):
    def write() -> None:
        with atomic_folder(tmp_path / "result") as folder:
            (folder / "a.txt").write_text("a")
            raise exception("stop")

    with pytest.raises(exception, match="stop"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_an_existing_target_is_refused_before_anything_is_written(tmp_path, make):
    target = tmp_path / "result"
    make(target)
    entered = []

    def write() -> None:
        with atomic_folder(target) as folder:
            entered.append(folder)

    with pytest.raises(OutputError, match="result already exists and is never overwritten"):
        write()
    assert not entered
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "result"

    def write() -> None:
        with atomic_folder(target) as folder:
            (folder / "mine.txt").write_text("mine")
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")

    with pytest.raises(OutputError, match="already exists") as caught:
        write()
    (kept,) = (path for path in tmp_path.iterdir() if path != target)
    assert str(kept) in str(caught.value)
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]
    assert [path.name for path in target.iterdir()] == ["theirs.txt"]


@pytest.mark.posix
def test_a_killed_process_leaves_no_target(tmp_path):
    target = tmp_path / "result"
    code = (
        "import pathlib, time\n"
        "from lora_dpo.files import atomic_folder\n"
        f"with atomic_folder(pathlib.Path({str(target)!r})) as folder:\n"
        "    (folder / 'a.txt').write_text('a')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(timeout=20) == -signal.SIGKILL
    assert not target.exists()
    with atomic_folder(target) as folder:  # what was left does not stand in the way of the next try
        (folder / "b.txt").write_text("b")
    assert [path.name for path in target.iterdir()] == ["b.txt"]


# --- what the disk refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "advice"), DISK_REFUSALS.items(), ids=[errno.errorcode[n] for n in DISK_REFUSALS])
def test_a_refused_write_becomes_an_output_error_with_the_next_step(tmp_path, number, advice):
    def write() -> None:
        with atomic_folder(tmp_path / "result"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(OutputError) as caught:
        write()
    assert f"Cannot write {tmp_path / 'result'}: {os.strerror(number)}." in str(caught.value)
    assert advice in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_rename_becomes_an_output_error(tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)

    def write() -> None:
        with atomic_folder(tmp_path / "result") as folder:
            (folder / "a.txt").write_text("a")

    with pytest.raises(OutputError, match="Free some space"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_folder_becomes_an_output_error(tmp_path, monkeypatch):
    real = os.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("."):  # the temporary one
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, *args, **kwargs)

    monkeypatch.setattr("os.mkdir", refuse)

    def write() -> None:
        with atomic_folder(tmp_path / "result"):
            pass

    with pytest.raises(OutputError, match="a folder you may write to"):
        write()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a device that is always full is Linux's")
def test_a_really_full_disk_is_an_output_error():
    def write() -> None:
        with disk_errors(Path("/dev/full")):
            Path("/dev/full").write_text("x" * 100_000)

    with pytest.raises(OutputError, match="Cannot write /dev/full: No space left on device"):
        write()


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["safetensors", "torch.save"],
)
def test_a_full_disk_is_an_output_error_in_the_libraries_own_words_too(tmp_path, error):
    def write() -> None:
        with atomic_folder(tmp_path / "result"):
            raise error

    with pytest.raises(OutputError, match="Free some space"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [SafetensorError("invalid header"), RuntimeError("size mismatch")])
def test_other_errors_of_the_libraries_pass_as_they_are(tmp_path, error):
    def write() -> None:
        with disk_errors(tmp_path / "result"):
            raise error

    with pytest.raises(type(error), match=str(error)):
        write()


@pytest.mark.parametrize("target", ["file/result", "file/deep/result"])
def test_a_file_in_the_middle_of_the_path_is_an_output_error(tmp_path, target):
    (tmp_path / "file").write_text("a file")

    def write() -> None:
        with atomic_folder(tmp_path / target):
            pass

    with pytest.raises(OutputError, match="file"):
        write()


def test_other_errors_of_the_system_pass_as_they_are(tmp_path):
    def write(error: OSError) -> None:
        with atomic_folder(tmp_path / "result"):
            raise error

    with pytest.raises(OSError, match="Broken pipe"):
        write(OSError(errno.EPIPE, "Broken pipe"))
    with pytest.raises(FileNotFoundError):
        write(FileNotFoundError(errno.ENOENT, "No such file"))


def test_refuse_existing_says_what_to_do(tmp_path):
    refuse_existing(tmp_path / "free")
    with pytest.raises(OutputError, match="Choose another name, or remove it first"):
        refuse_existing(tmp_path)


# --- modes and hashes -----------------------------------------------------------------------------


@pytest.mark.usefixtures("umask")
@pytest.mark.posix
def test_results_are_as_readable_as_any_other_file(tmp_path):
    with atomic_folder(tmp_path / "result") as folder:
        (folder / "a.txt").write_text("a")
        (folder / "sub").mkdir()
    assert mode(tmp_path / "result") == 0o755
    assert mode(tmp_path / "result" / "sub") == 0o755
    assert mode(tmp_path / "result" / "a.txt") == 0o644


@pytest.mark.usefixtures("umask")
@pytest.mark.posix
def test_weights_are_as_readable_as_any_other_file(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    with atomic_folder(tmp_path / "result") as folder:
        save_file({"weight": numpy.zeros(4)}, folder / "adapter_model.safetensors")
    assert mode(tmp_path / "result" / "adapter_model.safetensors") == 0o644


@pytest.mark.usefixtures("umask")
@pytest.mark.posix
def test_a_private_umask_is_respected(tmp_path):
    os.umask(0o077)
    with atomic_folder(tmp_path / "result") as folder:
        (folder / "a.txt").write_text("a")
    assert mode(tmp_path / "result") == 0o700
    assert os.umask(0o077) == 0o077  # and left as it was


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    data = os.urandom((1 << 20) + 17)  # more than one block
    (tmp_path / "data").write_bytes(data)
    assert sha256_of(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    shutil.copyfile(tmp_path / "data", tmp_path / "copy")
    assert sha256_of(tmp_path / "copy") == sha256_of(tmp_path / "data")


# --- single files ---------------------------------------------------------------------------------


@pytest.mark.posix
def test_a_finished_file_is_whole_alone_and_ordinary(tmp_path):
    target = tmp_path / "deep" / "pairs.jsonl"
    with atomic_file(target) as temporary:
        temporary.write_text("all of it")
        assert not target.exists()
    assert target.read_text() == "all of it"
    assert [path.name for path in target.parent.iterdir()] == ["pairs.jsonl"]
    current = os.umask(0)
    os.umask(current)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~current


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_file(tmp_path, exception):
    def write() -> None:
        with atomic_file(tmp_path / "pairs.jsonl") as temporary:
            temporary.write_text("half of")
            raise exception

    with pytest.raises(exception):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_never_overwritten(tmp_path):
    target = tmp_path / "pairs.jsonl"

    def write() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("mine")
            target.write_text("theirs")  # appears meanwhile; and is there the second time

    for _ in range(2):
        with pytest.raises(OutputError, match="already exists"):
            write()
        assert target.read_text() == "theirs"
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.linux
def test_a_place_where_no_file_can_be_made_is_an_output_error():
    for make, place in ((atomic_file, "/proc/x"), (atomic_file, "/proc/x/y"), (atomic_folder, "/proc/x/y")):
        with pytest.raises(OutputError, match="Nothing can be made there"), make(Path(place)):
            pytest.fail("nothing can be written there")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("/proc/x", "Nothing can be made there: choose another folder"),
        ("/proc/x/y/z.jsonl", "Nothing can be made there"),
        ("/dev/null/x.jsonl", "Not a directory. A part of that path is a file, not a folder"),
        ("x" * 300 + ".jsonl", "File name too long. Choose a shorter name"),
    ],
)
@pytest.mark.linux
def test_what_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch, place, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=says):
        refuse_unwritable(Path(place))
    with pytest.raises(OutputError, match=says), atomic_file(Path(place)):
        pytest.fail("nothing can be written there")
    assert os.listdir() == []


def test_looking_whether_a_place_can_be_written_leaves_nothing(tmp_path):
    refuse_unwritable(tmp_path / "deep" / "er" / "pairs.jsonl")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/secret/token"),
            "Cannot open or write /secret/token: Perm",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "/tracker/runs"),
            "Cannot make /tracker/runs: a file of that name",
        ),
        (OSError(errno.ENOSPC, "No space left", "/cache/blob"), "Cannot open or write /cache/blob: No space left"),
        (OSError(errno.ENOSPC, "No space left"), "Cannot write adapters/mine: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "adapters/mine"), "Cannot write adapters/mine: Permission"),
        (
            PermissionError(errno.EACCES, "", "adapters/mine.partial/before.json"),
            "Cannot write adapters/mine: Permission",
        ),
        (PermissionError(errno.EACCES, "", "adapters/.mine.12345678.unfinished/a"), "Cannot write adapters/mine: Perm"),
        (
            PermissionError(errno.EACCES, "", "adapters/other/weights"),
            "Cannot open or write adapters/other/weights: Perm",
        ),
        (Exception("No space left on device (os error 28)"), "Cannot write adapters/mine: No space left on device"),
        (Exception("Disk quota exceeded (os error 122)"), "Cannot write adapters/mine: Disk quota exceeded"),
        (
            SafetensorError("I/O error: Input/output error (os error 5)"),
            "Cannot write adapters/mine: Input/output error",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_an_error_of_the_disk_names_whose_file_it_was(error, said):
    def write() -> None:
        with disk_errors(Path("adapters/mine")):
            raise error

    with pytest.raises(OutputError) as caught:
        write()
    assert str(caught.value).startswith(said)
    assert ("Nothing half-written" in str(caught.value)) == ("write adapters/mine: " in said and "Perm" not in said)


def test_torchs_words_for_a_failed_write_tell_the_error_below_them():
    def write() -> None:
        with disk_errors(Path("a")):
            try:
                raise OSError(errno.EFBIG, "File too large")
            except OSError as error:
                raise RuntimeError("[enforce fail at inline_container.cc:862] . unexpected pos 1 vs 0") from error

    with pytest.raises(OutputError, match="Cannot write a: File too large"):
        write()


def test_a_missing_file_on_the_way_is_told_from_one_that_is_missing_elsewhere(tmp_path):
    for missing in ("a", "a/b", "a/b/c.jsonl", "a/b/c.jsonl.lock"):
        with pytest.raises(OutputError, match="Nothing can be made there"), disk_errors(tmp_path / "a/b/c.jsonl"):
            raise FileNotFoundError(errno.ENOENT, "", str(tmp_path / missing))
    for elsewhere in ("d", "a/b/c.jsonl/weights", "config.json"):
        with pytest.raises(FileNotFoundError), disk_errors(tmp_path / "a/b/c.jsonl"):
            (tmp_path / elsewhere).read_text()
