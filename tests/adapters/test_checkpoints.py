"""A checkpoint counts when all of it is there; it is made by time as well, and nothing before it is lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_dpo.adapters.checkpoints import MOST_SECONDS, begin, checkpoint_callback, checkpoints, newest_whole, seal
from lora_dpo.adapters.run_folder import RunLog, open_run, partial_of, release
from lora_dpo.config.reading import check_recipe, read_recipe
from lora_dpo.config.trl_dpo import trainer_settings
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.events import Note, Progress, Stopped, StopSignal
from lora_dpo.training.run import train

PARTIAL = Path("out.partial")


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def written(step, *, whole=True):
    """A checkpoint as a run that goes on writes it, without its manifest if it was cut off."""
    folder = PARTIAL / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"moments")
    if whole:
        seal(folder, num_tokens=10 * step)
    return folder


def names(paths):
    return [path.name for path in paths]


# --- when it counts -------------------------------------------------------------------------------


def test_a_checkpoint_without_its_manifest_is_none():
    begin(PARTIAL, None)
    written(1)
    written(2, whole=False)
    assert names(checkpoints(PARTIAL)) == ["checkpoint-1"]
    assert newest_whole(PARTIAL) == (
        PARTIAL / "checkpoints/checkpoint-1",
        ["checkpoint-2 is not whole (it has no manifest.json)"],
    )


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "optimizer.pt is missing"),
        (lambda path: path.write_bytes(b"mom"), "optimizer.pt has 3 bytes instead of 7"),
        (lambda path: path.write_bytes(b"MOMENTS"), "optimizer.pt is damaged"),
        (lambda path: (path.parent / "manifest.json").write_text('{"files": '), "manifest.json cannot be read"),
        (lambda path: (path.parent / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: (path.parent / "manifest.json").write_text('{"files": {}}'), "trainer_state.json is missing"),
    ],
    ids=["missing", "cut", "changed", "broken-manifest", "odd-manifest", "empty-manifest"],
)
def test_of_checkpoints_the_newest_whole_one_is_gone_on_from_and_others_are_named(harm, said):
    recipe = check_recipe({"model": {"name": "m"}, "data": {"train": "a.jsonl"}})
    open_run(recipe, Path("out"), resume=False)
    release(PARTIAL)
    written(1)
    harm(written(2) / "optimizer.pt")
    told = []
    assert open_run(recipe, Path("out"), resume=True, say=told.append) == PARTIAL / "checkpoints/checkpoint-1"
    release(PARTIAL)
    [text] = told
    assert f"checkpoint-2 is not whole ({said}" in text
    assert text.endswith("going on from checkpoint-1.")
    assert names(checkpoints(PARTIAL)) == ["checkpoint-1"]
    assert not (PARTIAL / "checkpoints/checkpoint-2").exists()  # the run will write another one there


def test_a_run_with_damaged_checkpoints_alone_is_not_resumed():
    recipe = check_recipe({"model": {"name": "m"}, "data": {"train": "a.jsonl"}})
    open_run(recipe, Path("out"), resume=False)
    release(PARTIAL)
    (written(1) / "optimizer.pt").write_bytes(b"MOMENTS")
    with pytest.raises(OutputError, match=r"No checkpoint in out.partial is whole: .*optimizer.pt is damaged.*Remove"):
        open_run(recipe, Path("out"), resume=True)
    assert list(PARTIAL.glob("running.*")) == []


def test_a_checkpoint_that_no_run_could_go_on_from_is_not_asked_for():
    recipe = check_recipe({"model": {"name": "m"}, "data": {"train": "a"}, "trainer": {"save_only_model": True}})
    with pytest.raises(ConfigError, match="save_only_model"):
        trainer_settings(recipe)


# --- when it is made ------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def keeper(clock, *, limit=None, strategy="steps"):
    log = RunLog(PARTIAL / "metrics.jsonl", from_step=-1)
    args = SimpleNamespace(save_total_limit=limit, save_strategy=strategy, output_dir=str(PARTIAL / "checkpoints"))
    found = checkpoint_callback(SimpleNamespace(args=args, _total_train_tokens=7), log.sync, clock=clock)
    found.on_train_begin(args, None, None)

    def step(number, best=None):
        control = SimpleNamespace(should_save=False)
        state = SimpleNamespace(global_step=number, best_model_checkpoint=best)
        found.on_step_end(args, state, control)
        if control.should_save:
            written(number, whole=False)
            found.on_save(args, state, control)
        return control.should_save

    return args, step


def test_checkpoints_are_made_by_time_too():
    begin(PARTIAL, None)
    clock = Clock()
    _, step = keeper(clock)
    assert not step(1)
    clock.now += MOST_SECONDS - 1
    assert not step(2)
    clock.now += 1
    assert step(3)
    assert not step(4)  # it counts from the last one
    clock.now += MOST_SECONDS
    assert step(5)
    assert names(checkpoints(PARTIAL)) == ["checkpoint-3", "checkpoint-5"]


def test_who_wants_no_checkpoints_gets_none_by_time():
    begin(PARTIAL, None)
    clock = Clock()
    _, step = keeper(clock, strategy="no")
    clock.now += 10 * MOST_SECONDS
    assert not step(1)


@pytest.mark.parametrize(("limit", "left"), [(1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (None, [1, 2, 3]), (0, [1, 2, 3])])
def test_old_checkpoints_go_when_the_new_one_counts(limit, left, monkeypatch):
    begin(PARTIAL, None)
    clock = Clock()
    args, step = keeper(clock, limit=limit)
    assert args.save_total_limit is None  # transformers would remove them before the new one counts
    for number in (1, 2, 3):
        clock.now += MOST_SECONDS
        step(number)
    assert names(checkpoints(PARTIAL)) == [f"checkpoint-{number}" for number in left]


def test_the_best_checkpoint_of_the_trainer_stays():
    begin(PARTIAL, None)
    clock = Clock()
    _, step = keeper(clock, limit=2)
    for number in (1, 2, 3, 4):
        clock.now += MOST_SECONDS
        step(number, best="elsewhere/checkpoint-1")
    assert names(checkpoints(PARTIAL)) == ["checkpoint-1", "checkpoint-4"]


def test_a_checkpoint_that_cannot_be_sealed_costs_no_earlier_one(monkeypatch):
    begin(PARTIAL, None)
    clock = Clock()
    _, step = keeper(clock, limit=1)
    clock.now += MOST_SECONDS
    step(1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_dpo.adapters.checkpoints.sync", full)
    clock.now += MOST_SECONDS
    with pytest.raises(OSError, match="No space"):
        step(2)
    assert names(checkpoints(PARTIAL)) == ["checkpoint-1"]


# --- with a real run ------------------------------------------------------------------------------


@pytest.fixture
def recipe(recipe_dict):
    return check_recipe(recipe_dict(output="out", trainer={"max_steps": 4}))


def cut(recipe, at, **arguments):
    """Stop a run after a step; returns its unfinished folder."""
    stop = StopSignal()

    def listen(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == at:
            stop.requested = True

    with pytest.raises(Stopped):
        train(recipe, on_event=listen, stop=stop, **arguments)
    return partial_of(Path(recipe.output))


def rows(folder):
    timed = ("runtime", "per_second", "seconds")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in timed)} for row in found]


def same_run(folder, whole):
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert rows(folder) == rows(whole)


def test_a_resumed_run_has_every_row_of_an_uninterrupted_one(recipe, monkeypatch):
    whole = train(recipe.model_copy(update={"output": "whole"})).folder
    assert [row["num_tokens"] for row in rows(whole) if "num_tokens" in row]
    monkeypatch.setattr("lora_dpo.adapters.checkpoints.MOST_SECONDS", 0.0)  # after every step
    seen = []
    partial = cut(recipe, 3, look=lambda step, total, model: seen.append(names(checkpoints(PARTIAL))))
    assert seen[2:4] == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]  # looked at before the step is saved
    shutil.copytree(partial, "legacy.partial")
    same_run(train(recipe, resume=True).folder, whole)

    # as it was before there were manifests
    old = read_recipe(Path("legacy.partial/recipe.yaml"), ["output=legacy"])
    begun = Path("legacy.partial/recipe.yaml")
    begun.write_text(begun.read_text().replace("output: out", "output: legacy"))
    for name in ("every-checkpoint-has-a-manifest", *(f"checkpoint-{step}/manifest.json" for step in (2, 3))):
        (Path("legacy.partial/checkpoints") / name).unlink()
    for path in sorted(path for path in Path("legacy.partial/checkpoints/checkpoint-3").iterdir() if path.is_file()):
        needed = path.name in (
            "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
            "trainer_state.json", "health.json", "health.safetensors",
        )  # fmt: skip
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        found, complaints = newest_whole(Path("legacy.partial"))
        assert found.name == ("checkpoint-2" if needed else "checkpoint-3"), path.name
        assert complaints == ([f"checkpoint-3 is not whole ({path.name} is damaged)"] if needed else [])
        path.unlink()
        assert newest_whole(Path("legacy.partial"))[0].name == ("checkpoint-2" if needed else "checkpoint-3"), path.name
        path.write_bytes(content)
    same_run(train(old, resume=True).folder, whole)


def test_a_full_disk_at_a_checkpoint_is_a_sentence_that_says_how_to_go_on(recipe, monkeypatch):
    monkeypatch.setattr("lora_dpo.adapters.checkpoints.MOST_SECONDS", 0.0)
    real, calls = torch.save, []

    def full(thing, path, *args, **kwargs):
        calls.append(path)
        if "checkpoint-2" in str(path) and "optimizer" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:862] . unexpected pos 64 vs 0")
        return real(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError) as caught:
        train(recipe)
    assert calls
    said = str(caught.value)
    assert "Cannot write out: No space left on device. Free some space" in said
    assert said.endswith("go on from it with: lora-dpo train out.partial/recipe.yaml --resume")
    assert sorted(path.name for path in (PARTIAL / "checkpoints").glob("checkpoint-*")) == ["checkpoint-1"]
    monkeypatch.setattr(torch, "save", real)
    assert train(recipe, resume=True).folder.is_dir()


def test_memory_that_runs_out_is_a_sentence(recipe, monkeypatch):
    from lora_dpo.errors import ModelError
    from lora_dpo.training.dpo_trainer import DPOTrainer

    def greedy(self, *args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(DPOTrainer, "training_step", greedy)
    with pytest.raises(ModelError, match="Memory ran out"):
        train(recipe)
    assert not PARTIAL.exists()


def test_a_damaged_checkpoint_is_told_of_as_a_warning(recipe, monkeypatch):
    monkeypatch.setattr("lora_dpo.adapters.checkpoints.MOST_SECONDS", 0.0)
    partial = cut(recipe, 3)
    (partial / "checkpoints/checkpoint-3/optimizer.pt").unlink()
    told = []
    train(recipe, resume=True, on_event=lambda event: told.append(event) if isinstance(event, Note) else None)
    assert any(note.warning and "checkpoint-3 is not whole" in note.text for note in told)


class Runs:
    """What makes a folder wherever it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def test_a_state_that_is_none_is_named_and_nothing_in_it_is_run(recipe, monkeypatch):
    [checkpoint] = checkpoints(cut(recipe, 2))
    monkeypatch.setattr("lora_dpo.training.policy.load_recipe_base", None)  # it is said before the base is loaded
    for name, content in (
        ("optimizer.pt", pickle.dumps(Runs())),
        ("scheduler.pt", saved({"last_epoch": Runs()})),
        ("rng_state.pth", saved({"python": Runs()})),
        ("optimizer.pt", saved([])),
        ("optimizer.pt", b""),
        ("optimizer.pt", b"PK" + bytes(100)),
    ):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint)
        with pytest.raises(OutputError, match=f"checkpoint-2/{name} is damaged, or a pickle that holds more than"):
            train(recipe, resume=True)
        assert not Path("it-ran").exists()
        assert list(PARTIAL.glob("running.*")) == []
        (checkpoint / name).write_bytes(whole)


def test_the_space_that_is_asked_for_holds_every_checkpoint(recipe_dict, tokenizer, tiny_model_folder, monkeypatch):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model_folder, "fat")
    fat = AutoTokenizer.from_pretrained("fat")
    fat.add_tokens([f"{number}-word-of-a-large-vocabulary" for number in range(8_000)])
    fat.save_pretrained("fat")
    asked = []
    monkeypatch.setattr("lora_dpo.training.prepare.check_space", lambda output, needed: asked.append(needed))
    monkeypatch.setattr("lora_dpo.adapters.checkpoints.MOST_SECONDS", 0.0)
    settings = recipe_dict(output="out", trainer={"max_steps": 4}, model={"name": "fat"})
    partial = cut(check_recipe(settings), 3)
    used = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    assert len(checkpoints(partial)) == 2
    assert used > 3_000_000
    assert used < asked[0] < 3 * used
