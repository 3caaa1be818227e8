"""Who answers, in a few words: the base, and what an adapter was made from."""

from __future__ import annotations

from html import escape

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.describe import metrics_after
from lora_dpo.adapters.package import BASE
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.demo.session import AppState
from lora_dpo.errors import LoraDPOError
from lora_dpo.model.stored_form import held_text
from lora_dpo.text import counted, plain

WAY = (
    ("chat", "Chat", "Ask the base and an adapter the same, side by side."),
    ("vote", "Vote", "Two answers without names: you choose the better one. Each vote is a pair to train on."),
    ("train", "Train", "An adapter learns from your votes, on this machine. Chats go on meanwhile."),
    ("compare", "Chat", "The new adapter beside the base; or vote between them, blind, to know whether it is better."),
)
"""The way through the page: a word, the tab it leads to, and what happens there."""


def way(*, public: bool) -> str:
    """`1 chat · 2 vote · 3 train · 4 compare`: each leads to its tab, and says on hover what it is."""
    steps = [
        f'<a role="button" tabindex="0" data-tab="{tab}" title="{escape(what)}"><b>{number}</b> {word}</a>'
        for number, (word, tab, what) in enumerate(WAY[:2] if public else WAY, start=1)
    ]
    return f'<nav id="way" aria-label="the way through this page">{" · ".join(steps)}</nav>'


def who_line(app_state: AppState, name: str, *, public: bool) -> str:
    """A model's name with a few words; more of them on hover."""
    short, long = _about(app_state, name, public=public)
    return f'<p class="who" title="{escape(without_paths(long))}"><b>{escape(name)}</b> {escape(short)}</p>'


def _about(app_state: AppState, name: str, *, public: bool) -> tuple[str, str]:
    base = app_state.host.base
    held = held_text(base.quantize, base.kept_share)
    if name == BASE:
        return (
            "the model as it is",
            f"{base.name}, {held}, with no adapter on it. Every adapter here is a small change to it.",
        )
    short, long = "an adapter on that model", "A small change to the base, learnt from preferences."
    if public:
        return short, long
    try:
        passport = open_adapter(app_state.find(name)).passport
    except LoraDPOError:
        return short, long
    trained = passport.data.get("train") if passport else None
    rows = trained.get("pairs") if isinstance(trained, dict) else None
    measured = metrics_after(passport).get("pairs", {}) if passport else {}
    accuracy, count = measured.get("accuracy"), measured.get("pairs")
    if isinstance(rows, int):
        short = f"an adapter, learnt from {counted(rows, 'pair')}"
    if isinstance(accuracy, int | float) and 0 <= accuracy <= 1 and isinstance(count, int):
        long += f" It raises the chosen answer more than the rejected one in {accuracy:.0%} of {count} held-out pairs."
    return short, long + (f" Made {plain(passport.created[:10])}." if passport else "")
