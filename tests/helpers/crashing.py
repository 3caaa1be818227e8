"""Run by test_crashes.py under the preloaded crash.c: commands that are killed, or whose disk fails, at any call.

    python crashing.py START PLACE '{"split": [kills, failures], …}' SEED

START holds what every command begins with. Each command runs in a forked child: once in peace, to count its calls and
to know its result, then once for each crash. Afterwards another child looks at what is left, gives the next command
as a person would, and compares. Prints one JSON object: how many crashes there were, and what was wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import json
import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_dpo.adapters.checkpoints import checkpoints
from lora_dpo.adapters.run_folder import partial_of
from lora_dpo.cli.cleaning import leftovers
from lora_dpo.cli.commands import main
from lora_dpo.data import read_pairs
from lora_dpo.data.journal import rewrite_durably
from lora_dpo.demo.votes import ShownAnswer, VoteLog

LIBRARY = ctypes.CDLL(None)  # crash.c is in it
COUNT, KILL, HALF, FULL, ONCE = range(5)
KINDS = ((KILL, 0), (HALF, 0), (HALF, 0))
FAILURES = ((FULL, errno.ENOSPC), (ONCE, errno.EIO), (FULL, errno.EDQUOT), (ONCE, errno.EFBIG))
ENDED, REFUSED, RAISED = 0, 1, 99


def command(*arguments: str) -> Callable[[], int]:
    return lambda: main(list(arguments))


@dataclass
class Case:
    """A command, and what it makes."""

    work: Callable[[], int]
    results: tuple[str, ...]
    again: Callable[[], None] | None = None
    """The next command, where it is not the same one."""
    before: Callable[[], int] | None = None
    """Run in peace to make what the command begins with."""
    gone: bool = False
    """The command removes its results."""
    warm: tuple[str, ...] = field(default=())
    """Imported before the children are made, so that none pays for it."""


# --- what each command is, and what comes after it ------------------------------------------------


def train_again() -> None:
    """Give the commands that the program itself names."""
    out = Path("out")
    if checkpoints(partial_of(out)) and not out.exists():
        assert main(["train", "recipe.yaml"]) == 1  # it says that there is an interrupted run
        assert main(["train", "out.partial/recipe.yaml", "--resume"]) == 0
    elif not out.exists():
        assert main(["train", "recipe.yaml"]) == 0
    else:  # killed as it cleaned up: the adapter is there, and what is left of the run may go
        assert main(["train", "recipe.yaml"]) == 1
        assert main(["clean", "--yes"]) == 0


def interrupted() -> int:
    from lora_dpo.config.reading import read_recipe
    from lora_dpo.events import Progress, Stopped, StopSignal
    from lora_dpo.training.run import train

    stop = StopSignal()

    def stop_at_two(event: object) -> None:
        if isinstance(event, Progress) and event.stage == "training" and event.done == 2:
            stop.requested = True

    with contextlib.suppress(Stopped):
        train(read_recipe(Path("recipe.yaml")), on_event=stop_at_two, stop=stop)
    return 0


PROMPT = [{"role": "user", "content": "Why is the sky blue?"}]


def vote(number: int, verdict: str = "a") -> None:
    one, other = (
        ShownAnswer(f"{word} {number}. " + "x" * 300, who, {}) for word, who in (("One", "base"), ("Two", "m"))
    )
    VoteLog(Path("votes.jsonl")).add(PROMPT, one, other, verdict, vote_id=str(number))
    with open(os.environ["ACKNOWLEDGED"], "a") as file:  # elsewhere: this is no call that fails
        file.write(f"{number}\n")


def vote_often() -> int:
    for number in range(6):
        vote(number, "skip" if number == 3 else "a")
    return 0


def vote_again() -> None:
    for number in (100, 103):
        vote(number, "skip" if number == 103 else "a")
    acknowledged = Path(os.environ["ACKNOWLEDGED"]).read_text().split()
    found = [row["origin"]["id"] for row in VoteLog(Path("votes.jsonl")).rows()]
    assert set(acknowledged) <= set(found), f"lost: {set(acknowledged) - set(found)}"
    assert len(found) == len(set(found)), f"doubled: {found}"
    assert len(found) - len(acknowledged) in (0, 1), "at most the vote that was being written is more"
    assert not read_pairs("votes.jsonl", on_bad_row="error")[1].dropped


def forget() -> int:
    with VoteLog(Path("votes.jsonl")).held():
        rewrite_durably(Path("votes.jsonl"), lambda line, row: None if line == 2 else row)
    return 0


def forget_again() -> None:
    ids = [row["origin"]["id"] for row in VoteLog(Path("votes.jsonl")).rows()]
    assert ids in (["0", "1", "2", "4", "5", "3"], ["0", "2", "4", "5", "3"]), ids
    vote(100)


def remove_again() -> None:
    assert main(["adapters", "remove", "mine", "--yes"]) in (0, 1)
    assert main(["adapters", "list"]) == 0


WARM = (
    *(
        "torch",
        "numpy",
        "safetensors.torch",
        "peft",
        "lora_dpo.adapters.store",
        "lora_dpo.cli.data_views",
        "lora_dpo.data.write",
    ),
    *("lora_dpo.adapters.folder", "transformers.models.llama.modeling_llama", "filelock", "lora_dpo.adapters.hub"),
)
TRAINING = ("lora_dpo.training.run", "lora_dpo.training.dpo_trainer", "trl.trainer.dpo_trainer", "matplotlib.pyplot")
CASES = {
    "split": Case(
        command("data", "split", "pairs.jsonl", "train.jsonl", "deep/held.jsonl"), ("train.jsonl", "deep/held.jsonl")
    ),
    "fix": Case(
        command("data", "check", "odd.jsonl", "--fix", "clean.jsonl.gz"),
        ("clean.jsonl.gz", "clean.jsonl.gz.dropped.jsonl"),
    ),
    "convert": Case(command("data", "convert", "pairs.jsonl", "canonical.jsonl"), ("canonical.jsonl",)),
    "pack": Case(command("adapters", "pack", "mine"), ("mine.lora.zip",)),
    "install": Case(
        command("adapters", "install", "other.lora.zip", "--name", "new"),
        ("adapters/new",),
        before=command("adapters", "pack", "mine", "--output", "other.lora.zip"),
    ),
    "remove": Case(command("adapters", "remove", "mine", "--yes"), ("adapters/mine",), remove_again, gone=True),
    "merge": Case(
        command("merge", "adapters/mine", "--output", "merged", "--dtype", "float32"),
        ("merged",),
        warm=("lora_dpo.release", "transformers.models.llama.modeling_llama"),
    ),
    "export": Case(
        command("export", "mine", "--to", "peft", "--output", "plain"), ("plain",), warm=("lora_dpo.release",)
    ),
    "votes": Case(vote_often, (), vote_again),
    "forget": Case(forget, (), forget_again, before=vote_often),
    "pairs": Case(
        command("pairs", "prompts.txt", "--model", "model", "--judge", "my_judge:longest", "--output", "made.jsonl",
                "--answers", "3", "--max-new-tokens", "12", "--quantize", "none"),
        ("made.jsonl",),
        warm=("lora_dpo.judging.pair_making", "transformers.models.llama.modeling_llama"),
    ),
    "improve": Case(command("improve", "rounds.yaml"), ("better-round1",), warm=TRAINING),
    "train": Case(command("train", "recipe.yaml"), ("out",), train_again, warm=TRAINING),
    "resume": Case(
        command("train", "out.partial/recipe.yaml", "--resume"),
        *(("out",), train_again, interrupted),
        warm=TRAINING,
    ),
}  # fmt: skip


# --- children -------------------------------------------------------------------------------------


def in_a_child(place: Path, work: Callable[[], int], log: Path, *, arm: tuple[int, int, int] | None = None) -> int:
    """Run `work` in a child that stands in `place`; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = RAISED
        try:
            os.chdir(place)
            number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(number, 1)
            os.dup2(number, 2)
            os.environ["ACKNOWLEDGED"] = f"{place}.acknowledged"
            os.environ["TMPDIR"] = f"{place}/tmp"
            sys.path.insert(0, str(place))
            if arm is not None:
                LIBRARY.crash_arm(f"{place}/".encode(), *arm)
            status = work()
            calls = LIBRARY.crash_disarm()
            Path(f"{place}.calls").write_text(str(calls))
        except BaseException:
            LIBRARY.crash_disarm()
            traceback.print_exc()
            status = RAISED
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(path: Path) -> dict[str, str]:
    """What of a result must be the same, however it came about: a hash by file."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    # A merge's report comes when it was measured, beside the whole model; what is left of its writing is swept later.
    files = [file for file in files if file.name != "fidelity.json" and not file.name.startswith(".fidelity.json.")]
    return {str(file.relative_to(path)): hashlib.sha256(_lasting(file)).hexdigest() for file in files}


def _lasting(file: Path) -> bytes:
    if file.name == "metrics.jsonl":
        timed = ("runtime", "per_second", "seconds")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{key: row[key] for key in sorted(row) if not any(word in key for word in timed)} for row in rows]
        return json.dumps(kept).encode()
    if file.name == "adapter_config.json":  # PEFT writes sets of names in the order of a process's hashes
        config = json.loads(file.read_text())
        return json.dumps(
            {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}, sort_keys=True
        ).encode()
    return file.read_bytes() if file.suffix in (".safetensors", ".jsonl", ".gz", ".zip", ".gguf") else b""


def look(case: Case, whole: dict[str, dict[str, str]]) -> None:
    """Nothing half is seen as whole."""
    for name, expected in whole.items():
        if Path(name).exists():
            found = digest(Path(name))
            other = [file for file in {**expected, **found} if found.get(file) != expected.get(file)]
            assert not other, f"{name} is there, and is not what it should be: {other}"


def after(case: Case, whole: dict[str, dict[str, str]]) -> int:
    """The next command works, and leaves what an undisturbed one leaves."""
    look(case, whole)
    if case.again is not None:
        case.again()
    else:
        status = case.work()
        assert status == 0 or (status == 1 and all(Path(name).exists() for name in case.results)), status
    for name in case.results:
        assert Path(name).exists() is not case.gone, f"{name} is {'still' if case.gone else 'not'} there"
    look(case, whole)
    found = [str(left.path) for left in leftovers([Path()], Path("tmp"))]
    assert not found, f"left behind: {found}"
    assert not list(Path().rglob("*.partial")), "an unfinished run is left behind"
    return 0


# --- the campaign ---------------------------------------------------------------------------------


class Campaign:
    """All crashes of one call of this script."""

    def __init__(self, start: Path, place: Path, seed: str) -> None:
        self.start, self.place, self.seed = start, place, seed
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, name: str, kills: int, failures: int) -> None:
        case, draws = CASES[name], random.Random(f"{self.seed} {name}")
        for module in (*WARM, *case.warm):
            importlib.import_module(module)
        begin = self.place / f"{name}-begin"
        self._copy(self.start, begin)
        if case.before is not None:
            assert in_a_child(begin, case.before, self._log(begin)) == 0, self._log(begin).read_text()
        peace = self.place / f"{name}-peace"
        self._copy(begin, peace)
        assert in_a_child(peace, case.work, self._log(peace), arm=(0, COUNT, 0)) == 0, self._log(peace).read_text()
        whole = {one: digest(peace / one) for one in case.results if not case.gone}
        if case.gone:
            whole = {one: digest(begin / one) for one in case.results}
        calls = int(Path(f"{peace}.calls").read_text())
        for number in range(kills):
            at, (how, _) = draws.randint(1, calls), KINDS[number % len(KINDS)]
            self._crash(name, case, begin, whole, at, how, 0)
        for number in range(failures):
            at, (how, error) = draws.randint(1, calls), FAILURES[number % len(FAILURES)]
            self._crash(name, case, begin, whole, at, how, error)

    def _crash(
        self, name: str, case: Case, begin: Path, whole: dict[str, dict[str, str]], at: int, how: int, error: int
    ) -> None:
        place = self.place / f"{name}-{at}-{how}-{error}"
        if place.exists():
            return  # drawn before
        self._copy(begin, place)
        log = self._log(place)
        status = in_a_child(place, case.work, log, arm=(at, how, error))
        what = f"{name}, call {at}, {'killed' if not error else os.strerror(error)}"
        if status == RAISED and not (name in ("votes", "forget") and "OutputError" in log.read_text()):
            self.wrong.append(f"{what}: a traceback\n{log.read_text()[-3000:]}")
        self.done["killed" if status == -9 else "failed" if status else "ended"] += 1
        status = in_a_child(place, lambda: after(case, whole), log)
        if status != 0:
            self.wrong.append(f"{what}, afterwards:\n{log.read_text()[-3000:]}")
        shutil.rmtree(place)

    def _copy(self, start: Path, place: Path) -> None:
        shutil.copytree(start, place, symlinks=True)
        (place / "tmp").mkdir(exist_ok=True)
        acknowledged = Path(f"{start}.acknowledged")
        Path(f"{place}.acknowledged").write_text(acknowledged.read_text() if acknowledged.exists() else "")

    def _log(self, place: Path) -> Path:
        return Path(f"{place}.log")


def end_turns() -> None:
    """A random model hardly ever ends its turn: let some bytes do it."""
    stops = frozenset({*range(100, 140), 257})
    setattr(importlib.import_module("lora_dpo.model.decoding"), "stop_token_ids", lambda model, tokenizer: stops)  # noqa: B010


if __name__ == "__main__":
    end_turns()
    campaign = Campaign(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), sys.argv[4])
    for which, (some, others) in json.loads(sys.argv[3]).items():
        campaign.run(which, some, others)
    print(json.dumps({"done": campaign.done, "wrong": campaign.wrong}))
