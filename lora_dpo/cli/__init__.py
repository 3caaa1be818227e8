"""The terminal: parse, call, draw. Nothing is decided here.

commands     `lora-dpo` itself: train, chat, merge, models, recipe, and the groups of the others
adapters, clean, data, demo, eval, export, pairs, plan, serve
             the other commands (`improve` is in pairs, `report` in eval)
options      those that several commands share
views        events, printed in a terminal
data_views   what the doctor says, printed
chat_loop    the terminal chat
cleaning     what killed commands left behind
signals      Ctrl-C as a request to stop
crash        the report of an error that nobody foresaw
"""

from __future__ import annotations

from lora_dpo.cli.commands import app, main

__all__ = ["app", "main"]
