"""What a recipe that was written for a person's pairs says of itself: its head, and why each setting is so."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.text import counted
from lora_dpo.training.drafting.lengths import Lengths
from lora_dpo.training.drafting.presets import SIZES


@dataclass(frozen=True)
class Facts:
    """The pairs, and what was chosen for them."""

    source: str
    path: Path
    model: str
    preset: str
    pairs: int
    prompts: int
    """Different ones."""
    train: int
    """Pairs that are trained on."""
    held_out: int
    """Different prompts of the data that are not."""
    lengths: Lengths
    parameters: int | None
    """Of the base; None if nobody has looked."""
    has_held_out: bool
    """Whether anything is measured on held-out pairs, also on those of a file of their own."""
    trainer: dict[str, Any]
    """What was chosen, before anybody changed it."""
    given: tuple[str, ...] = ()
    """Dotted keys that were given on the command line."""
    fitted: tuple[str, ...] = ()
    """Dotted keys that are as they are so that the run fits into memory."""

    @property
    def run_line(self) -> str:
        """`36 steps of 4 pairs (3.0 passes over 48 pairs)`."""
        steps, size = self.trainer["max_steps"], self.trainer["per_device_train_batch_size"]
        passes = f"{steps * size / self.train:.1f} passes over {counted(self.train, 'pair')}"
        return f"{counted(steps, 'step')} of {size} pairs ({passes})"

    @property
    def length_line(self) -> str:
        """How long the longest pair is, and who says so."""
        how = f"by the tokenizer of {self.model}" if self.lengths.measured else "estimated from their text"
        return f"the longest prompt and answer have {self.lengths.longest:,} tokens ({how})"


def head(facts: Facts) -> Iterator[str]:
    """The first lines: what this is, and the commands that go with it."""
    recipe, data = shlex.quote(str(facts.path)), shlex.quote(facts.source)
    yield f"{facts.model}, preference-tuned on {facts.source}."
    yield ""
    commands = {
        f"lora-dpo train {recipe}": f"makes adapters/{facts.path.stem}",
        f"lora-dpo train {recipe} trainer.beta=0.3": "any setting, for one run",
        f"lora-dpo plan {recipe}": "before it: memory and time",
        f"lora-dpo data check {data}": "what in the pairs would spoil it",
    }
    width = max(map(len, commands))
    yield from (f"  {command:<{width}}   {text}" for command, text in commands.items())
    yield ""
    yield (
        f"Written by lora-dpo init, preset {facts.preset}, for {counted(facts.pairs, 'pair')} with "
        f"{counted(facts.prompts, 'different prompt')}."
    )
    yield "All of it may be changed; lora-dpo recipe explains every setting. Paths start at the folder of the command."


def explained(facts: Facts) -> dict[str, str]:
    """By dotted key: why a setting is as it is, and what another value does."""
    found = {}
    for key, (why, otherwise) in _texts(facts).items():
        reason = GIVEN if key in facts.given else FITTED if key in facts.fitted else why
        found[key] = f"{reason} {otherwise}".strip()
    rest = {**dict.fromkeys(facts.given, GIVEN), **dict.fromkeys(facts.fitted, FITTED)}
    return {**{key: reason for key, reason in rest.items() if key not in found}, **found}


GIVEN = "Given on the command line."
FITTED = "So that it fits into memory here."


def _texts(facts: Facts) -> dict[str, tuple[str, str]]:
    return {
        "model.name": (
            "The base: a name of lora-dpo models list, a folder, or owner/name on the hub.",
            "A larger one answers better, and takes more memory and time.",
        ),
        "data.train": (
            f"{counted(facts.train, 'pair')} to learn from.{_of_few(facts)}",
            "Rows that are added later are used by the next run.",
        ),
        "data.hold_out": (
            f"So many of its {facts.prompts} different prompts are never trained on: before and after are measured on "
            "them.",
            "More of them measure better, and leave less to learn from.",
        ),
        "lora.rank": ("Size of the adapter.", "Larger can learn more, and takes more memory."),
        "lora.alpha": (
            "How much of it counts: the update is multiplied by alpha / rank.",
            "Larger learns faster, and goes wrong sooner.",
        ),
        "evaluation.answers": (
            "Held-out prompts that are answered before and after, to be read and counted.",
            "More say more, and take longer.",
        ),
        "evaluation.max_new_tokens": (
            f"Longest of these answers, in tokens. Nine in ten of the better ones in the data have at most "
            f"{facts.lengths.answer}{_estimated(facts)}.",
            "Shorter cuts answers that would have ended.",
        ),
        "trainer.max_steps": (
            f"{facts.run_line}.",
            "Too few change nothing, too many learn the pairs by heart. In its place, num_train_epochs: 1 uses each "
            "pair once.",
        ),
        "trainer.warmup_steps": (
            "Steps in which the learning rate rises to its height.",
            "At most a tenth of them: a short run has none to give away.",
        ),
        "trainer.per_device_train_batch_size": (
            "Pairs of a step.",
            "More make a step surer and slower. Memory hardly changes: how many run at once is found out.",
        ),
        "trainer.learning_rate": (
            f"How far a step goes{_of_size(facts)}.",
            "Halve it if answers become short or odd; double it if nothing changes.",
        ),
        "trainer.loss_type": (
            "DPO's own loss (sigmoid), and the better answers as examples beside it (sft).",
            "With sigmoid alone the answers of a small base can fall apart while all curves look good.",
        ),
        "trainer.loss_weights": (
            "The weight of each.",
            "More sft: nearer to the words of the better answers. Less: further from the worse ones.",
        ),
        "trainer.beta": ("How firmly it is held to the base.", "Larger (0.3, 0.5) changes less, smaller (0.05) more."),
        "trainer.max_length": (
            f"Longest prompt and answer in tokens; what is longer is cut at its end. Here {facts.length_line}.",
            "Memory goes with the longest pair, not with this number.",
        ),
    }


def _of_few(facts: Facts) -> str:
    if facts.has_held_out:
        return ""
    return (
        f" None of its {counted(facts.prompts, 'different prompt')} is held out, each is needed, so nothing is "
        "measured on pairs that it has not seen. With more of them, hold_out: 12 below this line would."
    )


def _estimated(facts: Facts) -> str:
    return "" if facts.lengths.measured else " (estimated)"


def _of_size(facts: Facts) -> str:
    small = facts.parameters is None or facts.parameters < SIZES[0].below
    return "" if small else ": less for a base of this size than for a small one (an estimate, not measured)"
