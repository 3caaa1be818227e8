"""Several adapters of one base become one, through peft, and are scored on the held-out pairs of each parent.

    cat           B·A of the result is the weighted sum of the parents' s·B·A, exactly; ranks add up
    svd           the same sum, cut to a rank by its largest singular values
    linear        weighted sums of the A and of the B: products of one parent's B with another's A come along
    ties          keeps large entries whose signs agree (Yadav et al. 2023)
    dare_linear   drops entries at random and rescales the rest (Yu et al. 2023); dare_ties with signs
    *_svd         the same on whole updates B·A, cut to a rank

One adapter with `svd` and a rank is extracted: the nearest adapter of that rank.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.exchange import check_content, named
from lora_dpo.adapters.folder import check_adapter, put_adapter, put_beside, warn_of
from lora_dpo.adapters.loading import load_base_of
from lora_dpo.adapters.lora_config import CONFIG, WEIGHTS, read_config
from lora_dpo.adapters.passport import Passport, make_passport, read_passport, write_passport
from lora_dpo.adapters.peft_files import LoraModule, read_adapter
from lora_dpo.adapters.stored_pairs import save_stored_pairs
from lora_dpo.config.template_kwargs import TemplateKwargs, as_words
from lora_dpo.errors import AdapterError, ConfigError
from lora_dpo.evaluation.report.model_card import front_matter
from lora_dpo.files import atomic_folder, refuse_existing, sha256_of
from lora_dpo.model.base import Base
from lora_dpo.quiet import quiet_libraries
from lora_dpo.release.mixture_score import (
    MIX,
    OnStage,
    Score,
    combine,
    mix_errors,
    pairs_of_parents,
    score_mixture,
    sweep_weights,
)
from lora_dpo.text import plain, shown

if TYPE_CHECKING:
    from peft import PeftModel

METHODS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
ALONE = ("linear", "cat", "svd")
"""Methods that make sense of one adapter."""
SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SWEEP_PLOT = "sweep.png"


@dataclass(frozen=True)
class Mixed:
    """What a mix gave."""

    folder: Path
    rank: int
    scores: dict[str, dict[str, Score]]
    """By the name of a parent's pairs, then by the adapter that was scored (`mix` for the result)."""
    sweep: dict[float, dict[str, Score]]
    """By the first parent's weight (the second has the rest), then by the name of a parent's pairs."""


def mix(
    parts: Sequence[tuple[str | Path, float]],
    output: str | Path,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    sweep: int = 0,
    model: str | None = None,
    on_stage: OnStage | None = None,
) -> Mixed:
    """Mix adapters of one base and write the result as an adapter folder, with passport and stored pairs.

    Args:
        parts: adapter folders with their weights.
        method: one of `METHODS`, see above; of one adapter alone one of `ALONE`.
        rank: the result's rank, for the methods with `svd`; by default the largest of the parents'.
        density: share of entries that ties, dare and magnitude_prune keep.
        seed: of what dare drops.
        sweep: also score this many weights of the first of two adapters, from 0 to 1.
        model: another place of the same base.

    Raises:
        ConfigError: a method, rank, density or weight that does not go together.
        AdapterError: adapters of different bases, or of a kind that cannot be mixed.
        OutputError: `output` exists or cannot be written.
    """
    folders = [Path(folder) for folder, _ in parts]
    output = Path(output)
    refuse_existing(output)
    _check_options(parts, method=method, rank=rank, density=density, sweep=sweep)
    _check_kinds(folders, method, rank)
    tick = on_stage or (lambda stage, done, total: None)
    with quiet_libraries():
        base = load_base_of(folders[0], model=model)
        for folder in folders:
            warn_of(check_adapter(base, folder))
        policy, names = _load(base, folders)
        weights = [weight for _, weight in parts]
        options: dict[str, Any] = {"method": method, "rank": rank, "density": density, "seed": seed}
        with mix_errors(method):
            combine(policy, names, weights, **options)
        pairs = pairs_of_parents(folders)
        scores, stored = score_mixture(policy, base, pairs, names, folders, tick)
        swept = sweep_weights(policy, base, pairs, names, sweep, tick, options) if sweep else {}
        made = _passport(base, parts, options, folders, scores)
        with atomic_folder(output) as folder:
            policy.set_adapter(MIX)
            _save(policy, folder)
            write_passport(folder, made)
            if stored:
                save_stored_pairs(folder, stored)
            if swept:
                plot_sweep(folder / SWEEP_PLOT, swept, method, folders[0].name)
            _write_card(folder / "README.md", output.name, made, parts, method, scores)
            with named(folder, output):
                check_content(folder)
    return Mixed(output, read_config(output).rank, scores, swept)


