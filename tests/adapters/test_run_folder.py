from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_dpo.adapters.checkpoints import checkpoints, seal
from lora_dpo.adapters.run_folder import (
    RunLog,
    check_space,
    choose_output,
    open_run,
    partial_of,
    release,
    resume_command,
)
from lora_dpo.config.reading import check_recipe, read_recipe
from lora_dpo.config.recipe import Recipe
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.leftovers import discard

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def recipe(**sections: Any) -> Recipe:
    return check_recipe({"model": {"name": "m"}, "data": {"train": "a.jsonl"}, **sections})


def interrupt(output: Path, *steps: int, touched: float | None = None) -> None:
    """Make what an interrupted run leaves behind, as if last written at `touched`."""
    for step in steps:
        folder = partial_of(output) / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        seal(folder)
    if touched is not None:
        os.utime(partial_of(output), (touched, touched))


# --- the name -------------------------------------------------------------------------------------


def test_the_output_is_named_after_the_recipe():
    assert choose_output(recipe(), "quickstart", resume=False) == Path("adapters/quickstart")


def test_taken_names_are_numbered():
    Path("adapters/quickstart").mkdir(parents=True)
    assert choose_output(recipe(), "quickstart", resume=False) == Path("adapters/quickstart-2")
    Path("adapters/quickstart-2").mkdir()
    assert choose_output(recipe(), "quickstart", resume=False) == Path("adapters/quickstart-3")
    assert choose_output(recipe(), "other", resume=False) == Path("adapters/other")


def test_an_interrupted_run_keeps_its_name():
    interrupt(Path("adapters/quickstart"), 50)
    assert choose_output(recipe(), "quickstart", resume=False) == Path("adapters/quickstart-2")


def test_what_a_run_left_before_its_first_checkpoint_takes_no_name():
    partial_of(Path("adapters/quickstart")).mkdir(parents=True)
    assert choose_output(recipe(), "quickstart", resume=False) == Path("adapters/quickstart")


def test_the_recipes_own_output_is_taken_as_it_is():
    assert choose_output(recipe(output="mine"), "quickstart", resume=False) == Path("mine")
    interrupt(Path("mine"), 50)
    assert choose_output(recipe(output="mine"), "quickstart", resume=True) == Path("mine")


@pytest.mark.parametrize("output", ["mine", "."])
@pytest.mark.parametrize("resume", [False, True])
def test_a_taken_output_is_refused_before_anything_is_read(output, resume):
    Path("mine").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        choose_output(recipe(output=output), "quickstart", resume=resume)


def test_an_output_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert choose_output(recipe(output="~/mine"), "quickstart", resume=False) == Path("/home/me/mine")


def test_resume_continues_the_run_that_was_interrupted_last():
    interrupt(Path("adapters/quickstart"), 50, touched=1_000)
    interrupt(Path("adapters/quickstart-2"), 50, touched=3_000)
    interrupt(Path("adapters/quickstart-3"), 50, touched=2_000)
    interrupt(Path("adapters/other"), 50, touched=9_000)
    partial_of(Path("adapters/quickstart-4")).mkdir()  # the youngest, but without a checkpoint
    assert choose_output(recipe(), "quickstart", resume=True) == Path("adapters/quickstart-2")


def test_resume_without_an_interrupted_run_is_refused():
    partial_of(Path("adapters/quickstart")).mkdir(parents=True)
    with pytest.raises(OutputError, match=r"No interrupted run of quickstart is in adapters.* without --resume"):
        choose_output(recipe(), "quickstart", resume=True)


# --- checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_are_in_the_order_of_their_steps():
    interrupt(Path("a"), 100, 50, 1000)
    assert [path.name for path in checkpoints(partial_of(Path("a")))] == [
        "checkpoint-50",
        "checkpoint-100",
        "checkpoint-1000",
    ]


def test_a_checkpoint_that_was_cut_off_while_being_written_is_none():
    interrupt(Path("a"), 50)
    (partial_of(Path("a")) / "checkpoints" / "checkpoint-100").mkdir()
    assert [path.name for path in checkpoints(partial_of(Path("a")))] == ["checkpoint-50"]


# --- opening a run --------------------------------------------------------------------------------


def test_a_fresh_run_writes_its_recipe_beside_the_output():
    settings = recipe(trainer={"beta": 0.3})
    assert open_run(settings, Path("deep/out"), resume=False) is None
    assert read_recipe(Path("deep/out.partial/recipe.yaml")) == settings
    assert not Path("deep/out").exists()


def test_a_fresh_run_clears_what_cannot_be_resumed():
    partial = partial_of(Path("out"))
    partial.mkdir()
    (partial / "metrics.jsonl").write_text("{}")
    open_run(recipe(), Path("out"), resume=False)
    assert sorted(path.name for path in partial.iterdir()) == [
        "checkpoints",
        "recipe.yaml",
        "running.json",
        "running.lock",
    ]


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_that_exists_is_refused(resume):
    Path("out").mkdir()
    interrupt(Path("out"), 50)
    with pytest.raises(OutputError, match="out already exists"):
        open_run(recipe(), Path("out"), resume=resume)


