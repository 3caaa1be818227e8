"""The terminal: parse, call, draw. Nothing is decided here.

commands     `lora-dpo` itself: train, recipe, and the list of the others
adapters, chat, clean, data, demo, docs, eval, export, init, merge, models, pairs, plan, serve, tune
             the other commands (`improve` is in pairs, `report` in eval)
help         the text of `--help`, as terminals show it
ready        what a command needs, before it loads anything
options      those that several commands share
views        events, printed in a terminal
data_views   what the doctor says, printed
learned      the pairs that disagree with what an adapter has learnt, printed
chat_loop    the terminal chat
model_check  what of a base model works here, without its weights
cleaning     what killed commands left behind
signals      Ctrl-C as a request to stop
crash        the report of an error that nobody foresaw
"""

from __future__ import annotations

from lora_dpo.cli.commands import app, main

__all__ = ["app", "main"]
