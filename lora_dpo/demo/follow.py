"""What is new, in every picker and table of a page, whoever made it: another visitor, a run, or a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from lora_dpo.adapters.package import BASE
from lora_dpo.demo import tab_adapters, tab_chat, tab_train, tab_vote
from lora_dpo.demo.handlers import PRIVATE, Given, Update, told
from lora_dpo.demo.html import win_table
from lora_dpo.demo.page_head import base_line, head_lines
from lora_dpo.demo.session import AppState
from lora_dpo.errors import AdapterError, LoraDPOError

LOOK_EVERY = 2.0
"""Seconds between two looks for adapters and pairs that are new."""


@dataclass(frozen=True)
class Followed:
    """The parts of a page that show what may be new."""

    head: gr.HTML
    chat: tab_chat.Parts
    vote: tab_vote.Parts
    files: gr.Dropdown
    train: tab_train.Parts
    adapters: tab_adapters.Parts


class Shown(NamedTuple):
    """What the pickers and tables of a page were last made from."""

    base: str = ""
    names: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    votes: Any = None


def follow(app_state: AppState, page: gr.Blocks, parts: Followed) -> None:
    """Look again and again, and put what is new into every picker."""
    known = gr.State(None)
    chosen: set[Any] = {known, parts.chat.left, parts.chat.right, parts.vote.players, parts.train.name}
    row, left, *_ = parts.train.left
    pickers: list[Any] = [parts.chat.left, parts.chat.right, parts.vote.players, parts.files, parts.train.sources]
    tables: list[Any] = [parts.head, parts.vote.wins, parts.train.name, row, left, parts.adapters.listed]
    outputs = [known, *pickers, *tables, parts.adapters.name]
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}

    def look(given: Given) -> Update:
        before = Shown(*given[known]) if given[known] else Shown()
        try:
            now = _now(app_state)
        except LoraDPOError:  # a base is being loaded, or there is none
            return {parts.head: head_lines(app_state), known: before._replace(base="")}
        return {known: now, **_new(app_state, parts, given, before, now)} if now != before else {known: gr.skip()}

    gr.Timer(LOOK_EVERY).tick(look, chosen, outputs, **quiet)
    page.load(look, chosen, outputs, **quiet)


def lead_to_chat(
    app_state: AppState,
    button: gr.Button,
    tabs: gr.Tabs,
    chat: tab_chat.Parts,
    adapter: gr.Dropdown | None,
    name_of: Callable[[Any], str | None],
) -> None:
    """Let a button lead to the Chat tab, with an adapter beside the base.

    Args:
        adapter: the picker that says which, if there is one.
        name_of: the adapter's name, given what is picked.
    """

    @told
    def go(picked: Any = None) -> Update:
        name, names = name_of(picked), app_state.names()
        if not name or name not in names:
            reason = app_state.host.incompatibility(name) if name else None
            raise AdapterError(reason or f"There is no adapter {name or 'chosen'} to chat with.")
        beside = gr.update(choices=[tab_chat.NOBODY, *names], value=name)
        return {tabs: gr.Tabs(selected="chat"), chat.left: gr.update(choices=names, value=BASE), chat.right: beside}

    outputs = [tabs, chat.left, chat.right]
    button.click(go, adapter, outputs, queue=False, show_progress="hidden", **PRIVATE)


def _now(app_state: AppState) -> Shown:
    names, pairs, adapters = app_state.names(), app_state.pairs.names(), app_state.adapters()
    left, votes = app_state.interrupted(), app_state.pairs.book.state()
    return Shown(base_line(app_state), tuple(names), tuple(pairs), tuple(adapters), tuple(left), votes)


def _new(app_state: AppState, parts: Followed, given: Given, before: Shown, now: Shown) -> Update:
    """Values for what is not as it was."""
    names, pairs, adapters = list(now.names), list(now.pairs), list(now.adapters)
    moved = set(adapters) != set(before.adapters)
    left, right, players = given[parts.chat.left], given[parts.chat.right], given[parts.vote.players]
    # Who is not here any more is chosen no longer; where there was nothing to choose, the first is chosen. One that is
    # on the disk and not among the names is being read, unless the base is another one.
    here = {*names, *(adapters if now.base == before.base else ())}
    stay = [name for name in players if name in here] or names[:2]
    found: Update = {
        parts.chat.left: _picker(names, None if left in here else BASE),
        parts.chat.right: _picker(
            [tab_chat.NOBODY, *names], None if right in (tab_chat.NOBODY, *here) else tab_chat.NOBODY
        ),
        parts.vote.players: _picker(names, None if stay == players else stay),
        parts.files: _picker(pairs, pairs[0] if pairs and not before.pairs else None),
        parts.train.sources: _picker(pairs, pairs[:1] if pairs and not before.pairs else None),
        parts.adapters.name: _picker(adapters, adapters[0] if adapters and not before.adapters else None),
    }
    if now.base != before.base:
        found[parts.head] = head_lines(app_state)
    if now.votes != before.votes:
        found[parts.vote.wins] = win_table(app_state.pairs.book.records())
    if moved and given[parts.train.name].strip() in (*adapters, ""):
        found[parts.train.name] = app_state.free_name()
    if now.left != before.left:
        found |= dict(zip(parts.train.left[:2], tab_train.interrupted_update(list(now.left)), strict=True))
    if moved:
        found[parts.adapters.listed] = tab_adapters.adapters_table(app_state)
    return found


def _picker(choices: list[str], value: Any) -> Any:
    """Other choices, and with a value another one chosen."""
    return gr.update(choices=choices) if value is None else gr.update(choices=choices, value=value)
