"""Named endpoints for scripts (`gradio_client`): the same verbs as the page, with the same checks.

Functions are longer than 60 lines where they hold all endpoints of a kind, each a few lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import gradio as gr
from gradio.events import api as endpoint

from lora_dpo.adapters.describe import describe
from lora_dpo.adapters.exchange import install
from lora_dpo.adapters.store import list_adapters
from lora_dpo.config.column_names import parse_columns
from lora_dpo.data import Message
from lora_dpo.demo import downloads
from lora_dpo.demo.conversation import ask, conversation_of
from lora_dpo.demo.handlers import client_of, sampling_of, told, typed
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.demo.search_view import first_candidate
from lora_dpo.demo.session import SEARCH_MINUTES, AppState
from lora_dpo.demo.steering import end, pause
from lora_dpo.demo.tab_train import drafted
from lora_dpo.training.drafting.presets import settings_text
from lora_dpo.training.planning.make_plan import plan


def add(app_state: AppState, *, public: bool = False) -> None:
    """Define the endpoints; call it inside the app's block.

    Args:
        public: those to chat and vote alone.
    """
    verbs = [_answering(app_state)]
    if not public:
        verbs += [_pairs(app_state), _training(app_state), _adapters(app_state)]
    for function in (function for functions in verbs for function in functions):
        endpoint(told(typed(function)), api_name=function.__name__, concurrency_limit=None)
    if not public:
        _files(app_state)


def _answering(app_state: AppState) -> list[Any]:
    def models() -> list[str]:
        """Who can answer: base, then every adapter that fits it."""
        return app_state.names()

    def chat(
        message: str,
        model: str = "base",
        system: str = "",
        temperature: float = 0.7,
        top_p: float = 0.95,
        max_new_tokens: int = 256,
        seed: int = 0,
        history: list[dict[str, str]] | None = None,
        request: gr.Request | None = None,
    ) -> Iterator[str]:
        """One answer to one message, after the messages of `history` if there are any, as it grows."""
        sampling = sampling_of(temperature, top_p, max_new_tokens, seed)
        conversation = conversation_of(history or [])
        for exchange in ask(
            app_state.host, conversation, message, [model], sampling, system=system, client=client_of(request)
        ):
            said = exchange.answers[0]
            yield said.text if said else ""

    def compare(
        message: str,
        left: str,
        right: str = "base",
        system: str = "",
        temperature: float = 0.7,
        top_p: float = 0.95,
        max_new_tokens: int = 256,
        seed: int = 0,
        history: list[dict[str, str]] | None = None,
        request: gr.Request | None = None,
    ) -> dict[str, Any]:
        """Two models on the same message, history and seed, with counts and speed."""
        conversation = conversation_of(history or [])
        sampling = sampling_of(temperature, top_p, max_new_tokens, seed)
        for _ in ask(
            app_state.host, conversation, message, [left, right], sampling, system=system, client=client_of(request)
        ):
            pass
        answers = conversation.exchanges[-1].answers if conversation.exchanges else [None, None]
        return {side: asdict(said) if said else None for side, said in zip(("left", "right"), answers, strict=True)}

    def match(
        prompt: str,
        players: list[str],
        temperature: float = 0.8,
        max_new_tokens: int = 160,
        system: str = "",
        request: gr.Request | None = None,
    ) -> dict[str, str]:
        """Two answers without names, to vote on by the match's id."""
        sampling = sampling_of(temperature, 0.95, max_new_tokens, 0)
        before = [Message(role="system", content=system)] if system.strip() else []
        drawn = app_state.arena.draw([*before, Message(role="user", content=prompt)], players, sampling)
        for _ in app_state.arena.answers(drawn, client=client_of(request)):
            pass
        a, b = (said.text if said else "" for said in drawn.answers)
        return {"id": drawn.id, "a": a, "b": b}

    def vote(match_id: str, verdict: str) -> dict[str, Any]:
        """Vote a, b, both good, both bad or skip. When this returns, the vote is on the disk; names are told."""
        done = app_state.arena.vote(match_id, verdict)
        pairs, others = app_state.pairs.book.count()
        return {"a": done.players[0], "b": done.players[1], "pairs": pairs, "others": others}

    def standings() -> list[dict[str, Any]]:
        """How each model did against each other one, with 95% intervals of the win rate."""
        return [
            {**asdict(record), "rate": record.rate, "interval": list(record.interval)}
            for record in app_state.pairs.book.records()
        ]

    return [models, chat, compare, match, vote, standings]


def _pairs(app_state: AppState) -> list[Any]:
    def pairs(name: str = "votes", search: str = "") -> list[dict[str, Any]]:
        """The pairs of a file, with the line and mark that a change names."""
        names = ("line", "mark", "prompt", "chosen", "rejected")
        found = app_state.pairs.entries(name, search)
        return [dict(zip(names, (entry.line, entry.mark, *entry.texts), strict=True)) for entry in found]

    def check_pairs(name: str = "votes") -> dict[str, Any]:
        """What the doctor says about a file."""
        found = app_state.pairs.diagnose(name, app_state.tokenizer)
        return found.as_json() if found else {}

    def change_pair(name: str, line: int, mark: str, prompt: str, chosen: str, rejected: str) -> str:
        """Write other words for a pair."""
        app_state.pairs.change(
            name, app_state.pairs.entry(name, line, mark), prompt=prompt, chosen=chosen, rejected=rejected
        )
        return "changed"

    def delete_pair(name: str, line: int, mark: str) -> str:
        """Take a pair out."""
        app_state.pairs.delete(name, [app_state.pairs.entry(name, line, mark)])
        return "deleted"

    return [pairs, check_pairs, change_pair, delete_pair]


