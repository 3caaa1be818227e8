"""`lora-dpo data check --learned`: the pairs that disagree with what an adapter has learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lora_dpo.cli.data_views import STYLE, spoken
from lora_dpo.text import counted, harmless, reasons_text

if TYPE_CHECKING:
    from lora_dpo.adapters.loading import LoadedModel
    from lora_dpo.evaluation.suspicion import Suspects

err = Console(stderr=True)


def suspects_of(files: Sequence[str], adapter: str, *, model: str | None, **how: Any) -> Suspects:
    """The pairs in that order; the adapter's base is loaded, aloud, if its run does not know them all.

    Args:
        model: where the base is, if not where the adapter says.
        how: how the files are read, as `read_pairs` takes it.
    """
    from lora_dpo.adapters.loading import load_policy
    from lora_dpo.adapters.store import find_adapter
    from lora_dpo.cli.ready import have_base_of
    from lora_dpo.cli.views import RunView
    from lora_dpo.evaluation.suspicion import suspicious_pairs

    folder, view = find_adapter(adapter), RunView(err)

    def load() -> LoadedModel:
        have_base_of(folder, model)
        return load_policy(model, adapter=folder)

    with view.live():
        return suspicious_pairs(files, folder, load=load, on_event=view, **how)


def write_ordered(found: Suspects, out: Path) -> None:
    """Write all of them, the most suspicious first. Raises as `write_rows`."""
    from lora_dpo.data.write import write_rows
    from lora_dpo.evaluation.suspicion import ordered_rows

    write_rows(ordered_rows(found), out)


def suspects_view(found: Suspects, adapter: str, console: Console, *, top: int) -> None:
    """The pairs that disagree most with what an adapter has learnt."""
    how = "each pair scored with it now" if found.scored else "by the margins that its run kept"
    against = f"{found.against:,} of {counted(len(found.pairs), 'pair')}"
    text = f"{adapter} orders {against} the other way round, {how}."
    console.print()
    console.print(Text(harmless(text), style="bold"), soft_wrap=True)
    if found.dropped:
        without = f"{counted(len(found.dropped), 'pair')} without a margin: {reasons_text(found.reasons())}"
        console.print(Text(harmless(without), style="yellow"), soft_wrap=True)
    console.print(
        "The most suspicious first. Not each is wrong: a hard or rare pair looks like a wrong label from here.",
        soft_wrap=True,
    )
    for rank, one in enumerate(found.pairs[:top], start=1):
        before = "" if one.before is None else f"{one.before:+.1f} before it was learnt from, "
        after = one.margin if one.after is None else one.after
        head = f"{rank:>3}  {one.pair.origin}  {one.doubt:.0%} against its label  (margin {before}{after:+.1f} after)"
        console.print(Text(harmless(head)), highlight=False, soft_wrap=True)
        pair = one.pair
        for part, messages in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
            said = " ".join(spoken(messages[-1]).split())
            line = Text(f"     {part:<9}{harmless(said)}", style=STYLE[part][0])
            console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
    if len(found.pairs) > top:
        console.print(
            f"{len(found.pairs) - top:,} more: --top shows more of them, --ordered FILE writes all.", highlight=False
        )
