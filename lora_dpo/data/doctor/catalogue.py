"""What the doctor's findings are: what each does to DPO, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with preference data."""

    name: str
    severity: Severity
    title: str
    meaning: str
    """What it does to DPO."""
    advice: str
    """What to do."""
    removes: bool = False
    """True if `--fix` takes such rows out. Rows that are no pairs are always out."""


_CHECKS = (
    Check(
        "unreadable",
        "error",
        "rows that are no object, or not whole",
        "A run stops at the first of them.",
        "Repair or remove these rows.",
        removes=True,
    ),
    Check(
        "malformed",
        "error",
        "rows with missing or malformed fields",
        "They are left out of training; many of them mean that the format was not recognised.",
        "Compare the columns with those of: lora-dpo docs data; name them with --columns, or the format with --format.",
        removes=True,
    ),
    Check(
        "empty",
        "error",
        "empty prompts or answers",
        "They are left out; an empty answer would teach to stop at once.",
        "Fill or remove them.",
        removes=True,
    ),
    Check(
        "equal",
        "error",
        "chosen equals rejected",
        "The margin is always 0 and so is the gradient: a step that teaches nothing.",
        "Remove them, and look for a bug where the pairs were made.",
        removes=True,
    ),
    Check(
        "prefix",
        "error",
        "the prompt is not a shared prefix",
        "The two answers follow different prompts, so their log-probabilities cannot be compared.",
        "Give both answers the same conversation, up to the first answer that differs.",
        removes=True,
    ),
    Check(
        "roles",
        "error",
        "roles out of order",
        "Many chat templates refuse such a conversation; others write something the model never saw.",
        "Order turns as system, user, assistant, user, assistant; join two turns of one role.",
        removes=True,
    ),
    Check(
        "tie",
        "warning",
        "ties, small gaps, or scores against the labels",
        "A pair whose scores do not prefer the chosen answer is noise; it is left out.",
        "Judge them again, or leave them out.",
        removes=True,
    ),
    Check(
        "vote",
        "warning",
        "votes without an opposite vote",
        "DPO needs two answers to one prompt; a vote alone is left out.",
        "Collect a second answer to these prompts, or train them with a loss for single votes such as KTO.",
        removes=True,
    ),
    Check(
        "contradiction",
        "error",
        "contradictions: A over B here, B over A there",
        "The two pull in opposite directions and cancel; what is left is noise.",
        "Decide for one of them. If people disagree, see 'label noise' below.",
        removes=True,
    ),
    Check(
        "duplicate",
        "warning",
        "exact duplicates of an earlier pair",
        "The pair is seen more often than the others in each pass, and is overfitted first.",
        "Keep one of them; --fix does.",
        removes=True,
    ),
    Check(
        "near-duplicate",
        "warning",
        "near duplicates of an earlier pair",
        "Almost the same as a duplicate: such pairs weigh more than others.",
        "Look at a few; remove those that add nothing.",
    ),
    Check(
        "leak",
        "error",
        "prompts that are also in the held-out data",
        "What is measured on held-out data will flatter.",
        "Remove them from one of the two; lora-dpo data split keeps prompts apart.",
        removes=True,
    ),
    Check(
        "double-bos",
        "error",
        "a beginning-of-text token written in the text",
        "The chat template writes it too: the model reads it twice, which it never saw in training.",
        "Remove the token from the text.",
        removes=True,
    ),
    Check(
        "leftover",
        "error",
        "chat template leftovers inside the text",
        "A token such as <|im_start|> inside a text ends or opens a turn, so the model learns to write other turns.",
        "Split the text into messages, or remove the tokens.",
        removes=True,
    ),
    Check(
        "lost-end",
        "warning",
        "answers that lost their end",
        "A chosen answer that stops in mid-sentence, or without the end-of-turn token that the others have, teaches to "
        "ramble on or to break off. Where the rejected one stops so, its end alone tells the two apart, and the pair "
        "says little about the rest.",
        "Make these answers again with a larger limit of tokens, or remove them.",
    ),
    Check(
        "refusal",
        "warning",
        "a refusal preferred over an answer",
        "DPO amplifies it: the model refuses more, also where it should not.",
        "Keep those that you mean; remove the others.",
    ),
    Check(
        "mojibake",
        "warning",
        "damaged encoding (mojibake)",
        "If only one side is damaged, the pair teaches the damage or its absence and nothing else.",
        "Read the source again with the right encoding (usually UTF-8).",
    ),
    Check(
        "language",
        "warning",
        "the chosen answer is in another language than the prompt",
        "The model may learn to change the language.",
        "Keep translations; remove the others.",
    ),
    Check(
        "length-bias",
        "warning",
        "length alone predicts the preference",
        "DPO takes the shortest way to the margin: it learns the length instead of the quality.",
        "Add pairs where it is the other way round; trainer.ld_alpha below 1 discounts what one answer is longer by.",
    ),
    Check(
        "same-after-cut",
        "error",
        "pairs that are the same after truncation",
        "They are left out: what told the answers apart was cut off.",
        "Raise trainer.max_length.",
        removes=True,
    ),
    Check(
        "prompt-fills",
        "error",
        "prompts that fill max_length alone",
        "They are left out: there is no room for an answer.",
        "Raise trainer.max_length.",
        removes=True,
    ),
    Check(
        "template",
        "error",
        "conversations that the chat template refuses",
        "A run stops at the first of them.",
        "Do what the template's own words say; often it wants no system turn, or user and assistant in turn.",
        removes=True,
    ),
    Check(
        "left-out",
        "warning",
        "answers of which the chat template leaves out a part",
        "The model is trained on what the template writes alone: reasoning before an answer, or a call, is gone.",
        "Take a template that writes it whole, or take it out of the answers yourself.",
    ),
    Check(
        "other-start",
        "warning",
        "answers that do not follow what a chat asks for them with",
        "A chat's prompt ends with something, such as <think>, that no trained answer follows: the model answers there "
        "from where it was never trained.",
        "Take a template that writes both alike, or begin the answers with it.",
    ),
    Check(
        "cut",
        "warning",
        "answers cut by max_length: their end-of-turn token is gone",
        "The model learns answers that never end.",
        "Raise trainer.max_length, or remove the longest pairs.",
    ),
)

CHECKS = {check.name: check for check in _CHECKS}