def test_an_interrupted_run_in_the_way_is_kept_and_named():
    interrupt(Path("out"), 50)
    with pytest.raises(OutputError, match=r"An interrupted run is in out\.partial.*--resume"):
        open_run(recipe(), Path("out"), resume=False)
    assert len(checkpoints(partial_of(Path("out")))) == 1


def test_nothing_to_resume_is_said():
    open_run(recipe(), Path("out"), resume=False)
    with pytest.raises(OutputError, match=r"out\.partial holds no checkpoint.*without --resume"):
        open_run(recipe(), Path("out"), resume=True)


def test_resume_returns_the_last_checkpoint():
    open_run(recipe(), Path("out"), resume=False)
    interrupt(Path("out"), 50, 100)
    checkpoint = open_run(recipe(), Path("out"), resume=True)
    assert checkpoint == Path("out.partial/checkpoints/checkpoint-100")


def test_a_run_resumes_from_the_recipe_that_it_wrote_itself():
    open_run(recipe(lora={"alpha": 8}, trainer={"learning_rate": 5e-7}), Path("out"), resume=False)
    interrupt(Path("out"), 50)
    assert open_run(read_recipe(Path("out.partial/recipe.yaml")), Path("out"), resume=True) is not None


def test_resume_with_other_settings_names_them_and_the_command():
    open_run(recipe(trainer={"beta": 0.1}), Path("out"), resume=False)
    interrupt(Path("out"), 50)
    with pytest.raises(ConfigError) as caught:
        open_run(recipe(trainer={"beta": 0.2}), Path("out"), resume=True)
    assert "beta: 0.2" in str(caught.value)
    assert "rank" not in str(caught.value)
    assert resume_command(Path("out")) in str(caught.value)


def test_resume_names_a_changed_setting_also_when_its_line_stands_elsewhere():
    open_run(recipe(data={"train": "a.jsonl", "eval": None}), Path("out"), resume=False)
    interrupt(Path("out"), 50)
    with pytest.raises(ConfigError, match=r"dora"):
        open_run(recipe(data={"train": "a.jsonl"}, lora={"rslora": True, "dora": True}), Path("out"), resume=True)
    with pytest.raises(ConfigError, match="dropout"):
        open_run(recipe(lora={"dropout": 0.5}), Path("out"), resume=True)


def test_resume_names_a_setting_that_was_taken_away():
    open_run(recipe(trainer={"beta": 0.1, "seed": 7}), Path("out"), resume=False)
    interrupt(Path("out"), 50)
    with pytest.raises(ConfigError, match="seed"):
        open_run(recipe(trainer={"beta": 0.1}), Path("out"), resume=True)


def test_the_resume_command_reads_the_unfinished_runs_own_recipe():
    assert resume_command(Path("adapters/q")) == "lora-dpo train adapters/q.partial/recipe.yaml --resume"


def test_the_resume_command_survives_a_shell():
    assert "'my runs/q.partial/recipe.yaml'" in resume_command(Path("my runs/q"))


def test_resume_does_not_mind_the_order_of_trainer_fields():
    open_run(recipe(trainer={"beta": 0.1, "seed": 7}), Path("out"), resume=False)
    interrupt(Path("out"), 50)
    assert open_run(recipe(trainer={"seed": 7, "beta": 0.1}), Path("out"), resume=True) is not None


# --- one run at a time ----------------------------------------------------------------------------


RUNS = """
import sys
import traceback
from pathlib import Path
from lora_dpo.config.reading import check_recipe
from lora_dpo.adapters.run_folder import open_run
recipe = check_recipe({"model": {"name": "m"}, "data": {"train": "a.jsonl"}})
for line in sys.stdin:
    open_run(recipe, Path(line.strip()), resume=False)
    print("begun", flush=True)
"""


