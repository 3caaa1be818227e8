"""Prompts to begin with: three to chat about, and twenty to vote on. All of them are ours."""

from __future__ import annotations

from lora_dpo.data import Message
from lora_dpo.data.prompts import Prompt
from lora_dpo.demo.votes import VoteLog

EXAMPLES = ("What is the opposite of wet?", "What is the capital of Portugal?", "What is a mortgage?")
"""Prompts that show what the quickstart's adapter learnt, to answer completely in few words; it was not trained on
them. With the page's settings the base took 52, 37 and 256 tokens (cut there), the adapter 7, 7 and 38."""

OURS = "starters"
"""Where these prompts come from, as a vote's origin says it."""

STARTERS = (
    "How do I peel a mango?",
    "Why do we blush?",
    "What is a comet?",
    "Name three trees.",
    "Give me a tip for a long drive.",
    "Can I wash jeans with towels?",
    "Explain what a mayor does.",
    "What should I do if my key breaks in the lock?",
    "Write a one-sentence story about a lighthouse.",
    "Is it bad to skip lunch?",
    "How do I make a fruit salad?",
    "Why do clocks have twelve hours?",
    "What is a thesaurus?",
    "Describe a thunderstorm in one sentence.",
    "Suggest a name for a goldfish.",
    "Give me one reason to learn to cook.",
    "Explain how a zipper works.",
    "What should I write on a postcard?",
    "How do I get a splinter out?",
    "Tell me a fun fact about snails.",
)
"""Short questions of everyday life. None is in the quickstart's data, so its adapter was not trained on any, and what
is trained on them may be measured there."""


def starters(book: VoteLog) -> list[Prompt]:
    """Those of ours that have no vote yet, in their order."""
    prompts = (row.get("prompt") for row in book.rows())
    asked = {turns[-1].get("content") for turns in prompts if isinstance(turns, list) and turns and _is_turn(turns[-1])}
    return [
        Prompt((Message(role="user", content=text),), OURS, number)
        for number, text in enumerate(STARTERS, start=1)
        if text not in asked
    ]


def _is_turn(said: object) -> bool:
    return isinstance(said, dict)
