"""What killed commands leave is never taken for a result; the next one sweeps it, unless somebody holds it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from children import in_a_child

from lora_dpo import leftovers
from lora_dpo.adapters.checkpoints import begin, seal
from lora_dpo.cli.cleaning import leftovers as found_in
from lora_dpo.cli.commands import main
from lora_dpo.cli.crash import write_crash
from lora_dpo.data.journal import Journal, alone
from lora_dpo.data.rows import read_rows
from lora_dpo.errors import OutputError
from lora_dpo.files import atomic_file, atomic_files, atomic_folder, replace_file
from lora_dpo.leftovers import discard, give_up, scratch, scratch_folder, settle


@pytest.fixture(autouse=True)
def its_own_place(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")


def killed_inside(manager, *, write=None):
    def work():
        with manager as place:
            if write:
                write(place)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(work) == -signal.SIGKILL


def listed():
    return sorted(str(path) for path in Path().rglob("*"))


# --- sweeping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: atomic_file(Path("pairs.jsonl")),
        lambda: atomic_folder(Path("adapter")),
        lambda: atomic_files([Path("a.jsonl"), Path("b.jsonl")]),
    ],
    ids=["file", "folder", "files"],
)
def test_what_a_killed_command_left_goes_with_the_next_one(make):
    killed_inside(make())
    assert [path for path in listed() if path.endswith(".unfinished")]
    with atomic_file(Path("other.jsonl")) as temporary:
        temporary.write_text("{}")
    assert listed() == ["other.jsonl"]


@pytest.mark.parametrize("place", ["merged", "merged/base16"])
def test_what_was_being_written_into_a_result_goes_when_its_name_is_wanted_again(place):
    Path(place).mkdir(parents=True)
    killed_inside(atomic_file(Path(place, "fidelity.json")), write=lambda path: path.write_text("half"))
    assert any(name.endswith(".unfinished") for name in listed())
    with pytest.raises(OutputError, match="already exists"), atomic_folder(Path("merged")):
        pass
    assert not any(name.endswith(".unfinished") for name in listed())


def test_what_a_living_process_writes_stays():
    code = (
        "import sys\nfrom pathlib import Path\nfrom lora_dpo.files import atomic_folder\n"
        "from lora_dpo.leftovers import scratch\n"
        "with atomic_folder(Path('adapter')) as folder, scratch('demo', Path('temporary')):\n"
        "    print('held', flush=True)\n    sys.stdin.readline()\n    (folder / 'a').write_text('whole')\n"
    )
    Path("temporary").mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        before = listed()
        settle(Path())
        give_up(scratch_folder("demo", Path("temporary")))
        assert found_in([Path()], Path("temporary")) == []
        assert listed() == before
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.wait(60) == 0
    assert Path("adapter/a").read_text() == "whole"


def test_scratch_of_killed_commands_goes_with_the_next_one_and_that_of_others_stays(tmp_path):
    place = tmp_path / "temporary"
    killed_inside(scratch("demo"), write=lambda folder: (folder / "upload").write_text("private"))
    (place / "lora-dpo-notes").mkdir()  # not named as ours are
    assert len(list(place.iterdir())) == 2
    with scratch("install") as mine:
        assert mine.parent == place
        assert mine.stat().st_mode & 0o777 == 0o700
        assert sorted(path.name for path in place.iterdir()) == sorted([mine.name, "lora-dpo-notes"])
    assert [path.name for path in place.iterdir()] == ["lora-dpo-notes"]


def test_a_removal_takes_the_name_first(monkeypatch):
    Path("adapter").mkdir()
    (Path("adapter") / "a").write_text("a")
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed there
        discard(Path("adapter"))
    assert not Path("adapter").exists()
    [left] = Path().iterdir()
    assert left.name.endswith(".removed")
    settle(Path())
    assert listed() == []


def test_what_is_not_there_is_removed_already():
    discard(Path("nothing"))
    assert listed() == []


# --- one step -------------------------------------------------------------------------------------


def test_a_file_that_appears_in_the_last_moment_is_not_overwritten(monkeypatch):
    real = os.link

    def late(old, new, **more):
        Path("pairs.jsonl").write_text("theirs")
        real(old, new, **more)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(OutputError, match="already exists"), atomic_file(Path("pairs.jsonl")) as temporary:
        temporary.write_text("mine")
    assert Path("pairs.jsonl").read_text() == "theirs"
    assert listed() == ["pairs.jsonl"]


def test_a_disk_without_hard_links_takes_files_too(monkeypatch):
    def refuse(*args, **more):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for expected in ("mine", "theirs"):
        with atomic_file(Path(f"{expected}.jsonl")) as temporary:
            temporary.write_text(expected)
    assert Path("mine.jsonl").read_text() == "mine"
    assert listed() == ["mine.jsonl", "theirs.jsonl"]


def test_a_link_that_leads_nowhere_is_not_written_over():
    Path("pairs.jsonl").symlink_to("elsewhere.jsonl")
    with pytest.raises(OutputError, match="already exists"), atomic_file(Path("pairs.jsonl")):
        pytest.fail("it is there")


@pytest.mark.posix
def test_the_umask_is_never_touched(monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("other threads would make files that anyone may write"))
    with atomic_file(Path("a")) as temporary:
        temporary.write_text("a")
    with atomic_folder(Path("b")) as folder:
        (folder / "c").write_text("c")
    replace_file(Path("d"), "d")
    assert len({Path(name).stat().st_mode for name in ("a", "b/c", "d")}) == 1


def test_a_file_is_replaced_in_one_step(monkeypatch):
    replace_file(Path("state"), "old")

    def refuse(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        replace_file(Path("state"), "new")
    assert Path("state").read_text() == "old"
    assert listed() == ["state"]


# --- together -------------------------------------------------------------------------------------


def write_two(*, killed_at):
    """Write two files that belong together; the process ends as it gives the name of that number."""
    real, given = leftovers.put, []

    def put(temporary, target):
        if len(given) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        given.append(target)
        real(temporary, target)

    def work():
        leftovers.put = put
        with atomic_files([Path("train.jsonl"), Path("deep/held.jsonl")]) as temporaries:
            for number, temporary in enumerate(temporaries):
                temporary.write_text(f'{{"n": {number}}}\n')

    assert in_a_child(work) == -signal.SIGKILL


@pytest.mark.parametrize("folder", ["", "deep"])
def test_files_that_belong_together_are_completed_once_one_is_there(folder):
    write_two(killed_at=1)
    assert Path("train.jsonl").exists()
    assert not Path("deep/held.jsonl").exists()
    settle(Path(folder))
    settle(Path())
    settle(Path("deep"))
    assert listed() == ["deep", "deep/held.jsonl", "train.jsonl"]
    assert Path("deep/held.jsonl").read_text() == '{"n": 1}\n'


def test_files_that_belong_together_are_forgotten_while_none_is_there():
    write_two(killed_at=0)
    settle(Path())
    settle(Path("deep"))
    assert listed() == ["deep"]


def test_who_reads_the_second_of_two_files_finds_it():
    write_two(killed_at=1)
    assert [row for _, row in read_rows("deep/held.jsonl")] == [{"n": 1}]


def test_a_name_that_is_taken_undoes_the_other():
    def write():
        with atomic_files([Path("train.jsonl"), Path("held.jsonl")]):
            Path("held.jsonl").write_text("theirs")

    with pytest.raises(OutputError, match=r"held\.jsonl already exists"):
        write()
    assert listed() == ["held.jsonl"]


def test_a_note_from_elsewhere_moves_nothing():
    Path("mine").write_text("mine")
    Path("../outside").write_text("outside")
    Path(".x.00000000.unfinished").write_text("x")
    steps = [["mine", "theirs"], ["../outside", "inside"], [".x.00000000.unfinished", "../escaped"], 3]
    for number, content in enumerate((json.dumps(steps[:3]), json.dumps(steps), "no json", "{}")):
        Path(f".pairs.0000000{number}.together").write_text(content)
    settle(Path())
    assert listed() == ["mine"]
    assert Path("../outside").read_text() == "outside"
    assert not Path("../escaped").exists()


# --- lora-dpo clean -------------------------------------------------------------------------------


def unfinished_run(name, *, whole=True):
    partial = Path("adapters") / f"{name}.partial"
    folder = partial / "checkpoints" / "checkpoint-1"
    begin(partial, None)
    recipe = f"model: {{name: m}}\ndata: {{train: a.jsonl}}\noutput: adapters/{name}\n"
    (partial / "recipe.yaml").write_text(recipe)
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    if whole:
        seal(folder)
    return partial


def test_clean_shows_what_is_left_and_removes_it_when_told_so(tmp_path, capsys):
    killed_inside(
        atomic_folder(Path("deep/er/merged")), write=lambda folder: (folder / "w").write_bytes(b"x" * 2_000_000)
    )
    killed_inside(scratch("demo"), write=lambda folder: (folder / "upload").write_text("private"))
    crashed = write_crash(ValueError("x"), ["train"])
    (crashed.parent / "lora-dpo-crash-of-mine.txt").write_text("mine")
    goes_on, finished, cut = unfinished_run("goes-on"), unfinished_run("done"), unfinished_run("cut", whole=False)
    torn = goes_on / "checkpoints/checkpoint-2"
    torn.mkdir()
    Path("adapters/done").mkdir()
    shutil.copy(finished / "recipe.yaml", "adapters/done/recipe.yaml")
    mine = [".env.production", ".notes.12345678.txt", "movie.partial", "adapters/theirs.partial/readme"]
    for name in mine:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
    before = listed()
    assert main(["clean"]) == 0
    said = capsys.readouterr().out
    assert listed() == before
    for part in (
        "2.0 MB  a result that was cut off",
        "lora-dpo-demo-",
        str(finished),
        str(cut),
        str(torn),
        str(crashed),
        "6 leftovers",
    ):
        assert part in said, part
    assert "--yes" in said
    assert main(["clean", "--yes"]) == 0
    assert capsys.readouterr().out.count("removed ") == 6
    assert [name for name in mine if not Path(name).exists()] == []
    assert (goes_on / "checkpoints/checkpoint-1/manifest.json").exists()
    assert not [path for path in (finished, cut, torn) if path.exists()]
    assert [path.name for path in (tmp_path / "temporary").iterdir()] == ["lora-dpo-crash-of-mine.txt"]
    assert main(["clean"]) == 0
    assert "Nothing is left behind." in capsys.readouterr().out


# --- locks, journals, homes -----------------------------------------------------------------------


@pytest.mark.posix
def test_only_one_process_at_a_time_holds_a_place():
    """Each would find the other's mark if both held it. The lock's file goes whenever it is given up."""

    def work():
        held = 0
        while held < 60:
            try:
                with alone(Path("made.jsonl")):
                    os.close(os.open("mark", os.O_CREAT | os.O_EXCL))
                    os.unlink("mark")
                    held += 1
            except OutputError:
                continue
            except FileExistsError:
                os._exit(1)
        os._exit(0)

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            work()
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert listed() == []


def test_a_row_that_could_not_be_written_leaves_no_part_of_it(monkeypatch):
    journal = Journal(Path("made.samples.jsonl"), {"seed": 1})
    journal.append([{"n": 1}])
    whole = Path("made.samples.jsonl").read_bytes()

    def fail(number):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="Input/output error"):
            journal.append([{"n": 2}])
    assert Path("made.samples.jsonl").read_bytes() == whole
    journal.append([{"n": 3}])
    assert Journal(Path("made.samples.jsonl"), {"seed": 1}).rows == [{"n": 1}, {"n": 3}]


def test_somebody_else_s_folder_that_ends_in_partial_is_no_run(capsys):
    for name, file in (("bar", "checkpoints/stuff/data"), ("mine", "important.csv"), ("empty", None)):
        folder = Path(f"{name}.partial")
        folder.mkdir()
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("x")
    Path("mine.partial/recipe.yaml").write_text("model: {name: m}\n")
    before = listed()
    assert main(["clean", "--yes"]) == 0
    assert "Nothing is left behind" in capsys.readouterr().out
    assert listed() == before


@pytest.mark.parametrize(
    "note", ["[" * 100_000, '[["a\\u0000b", "c"]]', '[[".a.12345678.unfinished", "b\\u0000"]]', "{}", ""]
)
def test_a_note_of_names_from_elsewhere_holds_nobody_up(note):
    Path(".x.12345678.together").write_text(note)
    settle(Path())
