"""`lora-dpo merge`: parse, call, draw."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lora_dpo.cli.options import AdapterName, BaseElsewhere, Strict
from lora_dpo.config.template_kwargs import as_words
from lora_dpo.errors import BaseDiffers

out = Console()
err = Console(stderr=True)

BASES = {
    "base16": "the weights as they are stored",
    "trained-base": "the NF4 values that 4-bit training computes with",
}
"""What each base is that a merge can be made into."""


def merge(
    adapter: AdapterName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder to write. Must not exist.")],
    into: Annotated[
        str | None,
        typer.Option(
            help="base16: the weights as stored. trained-base: the values of quantised training. both: a folder of "
            "each. Default: what it was trained on."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What is stored: bfloat16, float16 or float32.")] = "bfloat16",
    model: BaseElsewhere = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Compare the result with the live adapter afterwards.")
    ] = True,
    pairs: Annotated[
        str | None, typer.Option(help="Preference pairs to compare on; by default those that the adapter carries.")
    ] = None,
    strict: Strict = False,
) -> None:
    """Merge an adapter into its base: one ordinary model folder.

    Plain transformers loads it. It is merged into what it was trained on, by its passport: the result answers as the
    live adapter does. Weights are merged one by one, so that memory is bounded by the largest of them. The report says
    how far the result is from the live adapter: change of log-probabilities, KL, top-1 agreement, reward accuracy.

    Examples:

        lora-dpo merge quickstart --output merged/quickstart

        lora-dpo merge adapters/quickstart --output merged/compared --into both
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.adapters.store import find_adapter
    from lora_dpo.adapters.stored_pairs import read_stored_pairs
    from lora_dpo.cli.ready import have_base_of
    from lora_dpo.cli.views import fidelity_table, stages
    from lora_dpo.config.reading import one_of
    from lora_dpo.data.rows import refuse_missing
    from lora_dpo.files import refuse_existing
    from lora_dpo.release.merge_base import trained_into
    from lora_dpo.release.merge_fidelity import check_pairs, fidelity, recommend
    from lora_dpo.release.merged_folder import merge as run_merge

    if into is not None:
        one_of("--into", into, ("base16", "trained-base", "both"))
    one_of("--dtype", dtype, ("bfloat16", "float16", "float32"))
    refuse_existing(output)
    folder = find_adapter(adapter)
    refuse_missing([pairs] if pairs is not None else [])
    have_base_of(folder, model)
    which = into or trained_into(folder, model)
    comparable = pairs is not None or read_stored_pairs(folder) is not None
    if report and comparable:
        check_pairs(folder, pairs, model=model)
    with strictness(strict), stages(err) as stage:
        run_merge(
            folder,
            output,
            into=which,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            model=model,
            on_tensor=lambda done, total: stage("merging", done, total),
        )
    out.print(f"[green]merged[/] {escape(str(folder))}: [bold]{escape(str(output))}[/] ({dtype})", soft_wrap=True)
    if which != "both":
        out.print(f"  into {which}{_why(folder, into, model)}", highlight=False, soft_wrap=True)
    say_keywords(folder)
    if not report:
        return
    if not comparable:
        out.print("No report: the adapter carries no pairs to compare on. Give some with --pairs FILE.")
        return
    both = ("base16", "trained-base")
    merged = {one: output / one for one in both} if which == "both" else {which: output}
    with warnings.catch_warnings(), stages(err) as stage:
        warnings.simplefilter("ignore", BaseDiffers)  # said already, by the merge
        found = fidelity(folder, merged, model=model, pairs=pairs, on_stage=stage)
    out.print(fidelity_table(found))
    if found[0].pairs < found[0].given:
        said = f"Compared on {found[0].pairs} of {found[0].given} pairs, evenly spaced: more would fill the disk."
        out.print(said, highlight=False)
    out.print(recommend(found), soft_wrap=True, highlight=False)


def say_keywords(adapter: Path | None, *, held: bool = True) -> None:
    """That the adapter goes with keywords for the chat template, and who gives them."""
    from lora_dpo.adapters.adapter import open_adapter

    if adapter is None or not (given := open_adapter(adapter).chat_template_kwargs):
        return
    text = "the defaults of the chat template in it" if held else "give them to the server, since no template is in it"
    out.print(f"  trained with {escape(as_words(given))}: {text}", highlight=False, soft_wrap=True)


def base_text(which: str, adapter: Path | None) -> str:
    """What a base of `BASES` is of an adapter's: one that came quantised has values of its own."""
    from lora_dpo.adapters.passport import read_passport
    from lora_dpo.model.stored_form import held_text, is_stored

    passport = read_passport(adapter) if adapter is not None else None
    if which == "trained-base" and passport is not None and is_stored(passport.quantize):
        return f"the values of its weights, which are {held_text(passport.quantize)}"
    return BASES.get(which, which)


def _why(adapter: Path, into: str | None, model: str | None) -> str:
    """What the base is that it was merged into, and why that one if nobody asked for it."""
    from lora_dpo.adapters.passport import read_passport
    from lora_dpo.release.merge_base import trained_into

    which = into or trained_into(adapter, model)
    if into is not None:
        return f": {base_text(which, adapter)}"
    if read_passport(adapter) is None:
        return f": {base_text(which, adapter)}; nothing says what it was trained on"
    ours, text = which == "trained-base", base_text(which, adapter)
    other = ". --into both compares it with the weights as they are stored" if ours and text == BASES[which] else ""
    return f", which it was trained on: {text}{other}"
