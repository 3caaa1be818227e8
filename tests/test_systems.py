"""Windows and macOS, by their answers: neither can be run here, so what they refuse is refused on Linux."""

import ast
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from elsewhere import as_windows, is_in_use

from lora_dpo import systems
from lora_dpo.adapters.checkpoints import checkpoints, newest_whole, seal
from lora_dpo.adapters.package import check_name
from lora_dpo.adapters.run_folder import (
    RunLog,
    check_space,
    discard_own,
    discard_run,
    open_run,
    partial_of,
    release,
    resume_command,
)
from lora_dpo.cli.cleaning import leftovers as found_in
from lora_dpo.cli.cleaning import remove
from lora_dpo.cli.commands import main
from lora_dpo.cli.crash import quiet_exit
from lora_dpo.config.reading import check_recipe, read_recipe
from lora_dpo.data import Message
from lora_dpo.data.hub_rows import is_hub_source
from lora_dpo.data.journal import Journal, alone, append_durably, rewrite_durably
from lora_dpo.data.template_trial import fault_of
from lora_dpo.demo.pair_store import clean_name
from lora_dpo.demo.votes import ShownAnswer, VoteLog
from lora_dpo.errors import ConfigError, OutputError, PackageError
from lora_dpo.files import (
    atomic_file,
    atomic_files,
    atomic_folder,
    disk_errors,
    looks_local,
    refusal,
    refuse_unwritable,
    replace_file,
)
from lora_dpo.leftovers import discard, scratch, settle, temporary_file
from lora_dpo.serving.connections import MOST, most_connections

PACKAGE = Path(__file__).parent.parent / "lora_dpo"

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def windows(monkeypatch):
    as_windows(monkeypatch)


def recipe(**sections):
    return check_recipe({"model": {"name": "m"}, "data": {"train": "a.jsonl"}, **sections})


# --- what is refused, is -----------------------------------------------------------------------------


@pytest.mark.linux
def test_the_stand_in_refuses_what_windows_refuses(windows):
    Path("folder").mkdir()
    with pytest.raises(PermissionError):
        os.open("folder", os.O_RDONLY)
    with Path("folder/file").open("w") as file:
        for change in (lambda: os.rename("folder", "new"), lambda: os.unlink("folder/file")):
            with pytest.raises(PermissionError):
                change()
        os.fsync(file.fileno())
    with Path("folder/file").open() as file, pytest.raises(OSError, match="reading alone"):
        os.fsync(file.fileno())
    assert not is_in_use(os.path.abspath("folder"))
    os.rename("folder", "new")
    assert Path("new/file").exists()


# --- results, logs and votes ----------------------------------------------------------------------


@pytest.mark.linux
def test_results_appear_whole(windows):
    with atomic_file(Path("a.jsonl")) as temporary:
        temporary.write_text("a")
    with atomic_files([Path("train.jsonl"), Path("eval.jsonl")]) as both:
        for number, temporary in enumerate(both):
            temporary.write_text(str(number))
    with atomic_folder(Path("adapter")) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text("w")
    replace_file(Path("a.jsonl"), "b")
    seen = {path.as_posix(): path.read_text() for path in Path().rglob("*") if path.is_file()}
    assert seen == {"a.jsonl": "b", "train.jsonl": "0", "eval.jsonl": "1", "adapter/deep/weights": "w"}


@pytest.mark.linux
def test_on_a_disk_without_links_results_appear_too(windows, monkeypatch):
    def no_links(*given, **named):
        raise OSError(errno.EINVAL, "Incorrect function")  # as exFAT says it on Windows

    monkeypatch.setattr(os, "link", no_links)
    with atomic_file(Path("a.jsonl")) as temporary:
        temporary.write_text("a")
    assert Path("a.jsonl").read_text() == "a"
    with pytest.raises(OutputError, match="already exists"), atomic_file(Path("a.jsonl")):
        pass