def _training(app_state: AppState) -> list[Any]:
    def plan_training(pairs: list[str], name: str, preset: str = "balanced", settings: str = "") -> dict[str, Any]:
        """The settings and the plan of a run, before it starts. `settings` is YAML that changes the preset's."""
        recipe = drafted(app_state, pairs, preset, name, settings).recipe
        return {"settings": settings_text(recipe), "plan": plan(recipe).to_json()}

    def train(
        pairs: list[str], name: str, preset: str = "balanced", settings: str = "", prompts: list[str] | None = None
    ) -> str:
        """Start a run on the base in memory; `training` says how it goes."""
        recipe = drafted(app_state, pairs, preset, name, settings).recipe
        app_state.start_training(recipe, name.strip(), prompts or [])
        return "started"

    def find_settings(
        pairs: list[str], name: str, minutes: float = SEARCH_MINUTES, preset: str = "balanced", settings: str = ""
    ) -> str:
        """Search so long for the best settings on the base in memory; `training` says how it goes."""
        recipe = first_candidate(drafted(app_state, pairs, preset, name, settings))
        app_state.start_search(recipe, name.strip(), minutes)
        return "started"

    def interrupted() -> list[str]:
        """Runs and searches that were cut off and can go on."""
        return app_state.interrupted()

    def continue_training(name: str, prompts: list[str] | None = None, minutes: float = SEARCH_MINUTES) -> str:
        """Go on with an interrupted run or search; `training` says how it goes."""
        app_state.continue_training(name, prompts or [], minutes)
        return "started"

    def discard_training(name: str) -> str:
        """Remove what an interrupted run or search left."""
        app_state.discard_training(name)
        return "discarded"

    def training() -> dict[str, Any]:
        """How the run goes that was started last."""
        now = app_state.training
        if now is None:
            return {"state": "none"}
        seen = now.watch.seen
        return {
            "name": now.job.name,
            "state": now.job.state,
            "error": without_paths(now.job.error) if now.job.error else None,
            "stage": seen.stage,
            "step": seen.step,
            "steps": seen.all_steps,
            "metrics": dict(seen.steps[-1][1]) if seen.steps else {},
            "compared": [list(row) for row in seen.compared],
            "samples": [asdict(sample) for sample in seen.samples],
            "tables": {one.title: [list(row) for row in one.rows] for one in seen.tables},
            "verdict": now.job.found.reason if now.job.found else None,
        }

    def pause_training(paused: bool = True) -> str:
        """Pause the run, or let it go on."""
        pause(app_state, paused=paused)
        return app_state.training.job.state if app_state.training else "none"

    def stop_training(keep: bool = True) -> str:
        """Stop the run after its present step, and keep the adapter or not."""
        end(app_state, keep=keep)
        return app_state.training.job.state if app_state.training else "none"

    begun = [plan_training, train, find_settings, training, pause_training, stop_training]
    return [*begun, interrupted, continue_training, discard_training]


def _adapters(app_state: AppState) -> list[Any]:
    def adapters() -> list[dict[str, Any]]:
        """The table of adapters."""
        return [asdict(row) for row in list_adapters(app_state.adapters_dir)]

    def passport(name: str) -> dict[str, str]:
        """What an adapter was made from."""
        return dict(describe(app_state.find(name)))

    return [adapters, passport]


def _files(app_state: AppState) -> None:
    """Endpoints that take or give a file: Gradio moves files only through components, so there are hidden ones."""

    def upload_pairs(path: str, columns: str = "") -> str:
        named = parse_columns(columns) if columns.strip() else None
        return app_state.pairs.take_in(Path(path), Path(path).name, app_state.tokenizer, named).name

    def export_pairs(name: str) -> str:
        return str(downloads.exported_pairs(app_state, name))

    def pack(name: str) -> str:
        return str(downloads.packed(app_state, name))

    def install_package(path: str) -> str:
        return install(path, root=app_state.adapters_dir).folder.name

    def export_adapter(name: str, form: str) -> tuple[str, str | None]:
        target = [place for _, _, place in downloads.exported(app_state, name, form)][-1]
        return str(target), str(target) if target.is_file() else None

    with gr.Column(visible=False):
        name, form = gr.Textbox(label="name"), gr.Textbox("gguf-adapter", label="form")
        columns = gr.Textbox("", label="columns")
        given, made, place = gr.File(label="package"), gr.File(label="file"), gr.Textbox(label="place")
        button = cast(Any, gr.Button())
        button.click(told(typed(upload_pairs)), [given, columns], place, api_name="upload_pairs")
        button.click(told(typed(export_pairs)), name, made, api_name="export_pairs")
        button.click(told(typed(pack)), name, made, api_name="pack")
        button.click(told(typed(install_package)), given, place, api_name="install")
        button.click(told(typed(export_adapter)), [name, form], [place, made], api_name="export_adapter")