def parse_part(text: str) -> tuple[str, float]:
    """`NAME:WEIGHT` as typed; the weight is 1 if left out. Raises `ConfigError`."""
    name, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise ConfigError(f"{shown(text)} is no NAME:WEIGHT: {shown(weight)} is not a number.") from None


def _check_options(
    parts: Sequence[tuple[str | Path, float]], *, method: str, rank: int | None, density: float | None, sweep: int
) -> None:
    from lora_dpo.config.reading import one_of

    one_of("--method", method, METHODS)
    if odd := [weight for _, weight in parts if not math.isfinite(weight)]:
        raise ConfigError(f"A weight is {odd[0]}: give a number, such as 0.5.")
    if len(parts) == 1 and method not in ALONE:
        raise ConfigError(f"--method {method} needs two adapters or more; one alone goes with {', '.join(ALONE)}.")
    if rank is not None and "svd" not in method:
        raise ConfigError(f"--rank has no effect with --method {method}: use svd, or a method that ends in _svd.")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}: allowed is 1 and more.")
    prunes = any(word in method for word in ("ties", "dare", "prune"))
    if prunes and density is None:
        raise ConfigError(f"--method {method} needs a --density between 0 and 1, such as 0.5.")
    if not prunes and density is not None:
        raise ConfigError(f"--density has no effect with --method {method}.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"--density is {density}: allowed is above 0 up to 1.")
    if sweep and (len(parts) != 2 or sweep < 2):
        raise ConfigError("--sweep needs two adapters and at least 2 weights.")


def _check_kinds(folders: Sequence[Path], method: str, rank: int | None) -> None:
    read = {folder: read_adapter(folder) for folder in folders}
    for folder, (config, tensors) in read.items():
        if config.dora or tensors.saved or config.parameters:
            stacked = "stacked weights of experts" if config.parameters else "whole saved modules"
            what = "DoRA" if config.dora else stacked
            raise AdapterError(f"{folder} uses {what}, which cannot be mixed. Merge it into the base instead.")
    targets = {folder: set(tensors.lora) for folder, (_, tensors) in read.items()}
    for folder in folders[1:]:
        if odd := targets[folder] ^ targets[folders[0]]:
            where = f"(such as {plain(min(odd))})"
            raise AdapterError(f"{folder} and {folders[0]} adapt different layers {where}: they cannot be mixed.")
    layers = [(module, lora) for _, tensors in read.values() for module, lora in tensors.lora.items()]
    ranks = {lora.rank for _, lora in layers}
    same = method in SAME_RANK or (method == "cat" and len(folders) == 1)
    if same and len(ranks) > 1:
        raise ConfigError(
            f"--method {method} needs adapters of one rank, here are {', '.join(map(str, sorted(ranks)))}. "
            f"Use {'' if len(folders) == 1 else 'cat or '}svd, or bring one to the other's rank first: "
            "adapters mix NAME:1 --method svd --rank N."
        )
    module, smallest = min(layers, key=lambda layer: _full_rank(layer[1]))
    wanted, limit = rank or max(ranks), _full_rank(smallest)
    if "svd" in method and wanted > limit:
        raise ConfigError(
            f"A --rank of {wanted} is too much: {plain(module)} has at most {limit}. Give --rank {limit}."
        )


def _full_rank(lora: LoraModule) -> int:
    """The largest rank that an update of this layer can have."""
    return min(lora.a.shape[1], lora.b.shape[0])


def _load(base: Base, folders: Sequence[Path]) -> tuple[PeftModel, list[str]]:
    names = [f"part{number}" for number in range(len(folders))]
    policy = put_adapter(base, folders[0], name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        put_beside(policy, folder, name=name, base=base.name)
    for name in names:
        # peft copies this flag to the result, whose scale is to be 1; the parents' scales are computed already
        policy.peft_config[name].use_rslora = False
    return policy.eval(), names


def _save(policy: Any, folder: Path) -> None:
    policy.save_pretrained(str(folder), selected_adapters=[MIX])
    inner = folder / MIX  # peft puts adapters that are not called "default" into a folder of their own
    for path in (inner / WEIGHTS, inner / CONFIG):
        path.rename(folder / path.name)
    shutil.rmtree(inner)
    (folder / "README.md").unlink(missing_ok=True)


def _passport(
    base: Base,
    parts: Sequence[tuple[str | Path, float]],
    options: dict[str, Any],
    folders: Sequence[Path],
    scores: dict[str, dict[str, Score]],
) -> Passport:
    data: dict[str, Any] = {}
    for folder in folders:
        passport = read_passport(folder)
        for which, record in (passport.data if passport else {}).items():
            data[f"{which} of {folder.name}"] = record
    mixed = [
        {"adapter": folder.name, "weight": weight, "sha256": sha256_of(folder / WEIGHTS)}
        for folder, (_, weight) in zip(folders, parts, strict=True)
    ]
    metrics = {"after": {f"pairs of {of}": dataclasses.asdict(found[MIX]) for of, found in scores.items()}}
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    recipe = {"mix": {"parts": mixed, **options}}
    return make_passport(
        base,
        reference="base",
        data=data,
        metrics=metrics,
        created=created,
        recipe=recipe,
        chat_template_kwargs=_asked_alike(folders),
    )


def _asked_alike(folders: Sequence[Path]) -> TemplateKwargs:
    """The keywords for the chat template that all of them were trained with; that some differ is a warning."""
    given = [open_adapter(folder).chat_template_kwargs for folder in folders]
    common = {name: value for name, value in given[0].items() if all(one.get(name) == value for one in given)}
    if any(dict(one) != common for one in given):
        each = "; ".join(
            f"{folder.name}: {as_words(one) or 'none'}" for folder, one in zip(folders, given, strict=True)
        )
        warn_of(
            [
                f"The adapters were trained with other keywords for the chat template ({each}): the mix has those that "
                "all have."
            ]
        )
    return common


def _write_card(
    path: Path,
    name: str,
    passport: Passport,
    parts: Sequence[tuple[str | Path, float]],
    method: str,
    scores: dict[str, dict[str, Score]],
) -> None:
    labels = list(next(iter(scores.values()), {}))
    lines = [
        *front_matter(passport.base, ["lora", "dpo", "lora-dpo"]),
        f"# {name}",
        "",
        f"A LoRA adapter for `{passport.base}`, mixed by lora-dpo (`{method}`) from "
        + ", ".join(f"{Path(folder).name} × {weight:g}" for folder, weight in parts)
        + ".",
        "",
    ]
    if labels:
        lines += [
            "Reward accuracy, and mean margin in nats, on the held-out pairs that each parent carries:",
            "",
            f"| pairs of | {' | '.join(labels)} |",
            "|---" * (len(labels) + 1) + "|",
        ]
        for of, found in scores.items():
            cells = " | ".join(f"{found[label].accuracy:.2f}, {found[label].margin:+z.2f}" for label in labels)
            lines.append(f"| {of} | {cells} |")
    path.write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")


def plot_sweep(path: Path, sweep: dict[float, dict[str, Score]], method: str, first: str) -> None:
    """Plot margin and accuracy on each parent's pairs over the first parent's weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    margin, share = figure.subplots(1, 2)
    weights = list(sweep)
    colours = ("#335c81", "#b3432b")
    for colour, of in zip(colours, next(iter(sweep.values())), strict=False):
        margin.plot(weights, [sweep[w][of].margin for w in weights], marker="o", color=colour, label=f"pairs of {of}")
        share.plot(weights, [sweep[w][of].accuracy for w in weights], marker="o", color=colour)
    margin.set_title(f"margin (nats), {method}", fontsize=10, loc="left")
    share.set_title("reward accuracy", fontsize=10, loc="left")
    share.set_ylim(-0.03, 1.03)
    margin.legend(frameon=False, fontsize=9)
    for axes in (margin, share):
        axes.set_xlabel(f"weight of {first}", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