@pytest.mark.linux
def test_rows_and_votes_are_kept(windows):
    journal = Journal(Path("samples.jsonl"), {"seed": 1})
    journal.append([{"a": 1}])
    assert Journal(Path("samples.jsonl"), {"seed": 1}).rows == [{"a": 1}]
    append_durably(Path("rows.jsonl"), {"b": 2})
    rewrite_durably(Path("rows.jsonl"), lambda number, row: {**row, "c": 3})
    assert json.loads(Path("rows.jsonl").read_text()) == {"b": 2, "c": 3}
    log, sides = VoteLog(Path("votes.jsonl")), [ShownAnswer(text, text, {}) for text in ("yes", "no")]
    log.add([Message(role="user", content="?")], *sides, "a", vote_id="1")
    assert log.count() == (1, 0)
    with alone(Path("out.jsonl")):
        Path("out.jsonl").write_text("{}")


@pytest.mark.linux
def test_a_run_goes_on_is_resumed_and_removed(windows):
    output, partial = Path("adapters/mine"), partial_of(Path("adapters/mine"))
    open_run(recipe(), output, resume=False)
    with pytest.raises(OutputError, match="goes on in this process"):
        discard_run(output)
    log = RunLog(partial / "metrics.jsonl", from_step=-1)
    log.append({"step": 3})
    log.sync()
    checkpoint = partial / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    seal(checkpoint)
    release(partial)
    assert newest_whole(partial) == (checkpoint, [])
    assert open_run(recipe(), output, resume=True) == checkpoint
    discard_own(partial)
    release(partial)
    assert list(Path("adapters").iterdir()) == []


@pytest.mark.linux
def test_what_a_killed_run_left_is_cleaned(windows):
    partial = partial_of(Path("adapters/mine"))
    open_run(recipe(), Path("adapters/mine"), resume=False)
    release(partial)
    assert checkpoints(partial) == []
    [found] = found_in([Path()])
    assert found.path == partial
    assert remove(found)
    assert list(Path("adapters").iterdir()) == []


def test_what_is_locked_is_neither_read_nor_written(tmp_path, monkeypatch):
    """A lock on Windows keeps everyone else's hands off the file, the holder's other ones too."""
    touched, real = [], Path.open

    def noted(self, *rest, **named):
        touched.append(self.name)
        return real(self, *rest, **named)

    monkeypatch.setattr(Path, "open", noted)
    open_run(recipe(), Path("mine"), resume=False)
    assert json.loads((partial_of(Path("mine")) / "running.json").read_text())["process"] == os.getpid()
    release(partial_of(Path("mine")))
    assert "running.json" in touched
    assert "running.lock" not in touched


# --- leftovers, where no lock tells whether somebody is at them -----------------------------------


def aged(path, days):
    then = time.time() - days * 86_400
    for one in (path, *path.rglob("*")):
        os.utime(one, (then, then))


def left(name="a.jsonl", *, kind="unfinished", days=0.0):
    path = Path(f".{name}.1a2b3c4d.{kind}")
    path.write_text("half")
    aged(path, days)
    return path


def test_without_locks_nothing_unfinished_is_removed_by_itself(windows):
    path = left(days=9)
    settle(Path())
    with atomic_file(Path("a.jsonl")) as temporary:
        temporary.write_text("{}")
    assert path.exists()


def test_without_locks_clean_removes_what_is_a_day_old(windows, capsys):
    old, young = left("old", days=1.1), left("young", days=0.9)
    folder = Path(".deep.1a2b3c4d.unfinished")
    (folder / "inside").mkdir(parents=True)
    aged(folder, 2)
    (folder / "inside" / "at-work").write_text("now")
    assert [found.path for found in found_in([Path()]) if found.path.parent == Path()] == [old]
    main(["clean", "--yes"])
    assert [path.exists() for path in (old, young, folder)] == [False, True, True]


def test_with_locks_age_says_nothing(monkeypatch):
    with temporary_file(Path("a.jsonl")) as held:
        aged(held, 9)
        assert [found.path for found in found_in([Path()]) if found.path.parent == Path()] == []
        settle(Path())
        assert held.exists()


def test_scratch_of_this_user_is_found_without_user_numbers(windows, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "getuid")
    with scratch("fetch", tmp_path):
        assert [path.name[:15] for path in systems_scratch(tmp_path)] == ["lora-dpo-fetch-"]


def systems_scratch(folder):
    from lora_dpo.leftovers import scratch_folders

    return scratch_folders(folder)


# --- renames that are refused for a moment --------------------------------------------------------