@pytest.fixture
def another_process() -> Iterator[subprocess.Popen[str]]:
    """A process that begins a run for every name that it is told, and ends none."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", RUNS], **pipes) as process:
        yield process
        process.kill()


def run_of(process: subprocess.Popen[str], output: Path) -> Path:
    """Begin a run in another process: before its first checkpoint."""
    process.stdin.write(f"{output}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "begun\n"
    return partial_of(output)


@pytest.mark.parametrize("steps", [[], [50]], ids=["before-a-checkpoint", "after-one"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_goes_on_elsewhere_is_left_alone_and_named(another_process, steps, resume):
    partial = run_of(another_process, Path("out"))
    interrupt(Path("out"), *steps)
    before = sorted(partial.rglob("*"))
    for start in (open_run, lambda settings, output, resume: choose_output(settings, "", resume=resume)):
        with pytest.raises(OutputError, match=rf"going on in out\.partial \(process {another_process.pid}\)"):
            start(recipe(output="out"), Path("out"), resume=resume)
    assert sorted(partial.rglob("*")) == before


def test_a_run_that_goes_on_elsewhere_keeps_its_name(another_process):
    run_of(another_process, Path("adapters/quickstart"))
    assert choose_output(recipe(), "quickstart", resume=False) == Path("adapters/quickstart-2")
    interrupt(Path("adapters/quickstart"), 50, touched=9_000)
    interrupt(Path("adapters/quickstart-2"), 50, touched=1_000)
    assert choose_output(recipe(), "quickstart", resume=True) == Path("adapters/quickstart-2")


def test_of_two_runs_that_start_together_only_one_gets_the_place(another_process, monkeypatch):
    run_of(another_process, Path("out"))
    monkeypatch.setattr(
        "lora_dpo.adapters.run_folder.check_place", lambda output, resume: None
    )  # as if checked before the other
    with pytest.raises(OutputError, match="has just started"):
        open_run(recipe(), Path("out"), resume=False)


def test_the_lock_of_a_process_that_died_is_no_lock(another_process):
    run_of(another_process, Path("out"))
    another_process.kill()
    another_process.wait()
    assert (partial_of(Path("out")) / "running.lock").exists()
    interrupt(Path("out"), 50)
    assert open_run(recipe(), Path("out"), resume=True) == Path("out.partial/checkpoints/checkpoint-50")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"process": 1, "host": "another machine"}'])
def test_a_lock_that_names_no_process_here_is_no_lock(text):
    partial = partial_of(Path("out"))
    partial.mkdir()
    (partial / "running.lock").touch()
    (partial / "running.json").write_text(text)
    assert open_run(recipe(), Path("out"), resume=False) is None


def test_release_gives_up_the_own_lock_only(another_process):
    open_run(recipe(), Path("mine"), resume=False)
    release(partial_of(Path("mine")))
    release(partial_of(Path("mine")))
    assert list(partial_of(Path("mine")).glob("running.*")) == []
    theirs = run_of(another_process, Path("theirs"))
    release(theirs)
    assert sorted(path.name for path in theirs.glob("running.*")) == ["running.json", "running.lock"]


@pytest.mark.posix
def test_only_one_process_at_a_time_owns_a_run():
    """Each would find the other's mark if both owned the folder, which comes and goes with its lock."""

    def own_often() -> int:
        owned = 0
        while owned < 15:
            try:
                open_run(recipe(), Path("out"), resume=False)
            except OutputError:
                continue
            try:
                os.close(os.open("mark", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return 1
            os.unlink("mark")
            discard(partial_of(Path("out")))
            release(partial_of(Path("out")))
            owned += 1
        return 0

    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 2
            try:
                status = own_often()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3


# --- the log --------------------------------------------------------------------------------------


def test_the_log_is_on_disk_row_by_row():
    log = RunLog(Path("metrics.jsonl"), from_step=-1)
    assert Path("metrics.jsonl").read_text() == ""
    log.append({"step": 1, "loss": 0.7})
    log.append({"step": 2, "loss": 0.6})
    assert [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()] == log.rows
    assert log.rows == [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]


@pytest.mark.parametrize(("from_step", "kept"), [(2, [1, 2, 2]), (1, [1]), (-1, []), (9, [1, 2, 2, 3])])
def test_a_reopened_log_forgets_the_steps_that_will_run_again(from_step, kept):
    before = RunLog(Path("metrics.jsonl"), from_step=-1)
    for step in (1, 2, 2, 3):
        before.append({"step": step})
    log = RunLog(Path("metrics.jsonl"), from_step=from_step)
    assert [row["step"] for row in log.rows] == kept
    log.append({"step": 99})
    assert [json.loads(line)["step"] for line in Path("metrics.jsonl").read_text().splitlines()] == [*kept, 99]


def test_a_log_that_cannot_be_opened_keeps_its_rows(monkeypatch):
    before = RunLog(Path("metrics.jsonl"), from_step=-1)
    before.append({"step": 1})
    before.append({"step": 2})

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            RunLog(Path("metrics.jsonl"), from_step=1)
    assert RunLog(Path("metrics.jsonl"), from_step=9).rows == [{"step": 1}, {"step": 2}]


def test_a_log_whose_last_line_was_cut_off_is_read_up_to_there():
    Path("metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert RunLog(Path("metrics.jsonl"), from_step=5).rows == [{"step": 1}]


# --- space ----------------------------------------------------------------------------------------


def test_space_is_asked_of_the_nearest_existing_folder(tmp_path, monkeypatch):
    asked = []

    def usage(folder: Path) -> Any:
        asked.append(folder)
        return shutil._ntuple_diskusage(10**9, 0, 5_000_000)  # type: ignore[attr-defined]

    monkeypatch.setattr("shutil.disk_usage", usage)
    check_space(Path("deep/er/out"), 5_000_000)
    assert asked == [tmp_path]
    with pytest.raises(OutputError, match=r"has 5 MB free; this run writes up to 6 MB"):
        check_space(Path("deep/er/out"), 6_000_000)
