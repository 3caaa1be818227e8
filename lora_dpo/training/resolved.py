"""What was resolved before a run, line by line, as it is said before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from lora_dpo.adapters.passport import read_passport
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.template_kwargs import as_words
from lora_dpo.data import TokenPair
from lora_dpo.data.answers import TokenAnswer
from lora_dpo.model.base import check_packed, decide_packed, held_by
from lora_dpo.model.device import device_name, pick_device, pick_dtype
from lora_dpo.model.experts import active_parameters, expert_weights
from lora_dpo.model.lora import unreached
from lora_dpo.model.quantised import kept_share
from lora_dpo.model.stored_form import held_text
from lora_dpo.training.prepared import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def model_lines(recipe: Recipe, skeleton: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """What is loaded, on what, in which precision, and what stands for the reference."""

    device = pick_device()
    dtype = pick_dtype(recipe.model.dtype, device)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    active = active_parameters(skeleton)
    used = f", {active / 1e6:,.0f} M of them for a token" if active < total else ""
    yield "model", f"{recipe.model.name}, {total / 1e6:,.0f} M parameters{used}"
    if recipe.model.template:
        yield "template", f"with {as_words(recipe.model.template)}{_of_reference(recipe)}"
    yield "device", device_name(device)
    yield "weights", _weights_line(recipe, skeleton, device, dtype)
    yield _reference_line(recipe)


def _of_reference(recipe: Recipe) -> str:
    """What is said of keywords for the chat template that are those of the reference adapter."""
    passport = read_passport(recipe.reference_adapter) if recipe.reference_adapter else None
    own = passport.chat_template_kwargs if passport else {}
    same = {name: value for name, value in recipe.model.template.items() if name in own and own[name] == value}
    if not same:
        return ""
    which = "" if len(same) == len(recipe.model.template) else f"{', '.join(same)} "
    return f" ({which}as the reference adapter was trained)"


def _reference_line(recipe: Recipe) -> tuple[str, str]:
    if recipe.method == "sft":
        start = "the base" if recipe.reference == "base" else recipe.reference
        return "start", f"{start}; nothing is held to it, log-ratios are told against it"
    return (
        "reference",
        "the base, adapter off" if recipe.reference == "base" else f"a frozen copy of {recipe.reference}",
    )


def run_lines(run: Run) -> Iterator[tuple[str, str]]:
    """The data, the steps and the loss of a run."""
    settings = run.settings
    for which, report in run.reports.items():
        apart = which == "eval" and run.recipe.data.hold_out is not None
        how = "held out of the training data" if apart else f"read as {report.read_as}"
        yield f"{which} data", f"{report.summary(run.unit)}, {how}"
        if not apart:
            yield from (("", line) for line in report.noted())
    if run.train:
        yield "tokens", _token_line(run.train)
        lengths = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in run.train]
    else:
        yield "tokens", _answers_line(run.answers)
        lengths = [len(one.prompt) + len(one.answer) for one in run.answers]
    batch, steps = run.batch, run.steps
    yield (
        "steps",
        f"{steps} of {batch} {run.unit} ({steps * batch / run.examples:.2f} passes over the data), "
        f"about {fmean(lengths) * batch:,.0f} tokens a step",
    )
    yield "objective", f"{_objective(run)}, learning rate {settings['learning_rate']:g}"
    yield "output", str(run.output)


def _objective(run: Run) -> str:
    settings = run.settings
    if run.recipe.method == "sft":
        return f"{settings.get('loss_type', 'nll')} of good answers"
    if run.recipe.method == "kto":
        good = sum(one.up for one in run.answers)
        weights = [settings.get(f"{kind}_weight", 1.0) for kind in ("desirable", "undesirable")]
        counts = f"{good} good at weight {weights[0]:g}, {len(run.answers) - good} bad at {weights[1]:g}"
        return f"{settings.get('loss_type', 'kto')}, β {run.beta:g}, {counts}"
    weights = settings.get("loss_weights") or [1.0] * len(settings["loss_type"])
    loss = " + ".join(f"{weight:g}·{name}" for name, weight in zip(settings["loss_type"], weights, strict=False))
    return f"{loss}, β {run.beta:g}"


def _weights_line(recipe: Recipe, skeleton: PreTrainedModel, device: torch.device, dtype: str) -> str:
    import torch

    held, form = held_by(recipe.model)
    if held == "none":
        return f"{held_text(held)}, computed in {dtype}"
    packed = recipe.model.packed
    if packed == "auto":
        packed = decide_packed(skeleton, device, getattr(torch, dtype), form)
    check_packed(form, packed, device.type)
    bits = form.bits if form is not None else 4
    how = "held dequantised" if not packed else f"packed in {bits} bits" if bits else "packed"
    return f"{held_text(held, kept_share(skeleton, form))}, {how}, computed in {dtype}"


def lora_line(recipe: Recipe) -> str:
    """What the adapter is put on, or that it is continued."""
    if recipe.reference != "base":
        return ", continued"
    lora = recipe.lora
    extras = [name for name, on in (("rsLoRA", lora.rslora), ("DoRA", lora.dora)) if on]
    layers = "" if lora.layers == "all" else f", layers {lora.layers}"
    also = f" and {lora.parameters}" if lora.parameters else ""
    also += f", {', '.join(lora.modules_to_save)} whole" if lora.modules_to_save else ""
    others = "".join(f", of {name} {rank}" for name, rank in lora.rank_pattern.items())
    begins = {"gaussian": "A from a normal distribution", "eva": "A from what the layers read (EVA)"}
    extras += [begins[lora.init]] if lora.init in begins else []
    return f", rank {lora.rank}{others}, alpha {lora.alpha:g}, {lora.targets}{also}{layers}{', '.join(['', *extras])}"


def missed_text(model: PeftModel) -> str:
    """What `lora.targets: all-linear` does not reach of a model's layers, where that is more than a hundredth."""
    share, names = unreached(model)
    if share <= 0.01:
        return ""
    more = "; lora.parameters: experts reaches those" if expert_weights(model.get_base_model()) else ""
    return f"; {share:.0%} of the layers' weights are not reached ({', '.join(names[:4])}{more})"


def _token_line(pairs: Sequence[TokenPair]) -> str:
    return _lengths_line(
        ("prompt", [len(pair.prompt) for pair in pairs]),
        ("chosen", [len(pair.chosen) for pair in pairs]),
        ("rejected", [len(pair.rejected) for pair in pairs]),
        cut=f"{sum(pair.truncated for pair in pairs)} pairs",
    )


def _answers_line(answers: Sequence[TokenAnswer]) -> str:
    return _lengths_line(
        ("prompt", [len(one.prompt) for one in answers]),
        ("good answer", [len(one.answer) for one in answers if one.up]),
        ("bad answer", [len(one.answer) for one in answers if not one.up]),
        cut=f"{sum(one.truncated for one in answers)} answers",
    )


def _lengths_line(*named: tuple[str, list[int]], cut: str) -> str:
    parts = [f"{name} {median(lengths):.0f} (longest {max(lengths)})" for name, lengths in named if lengths]
    return "median " + ", ".join(parts) + ("" if cut.startswith("0 ") else f"; {cut} cut at max_length")