@pytest.fixture
def scanner(monkeypatch):
    """A virus scanner that has each new file open for the first so many tries."""
    state = {"tries": 2, "slept": []}
    real = {name: getattr(os, name) for name in ("rename", "replace")}
    monkeypatch.setattr(time, "sleep", state["slept"].append)

    def refusing(name):
        def change(*given, **named):
            if state["tries"] > 0:
                state["tries"] -= 1
                raise PermissionError(errno.EACCES, "Access is denied", str(given[0]))
            return real[name](*given, **named)

        return change

    for name in real:
        monkeypatch.setattr(os, name, refusing(name))
    return state


def test_a_virus_scanner_is_waited_for(scanner, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    replace_file(Path("a.json"), "1")
    assert Path("a.json").read_text() == "1"
    scanner["tries"] = 2
    with atomic_folder(Path("adapter")) as folder:
        (folder / "w").write_text("w")
    assert Path("adapter/w").exists()
    scanner["tries"] = 2
    discard(Path("adapter"))
    assert not Path("adapter").exists()
    assert len(scanner["slept"]) == 6
    assert sum(scanner["slept"]) < 1


def test_it_is_not_waited_for_without_end(scanner, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    scanner["tries"] = 99
    with pytest.raises(PermissionError):
        replace_file(Path("a.json"), "1")
    assert 1 < sum(scanner["slept"]) < 5
    assert list(Path().iterdir()) == []


def test_elsewhere_a_refusal_is_one(scanner):
    with pytest.raises(PermissionError):
        replace_file(Path("a.json"), "1")
    assert scanner["slept"] == []


# --- the disk -------------------------------------------------------------------------------------


def test_macos_is_told_to_empty_the_drives_own_memory(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    asked = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda number, what: asked.append(what))
    monkeypatch.setattr(os, "fsync", lambda number: asked.append("fsync"))
    monkeypatch.setattr(sys, "platform", "darwin")
    replace_file(Path("a.json"), "1")
    assert set(asked) == {51}


def test_a_network_disk_of_macos_is_synced_as_it_can_be(monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unknown(number, what):
        raise OSError(errno.ENOTSUP, "not here")

    synced = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", unknown)
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(sys, "platform", "darwin")
    replace_file(Path("a.json"), "1")
    assert len(synced) == 2  # the file, and its name


def windows_error(number, kind=PermissionError, code=errno.EACCES, filename="adapters/mine/w"):
    error = kind(code, "what Windows says", filename)
    error.winerror = number
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (windows_error(32), "mine: another program has it open. Close it there and try again."),
        (windows_error(32, filename="other/x"), "x: another program has it open."),
        (windows_error(123, OSError, errno.EINVAL), "mine: it has a letter that no name may have there, such as :"),
        (windows_error(206, FileNotFoundError, errno.ENOENT), "mine: the name is too long there."),
    ],
)
def test_windows_own_numbers_say_what_to_do(error, says):
    place = "other" if says.startswith("x:") else "adapters"
    assert refusal(error, Path("adapters/mine")).startswith(f"Cannot write {place}/{says}")


@pytest.mark.parametrize(("number", "says"), [(112, "No space left"), (5, "Permission denied"), (3, "No such file")])
def test_rust_says_windows_numbers_there_and_the_usual_ones_here(monkeypatch, number, says):
    class SafetensorError(Exception):
        pass

    error = SafetensorError(f"I/O error: (os error {number})")
    said_here = refusal(error, Path("a"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert says in (refusal(error, Path("a")) or "No such file")
    assert said_here is None or says not in said_here


def test_a_drive_that_is_not_there_is_one_sentence(monkeypatch):
    """On Windows no part of `Z:/x` need exist."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/")

    def missing(*given, **named):
        raise gone

    monkeypatch.setattr("shutil.disk_usage", missing)
    monkeypatch.setattr(os, "open", missing)
    for check in (lambda: check_space(Path("x/y"), 1), lambda: refuse_unwritable(Path("x/y"))):
        with pytest.raises(OutputError, match=r"No such file or directory\. Nothing can be made there"):
            check()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["con", "NUL", "aux.jsonl", "Com1", "lpt9.tar.gz", "prn .txt", "a.", "a ", "conin$"])
def test_names_that_windows_has_not(name):
    assert systems.is_reserved(name)


@pytest.mark.parametrize("name", ["console", "com", "com10", "nullable.jsonl", "my-con", "a.con", "quickstart"])
def test_names_that_it_has(name):
    assert not systems.is_reserved(name)


@pytest.mark.parametrize("name", ["con", "Aux", "nul.v2", "com7"])
def test_an_adapter_is_never_called_what_windows_cannot_unpack(name):
    with pytest.raises(PackageError, match="Windows keeps that name for a device"):
        check_name(name)


UPLOADS = {"con.csv": "upload", "C:\\me\\pairs.csv": "pairs", "a:b?.jsonl": "a-b", "x. .jsonl": "x", "NUL": "upload"}


@pytest.mark.parametrize(("name", "kept"), UPLOADS.items())
def test_an_upload_gets_a_name_that_every_disk_takes(name, kept):
    assert clean_name(name) == kept
    assert not systems.is_reserved(f"{kept}.jsonl")


@pytest.mark.parametrize("name", ["C:\\models\\mine", "models\\mine", "C:/mine", "c:me/x", "..\\x/y", "\\\\there\\x/y"])
def test_a_windows_path_is_never_asked_of_a_hub(name):
    assert looks_local(name)
    assert not is_hub_source(name)


def test_commands_to_type_are_written_for_the_shell_that_is_there(monkeypatch):
    output = Path("my adapters/it's")
    assert resume_command(output) == """lora-dpo train 'my adapters/it'"'"'s.partial/recipe.yaml' --resume"""
    monkeypatch.setattr(sys, "platform", "win32")
    assert resume_command(output) == 'lora-dpo train "my adapters/it\'s.partial/recipe.yaml" --resume'
    assert systems.command_line(["lora-dpo", "chat", "adapters\\mine"]) == "lora-dpo chat adapters\\mine"


# --- texts ----------------------------------------------------------------------------------------


def opened_as_text(tree):
    """Calls that open a file for text, or write one: `(line, names of the keywords)`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords} | ({"encoding"} if "utf-8" in ast.unparse(node) else set())
        words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        mode = next((word for word in words if isinstance(word, str) and re.fullmatch(r"[rwaxbt+]+", word)), "")
        if name in ("write_text", "read_text"):
            yield node.lineno, given, name == "write_text"
        elif name == "open" and mode and "b" not in mode and "force_zip64" not in given:  # a zip's entry is bytes
            yield node.lineno, given, set(mode) & set("wax")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_text_says_its_encoding_and_is_written_with_line_feeds(path):
    for line, given, written in opened_as_text(ast.parse(path.read_text(encoding="utf-8"))):
        assert "encoding" in given, f"{path}:{line}"
        assert not written or "newline" in given, f"{path}:{line}"


def test_what_opens_a_text_is_seen():
    code = 'p.write_text("x", encoding="utf-8")\np.open("a", encoding="utf-8")\np.read_text()\np.open("rb")\np.open()\n'
    assert [line for line, _, _ in opened_as_text(ast.parse(code))] == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'data:\n  train: "C:\\Users\\me\\a.jsonl"\n', r"not valid YAML .*In double quotes \\ begins an escape"),
        ("model: {name: m}".encode("utf-16"), "is not UTF-8 text .* Save it as UTF-8"),
    ],
)
def test_recipes_as_windows_writes_them_are_told_what_to_mend(content, says):
    Path("r.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_recipe("r.yaml")


def test_a_recipe_of_notepad_is_read():
    text = "model:\r\n  name: m\r\ndata:\r\n  train: 'C:\\Users\\me\\a.jsonl'\r\n"
    Path("r.yaml").write_bytes(text.encode("utf-8-sig"))
    assert read_recipe("r.yaml").data.train == "C:\\Users\\me\\a.jsonl"


# --- the terminal ---------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """Standard output that is, or is not, a terminal."""

    def __init__(self, encoding, *, shown):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.shown = shown

    def isatty(self):
        return self.shown

    def written(self):
        self.flush()
        return self.buffer.getvalue()


@pytest.mark.parametrize("shown", [True, False])
def test_arrows_and_greek_letters_end_no_command_on_a_cp1252_console(shown, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    for words in (["recipe"], ["--help"], ["clean"], ["train", "no → such.yaml"], ["models", "list"]):
        screen = {name: Terminal("cp1252", shown=shown) for name in ("stdout", "stderr")}
        with monkeypatch.context() as patched:
            for name, stream in screen.items():
                patched.setattr(sys, name, stream)
            assert main(words) in (0, 1), words
        text = screen["stdout"].written().decode("cp1252") + screen["stderr"].written().decode("cp1252")
        assert text, words
        assert "fault of lora-dpo" not in text, words
        if "no → such.yaml" in words:
            assert "no \\u2192 such.yaml" in text


def test_files_and_pipes_of_windows_get_utf8(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    for shown, encoding in ((False, "utf-8"), (True, "cp1252")):
        stream = Terminal("cp1252", shown=shown)
        systems.make_writable(stream)
        stream.write("é→")
        assert stream.written() == "é→".encode(encoding, "backslashreplace")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    stream = Terminal("cp1252", shown=False)
    systems.make_writable(stream)
    stream.write("é→")
    assert stream.written() == b"\xe9\\u2192"


class Closed(io.StringIO):
    """A pipe whose reader is gone, as Windows has it."""

    def write(self, text=""):
        raise OSError(errno.EINVAL, "Invalid argument")

    flush = write

    def fileno(self):
        return self.number


def test_a_reader_that_is_gone_is_no_fault(monkeypatch, tmp_path):
    assert systems.nobody_reads(BrokenPipeError())
    invalid = OSError(errno.EINVAL, "Invalid argument")
    assert not systems.nobody_reads(invalid)
    monkeypatch.setattr(sys, "platform", "win32")
    assert systems.nobody_reads(invalid)
    assert not systems.nobody_reads(OSError(errno.EINVAL, "Invalid argument", "a?b"))
    with (tmp_path / "pipe").open("w") as pipe:
        stream = Closed()
        stream.number = pipe.fileno()
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["models", "list"]) in (1, 141)
        quiet_exit()


# --- limits ---------------------------------------------------------------------------------------


def test_limits_that_windows_has_not_are_not_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert most_connections() == MOST
    with temporary_file(Path("a")), scratch("fetch"):
        pass


def test_a_chat_template_is_tried_without_limits_of_the_system_too(tmp_path):
    """The process that tries it, told that it is on Windows."""
    code = (
        "import json, runpy, sys; sys.platform, sys.modules['resource'] = 'win32', None; "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    given = json.dumps(["{{ 'x' * 2000000 }}", sys.path]).encode()
    file = PACKAGE / "data" / "template_trial.py"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(file)], input=given, capture_output=True, check=True)
    assert done.stdout == b"it writes 2,000,000 characters of a few words"
    assert fault_of("{{ messages }}") is None


def test_an_error_of_another_kind_stays_itself():
    with pytest.raises(ValueError, match="x"), disk_errors(Path("a")):
        raise ValueError("x")


# --- a card's memory --------------------------------------------------------------------------------


def allocator_of(given, *, first="import lora_dpo"):
    """Both variables in a process of its own, after what is run first."""
    environment = {name: value for name, value in os.environ.items() if name not in systems.ALLOCATOR} | given
    code = f"import os; {first}; print([os.environ.get(n) for n in {systems.ALLOCATOR}])"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return ast.literal_eval(ran.stdout)


def test_segments_grow_unless_a_user_has_said_how():
    assert allocator_of({}) == ["expandable_segments:True"] * 2
    assert allocator_of({}, first="import lora_dpo.cli") == ["expandable_segments:True"] * 2
    own = {"PYTORCH_ALLOC_CONF": "backend:native"}
    assert allocator_of(own) == ["backend:native", None]
    own = {"PYTORCH_CUDA_ALLOC_CONF": ""}
    assert allocator_of(own) == [None, ""]


def test_windows_has_no_segments_that_grow(monkeypatch):
    for name in systems.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    systems.let_segments_grow()
    assert not {*systems.ALLOCATOR} & {*os.environ}


def test_torch_takes_what_it_is_asked_for():
    """torch refuses words that it does not know when it reads them."""
    asked = "import lora_dpo, torch; torch._C._accelerator_setAllocatorSettings(os.environ['PYTORCH_ALLOC_CONF'])"
    assert allocator_of({}, first=asked) == ["expandable_segments:True"] * 2
