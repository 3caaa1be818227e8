"""A search for the best settings on the Train tab: its time, the candidates as they come, and the verdict.

Of a single training the two views are those of `train_view`.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

from lora_dpo.config.recipe import Recipe
from lora_dpo.data import read_pairs
from lora_dpo.demo import train_view
from lora_dpo.demo.html import folded, framed, note, progress_bar, samples_table, table
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.demo.run_state import RunSnapshot
from lora_dpo.demo.session import SEARCH_MINUTES, Training
from lora_dpo.demo.train_view import clock, phases
from lora_dpo.errors import ConfigError
from lora_dpo.training.drafting.presets import Draft, prompts_of
from lora_dpo.tuning import TuneResult
from lora_dpo.tuning.folder import PAGE
from lora_dpo.tuning.parts import FOR_TWO

PHASES = ("measuring the base", "trying candidates", "proving the choice")
MOST_MINUTES = 7 * 24 * 60
HOW_TO_READ = (
    "score = quality less what it cost: answers that do not end, repeat themselves, have another length, or lost what "
    "the base knew. The candidate with the best lower end of its 95% interval (at least) is chosen."
)


def search_controls() -> tuple[gr.Number, gr.Button]:
    """How long, and the one button."""
    with gr.Row(elem_classes="bar"):
        minutes = gr.Number(
            SEARCH_MINUTES,
            label="Minutes",
            minimum=1,
            maximum=MOST_MINUTES,
            precision=0,
            elem_id="train-minutes",
            scale=1,
            min_width=90,
        )
        find = gr.Button("Find the best settings", size="md", elem_id="train-find", scale=3, min_width=170)
    return minutes, find


def first_candidate(made: Draft) -> Recipe:
    """The run of the page with all of its pairs to train on: a search divides them by itself.

    Raises:
        ConfigError: there are too few prompts to choose between settings.
    """
    data = made.recipe.data
    sources = [*_listed(data.train), *_listed(data.eval)]
    prompts = prompts_of(read_pairs(sources)[0])
    if prompts < FOR_TWO:
        raise ConfigError(
            f"To choose between settings takes {FOR_TWO} different prompts, and these pairs have {prompts}. Start "
            "trains them with the settings as they are."
        )
    whole = data.model_copy(update={"train": sources, "eval": None})
    asked = made.recipe.evaluation.model_copy(
        update={"answers": 0, "show": 0}
    )  # of held-out prompts, which it has none of
    return made.recipe.model_copy(update={"data": whole, "evaluation": asked})


def _listed(sources: str | list[str] | None) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources or [])


def state_view(training: Training, now: float) -> str:
    """Where a run or a search is at the moment `now` (monotonic), or what came of it in words."""
    if training.watch.seen.minutes is None:
        return train_view.state_view(training, now)
    view, job = training.watch.seen, training.job
    took = clock((job.ended or now) - training.began - job.paused_seconds)
    if job.state == "stopped":
        return note("Stopped. Nothing was kept.") + _notes(view)
    if job.state == "failed":
        return note(f"It failed: {job.error} Chats and votes go on.", kind="bad") + _notes(view)
    if job.state == "done":
        return _verdict(job.found, job.name, took) + _notes(view, but=job.found.reason if job.found else "")
    words = {"paused": "paused at ", "stopping": "ending with what is there: "}
    stage = view.stage.replace("trial ", "candidate ") or "getting ready"
    counted = f": {view.done} of {view.total}" if view.total > 1 else ""
    line = f"{words.get(job.state, '')}{stage}{counted} · {took} of at most {clock(60 * (view.minutes or 0))}"
    return phases(PHASES, _phase(view.stage)) + progress_bar(view.done, view.total, line) + _notes(view)


def outcome_view(training: Training) -> str:
    """Of a run what was measured and answered. Of a search the candidates so far; at its end what the chosen one is
    worth, its answers, and the whole page."""
    view, shown = training.watch.seen, ""
    if view.minutes is None:
        return train_view.outcome_view(view) + samples_table(view)
    for one in view.tables:
        candidates = one.title == "candidates"  # whose last column says in words why one was ended early
        right = range(1, len(one.rows[0]) - candidates)
        shown += f"<h4>{escape(one.title[:1].upper() + one.title[1:])}</h4>" + table(
            one.rows[0], one.rows[1:], right=right
        )
        shown += note(HOW_TO_READ) if candidates else ""
    if view.answered:
        answers = table(("prompt", "base", "chosen"), view.answered)
        shown += "<h4>The same prompts, spread over that part and not picked</h4>" + answers
    return shown + (_page(training.job.found) if training.job.found else "")


def _phase(stage: str) -> int:
    who = stage.rpartition(", ")[2]
    if stage.startswith("reporting part") or who in ("default", "chosen"):
        return 2
    return 0 if not stage or who == "base" else 1


def _notes(view: RunSnapshot, but: str = "") -> str:
    """What was told on the way; not once more what is said above."""
    told = [one for one in view.notes if one.text != but]
    return "".join(note(one.text, kind="warn" if one.warning else "") for one in told)


def _verdict(found: TuneResult | None, name: str, took: str) -> str:
    if found is None:
        return ""
    if found.adapter is None:
        return note(f"Done after {took}, without an adapter. {found.reason}", kind="warn")
    return note(f"Done after {took}: {name} can be chosen in every tab. {found.reason}", kind="good")


def _page(found: TuneResult) -> str:
    """The search's own page, as it lies in its folder."""
    try:
        text = (found.folder / PAGE).read_text(encoding="utf-8")
    except OSError:  # removed meanwhile, or too few prompts for any candidate
        return ""
    for path in (found.adapter or Path(found.folder), Path(found.recipe.model.name)):
        text = text.replace(escape(str(path)), escape(without_paths(str(path))))
    return folded("The whole page of the search", framed(text, title="search"))
