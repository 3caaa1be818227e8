"""From finished pieces to one file of results, and from that to tables, a plot and a page.

python -m benchmarks.dpo_vs_ppo.report quick            a page beside the study's own work
python -m benchmarks.dpo_vs_ppo.report full --publish   results/full.json, docs/study.md and its plot
python -m benchmarks.dpo_vs_ppo.report full --check     exit 1 if docs/study.md says something else than results/
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .maths import Point, best_of_n_kl, bootstrap, expected_best, hull, reward_at
from .presets import RESULTS

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
PAGE = DOCS / "study.md"
OWN_PAGE, PLOT = "report.md", "frontier.png"
"""What a study writes into its own folder."""

Results = dict[str, Any]
Draw = np.ndarray
"""`[N]` indices of test prompts."""
Interval = tuple[float, float, float]
"""A statistic, and the ends of its 95% interval."""


# --- what is compared -----------------------------------------------------------------------------


class Study:
    """The results as arrays: for each measured policy reward and KL by test prompt."""

    def __init__(self, results: Results) -> None:
        self.results, self.preset = results, results["preset"]
        self.pieces: dict[str, Results] = results["pieces"]
        self.base = np.array([[*scores] for scores in self.pieces["test-base"]["scores"]])
        self.prompts = len(self.base)
        self.best = {n: np.array([expected_best(row, n) for row in self.base.tolist()]) for n in self.preset["best_of"]}

    def reward(self, name: str) -> np.ndarray:
        """`[N]`."""
        return np.array(self.pieces[f"eval-{name}"]["reward"])

    def kl(self, name: str) -> np.ndarray:
        """`[N]`."""
        return np.array(self.pieces[f"eval-{name}"]["kl"])

    def seeds(self, form: str) -> list[str]:
        """The policies of one setting, one a seed: `form` has a place for the seed."""
        return [form.format(seed) for seed in self.preset["seeds"]]

    def point(self, form: str, draw: Draw) -> Point:
        """Mean KL and reward over seeds and the drawn prompts."""
        names = self.seeds(form)
        return (
            float(np.mean([self.kl(name)[draw].mean() for name in names])),
            float(np.mean([self.reward(name)[draw].mean() for name in names])),
        )

    def origin(self, draw: Draw) -> Point:
        """The base itself."""
        return 0.0, float(self.base[draw].mean())

    def curve(self, method: str, draw: Draw) -> list[Point]:
        """The points of a method, the base first."""
        if method == "best-of-n":
            points = [(best_of_n_kl(n), float(self.best[n][draw].mean())) for n in self.preset["best_of"]]
        else:
            points = [self.point(form, draw) for form in self.forms(method)]
        return [self.origin(draw), *points]

    def forms(self, method: str) -> list[str]:
        """Names of a method's policies, with a place for the seed."""
        if method == "DPO":
            return [f"dpo-b{beta:g}-s{{}}" for beta in self.preset["betas"]]
        if method == "SFT":
            return ["sft-s{}"]
        return [f"ppo-w{w:g}-s{{}}-i{k}" for w in self.preset["kl_weights"] for k in self.preset["keep"]]

    def alone(self) -> list[Study]:
        """The same study of each training seed by itself."""
        return [Study({**self.results, "preset": {**self.preset, "seeds": [seed]}}) for seed in self.preset["seeds"]]

    def interval(self, statistic: Callable[[Draw], float]) -> Interval:
        """A statistic with its 95% interval over prompts."""
        return bootstrap(statistic, self.prompts, seed=0)


TWO_ROUNDS = (("round 2: new pairs of that policy, held to it", "dpo-round2"), ("round 2", "dpo-round2-b0.3"))
"""What they are called, and their names."""
METHODS = ("DPO", "PPO", "SFT", "best-of-n")


def matched(study: Study) -> Iterator[tuple[float, list[Interval], list[float]]]:
    """At KLs that both reach: reward of DPO's hull, of PPO's, and their difference, with intervals; and the difference
    of each seed's own hulls."""
    everything = np.arange(study.prompts)
    reach = min(hull(study.curve(method, everything))[-1][0] for method in ("DPO", "PPO"))
    for share in (0.125, 0.25, 0.5, 1.0):
        kl = share * reach
        one = [study.interval(lambda draw, m=m, kl=kl: reward_at(study.curve(m, draw), kl)) for m in ("DPO", "PPO")]
        both = study.interval(lambda draw, kl=kl: _ahead(study, draw, kl))
        yield kl, [*one, both], [_ahead(seed, everything, kl) for seed in study.alone()]


def _ahead(study: Study, draw: Draw, kl: float) -> float:
    return reward_at(study.curve("DPO", draw), kl) - reward_at(study.curve("PPO", draw), kl)


# --- tables ---------------------------------------------------------------------------------------


def frontier_table(study: Study) -> Iterator[str]:
    """Every policy of the frontier."""
    yield "| Policy | KL (nats) | reward [95%] | seeds' spread | unseen families | seconds | tokens sampled | peak GB |"
    yield "|---|---|---|---|---|---|---|---|"
    half = study.prompts // 2
    low, mid, high = _swap(study.interval(lambda draw: study.origin(draw)[1]))
    unseen = study.base[half:].mean()
    yield f"| the base | 0 | {mid:+.3f} [{low:+.3f}, {high:+.3f}] | | {unseen:+.3f} | | | |"
    for method in ("DPO", "PPO", "SFT"):
        for form in study.forms(method):
            names = study.seeds(form)
            low, mid, high = _swap(study.interval(lambda draw, form=form: study.point(form, draw)[1]))
            kl = study.point(form, np.arange(study.prompts))[0]
            spread = f"{stdev([study.reward(name).mean() for name in names]):.3f}" if len(names) > 1 else "one seed"
            unseen = np.mean([study.reward(name)[half:].mean() for name in names])
            yield (
                f"| {_label(form)} | {kl:.2f} | {mid:+.3f} [{low:+.3f}, {high:+.3f}] | {spread} | {unseen:+.3f} "
                f"| {_cost_cells(study, names)} |"
            )
    for n in study.preset["best_of"]:
        low, mid, high = _swap(study.interval(lambda draw, n=n: float(study.best[n][draw].mean())))
        best = study.best[n][half:].mean()
        yield (
            f"| best of {n} | at most {best_of_n_kl(n):.2f} | {mid:+.3f} [{low:+.3f}, {high:+.3f}] | | {best:+.3f} "
            f"| no training | {n} answers each time | |"
        )


def matched_table(study: Study) -> Iterator[str]:
    """DPO against PPO at the same KL."""
    yield "| KL (nats) | DPO's reward [95%] | PPO's reward [95%] | difference [95%] | of each seed |"
    yield "|---|---|---|---|---|"
    for kl, found, seeds in matched(study):
        cells = " | ".join(f"{mid:+.3f} [{low:+.3f}, {high:+.3f}]" for mid, low, high in found)
        yield f"| {kl:.2f} | {cells} | {', '.join(f'{ahead:+.3f}' for ahead in seeds)} |"


def side_table(study: Study) -> Iterator[str]:
    """The side experiments, each against plain DPO at the same β on the whole pool; empty if they were not run."""
    start = f"dpo-b{study.preset['side_beta']:g}-s{study.preset['seeds'][0]}"
    rows = [("clean labels, all pairs", start)]
    for noise in study.preset["noise"]:
        rows += [(f"{noise:.0%} wrong labels, {loss} loss", f"dpo-{loss}-noise{noise:g}") for loss in
                 ("plain", "smoothed", "robust")]  # fmt: skip
    rows += [
        ("a quarter of the prompts", "dpo-quarter"),
        ("off-policy pairs (temperature 1.5), held to the base", "dpo-hot"),
        ("SFT on their preferred answers", "sft-hot"),
        ("the same pairs, held to that SFT adapter", "dpo-hot-after-sft"),
        ("on-policy pairs, held to SFT on preferred", "dpo-after-sft"),
        ("round 1: half of the prompts, half of the steps", "dpo-round1"),
        TWO_ROUNDS[0],
        ("the same rounds with β 0.3: round 1", "dpo-round1-b0.3"),
        TWO_ROUNDS[1],
        ("β 0.3, twice the steps", "dpo-b0.3-twice"),
        ("β 1, twice the steps", "dpo-b1-twice"),
    ]
    rows = [(label, name) for label, name in rows if f"eval-{name}" in study.pieces]
    if len(rows) < 2:
        return
    yield (
        "| What differs (β "
        + f"{study.preset['side_beta']:g}, one seed) | KL from the base | reward [95%] | against the first row [95%] "
        + "| against DPO's frontier at that KL [95%] | against PPO's |"
    )
    yield "|---|---|---|---|---|---|"
    for label, name in rows:
        low, mid, high = _swap(study.interval(lambda draw, name=name: study.reward(name)[draw].mean()))
        gain = study.interval(lambda draw, name=name: (study.reward(name) - study.reward(start))[draw].mean())
        against = "" if name == start else _signed(gain)
        above = (
            _signed(study.interval(lambda draw, name=name, method=method: _above(study, name, method, draw)))
            for method in ("DPO", "PPO")
        )
        yield (
            f"| {label} | {study.kl(name).mean():.2f} | {mid:+.3f} [{low:+.3f}, {high:+.3f}] | {against} "
            f"| {' | '.join(above)} |"
        )


def _above(study: Study, name: str, method: str, draw: Draw) -> float:
    """A policy's reward less that of a method's frontier (all seeds) at the policy's own KL; flat beyond its end."""
    frontier = reward_at(study.curve(method, draw), float(study.kl(name)[draw].mean()))
    return float(study.reward(name)[draw].mean()) - frontier


def _signed(found: Interval) -> str:
    mid, low, high = found
    return f"{mid:+.3f} [{low:+.3f}, {high:+.3f}]"


def samples_table(study: Study) -> Iterator[str]:
    """What the first seed's policies wrote to two test openings, PPO's after its last iteration."""
    last, seed = max(study.preset["keep"]), study.preset["seeds"][0]
    forms = [form for form in (*study.forms("DPO"), *study.forms("PPO"), *study.forms("SFT"))
             if not form.startswith("ppo") or form.endswith(f"-i{last}")]  # fmt: skip
    yield "| Policy | KL (nats) | of a family that was trained on | of an unseen family |"
    yield "|---|---|---|---|"
    for form in forms:
        name = form.format(seed)
        known, unseen = (_cell(study.pieces[f"eval-{name}"]["samples"][place]) for place in (0, 2))
        yield f"| {_label(form)} | {study.kl(name).mean():.2f} | {known} | {unseen} |"


def _cell(text: str) -> str:
    """Sampled text in a table of Markdown, on one line and without any meaning to it."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def agreement_table(study: Study) -> Iterator[str]:
    """How often DPO's implicit reward orders two of the base's answers as the true reward does."""
    yield "| DPO's β | same order as the true reward [95%] | of each seed |"
    yield "|---|---|---|"
    beta = study.preset["side_beta"]
    names = study.seeds(f"agree-dpo-b{beta:g}-s{{}}")
    found_SN = np.array([study.pieces[name]["agreement"] for name in names], dtype=float)
    low, mid, high = _swap(study.interval(lambda draw: float(np.nanmean(found_SN[:, draw]))))
    seeds = ", ".join(f"{np.nanmean(row):.3f}" for row in found_SN)
    yield f"| {beta:g} | {mid:.3f} [{low:.3f}, {high:.3f}] | {seeds} |"


def lines_table() -> Iterator[str]:
    """How much code each method is, without comments, docstrings and blank lines."""
    yield "| What | lines of code |"
    yield "|---|---|"
    yield f"| PPO: `ppo.py`, and `gae`, `token_rewards`, `whiten`, `clipped_loss` of `maths.py` | {_ppo_lines()} |"
    dpo = code_lines(HERE / "offline.py", {"DPOSettings", "train_dpo", "_common", "_run"})
    yield f"| DPO: `DPOSettings` and `train_dpo` of `offline.py`, on TRL's trainer | {dpo} |"


def _ppo_lines() -> int:
    parts = {"gae", "token_rewards", "whiten", "clipped_loss", "masked_mean"}
    return code_lines(HERE / "ppo.py") + code_lines(HERE / "maths.py", parts)


def code_lines(path: Path, names: set[str] | None = None) -> int:
    """Lines of a file (or of its named functions and classes) that are code."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    tops = [node for node in tree.body if names is None or getattr(node, "name", None) in names]
    lines: set[int] = set()
    for top in tops:
        lines |= set(
            range(min([top.lineno, *(d.lineno for d in getattr(top, "decorator_list", []))]), top.end_lineno + 1)
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    rows = text.split("\n")
    return sum(bool(rows[number - 1].strip()) and not rows[number - 1].strip().startswith("#") for number in lines)


def _swap(found: Interval) -> Interval:
    mid, low, high = found
    return low, mid, high


def _label(form: str) -> str:
    if form.startswith("dpo-b"):
        return f"DPO, β {form.removeprefix('dpo-b').removesuffix('-s{}')}"
    if form.startswith("ppo-w"):
        weight, _, rest = form.removeprefix("ppo-w").partition("-s{}-i")
        return f"PPO, KL weight {weight}, after {rest} iterations"
    return "SFT on the best answers"


def _cost_cells(study: Study, names: Sequence[str]) -> str:
    """Mean seconds of training, tokens sampled for it, and peak memory; the pool's tokens count for what uses it."""
    kinds = [re.sub(r"-i\d+$", "", name) for name in names]
    costs = [study.pieces[kind]["cost"] for kind in kinds]
    last = max(study.preset["keep"])
    if names[0].startswith("ppo") and not names[0].endswith(f"-i{last}"):
        return "part of the row below | |"
    sampled = fmean(cost["tokens"] for cost in costs) or study.pieces["pool"]["cost"]["tokens"]
    seconds, peak = (fmean(cost[key] for cost in costs) for key in ("seconds", "peak_gb"))
    return f"{seconds:.0f} | {sampled:,.0f} | {peak:.2f}"


# --- the plot -------------------------------------------------------------------------------------

COLOURS = {"DPO": "#335c81", "PPO": "#b3432b", "SFT": "#7a6a2f", "best-of-n": "#2f7d4f"}


def write_plot(study: Study, path: Path) -> None:
    """Reward against KL, as in figure 2 (left) of the DPO paper; bars are 95% intervals over test prompts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    everything = np.arange(study.prompts)
    for method in METHODS:
        points = study.curve(method, everything)
        line = hull(points)
        colour = COLOURS[method]
        axes.plot([x for x, _ in line], [y for _, y in line], color=colour, linewidth=1.4, alpha=0.8)
        for number in range(1, len(points)):
            mid, low, high = study.interval(lambda draw, m=method, n=number: study.curve(m, draw)[n][1])
            axes.errorbar(points[number][0], mid, yerr=[[mid - low], [high - mid]], fmt="o", color=colour, markersize=5,
                          capsize=3, linewidth=1, label=method if number == 1 else None)  # fmt: skip
    for number, (_, name) in enumerate(row for row in TWO_ROUNDS if f"eval-{row[1]}" in study.pieces):
        mid, low, high = study.interval(lambda draw, name=name: float(study.reward(name)[draw].mean()))
        axes.errorbar(study.kl(name).mean(), mid, yerr=[[mid - low], [high - mid]], fmt="s", color=COLOURS["DPO"],
                      markerfacecolor="white", markersize=5, capsize=3, linewidth=1,
                      label=None if number else "DPO, second half of the pairs its own (one seed)")  # fmt: skip
    axes.axhline(study.origin(everything)[1], color="#888888", linewidth=0.8, linestyle=":", label="the base")
    axes.set_xlabel("KL from the base, nats an answer (best-of-n: its upper bound)")
    axes.set_ylabel("true reward (VADER compound)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


# --- the page -------------------------------------------------------------------------------------


def tables(study: Study) -> dict[str, list[str]]:
    """The generated parts of the page, by name."""
    side = list(side_table(study)) or [f"The {study.preset['name']} study has no side experiments."]
    return {
        "frontier": list(frontier_table(study)),
        "matched": list(matched_table(study)),
        "side": side,
        "agreement": list(agreement_table(study)),
        "samples": list(samples_table(study)),
        "lines": list(lines_table()),
    }


def filled(text: str, parts: dict[str, list[str]]) -> str:
    """A page with its generated parts put between their marks."""
    for name, lines in parts.items():
        pattern = rf"(<!-- {name}: made by benchmarks/dpo_vs_ppo/report.py -->\n).*?(<!-- end -->)"
        body = "\n".join(["", *lines, ""])
        text, count = re.subn(pattern, lambda m, body=body: m[1] + body + "\n" + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"The page has {count} places for {name}.")
    return text


TITLES = {
    "frontier": "Reward against KL",
    "matched": "DPO against PPO at the same KL",
    "side": "Side experiments",
    "agreement": "DPO's implicit reward against the true one",
    "samples": "What the first seed's policies write",
    "lines": "Lines of code",
}


def own_page(study: Study) -> str:
    """The tables of one study; what they mean is said in docs/study.md."""
    parts = tables(study)
    sections = ["\n".join([f"## {title}", "", *parts[name]]) for name, title in TITLES.items()]
    head = f"# The {study.preset['name']} study\n\n![reward against KL]({PLOT})"
    return "\n\n".join([head, *sections]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where the study worked")
    parser.add_argument("--publish", action="store_true", help="write results/ and docs/ of this repository")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if docs/study.md is stale")
    given = parser.parse_args(arguments)
    published, work = HERE / "results" / f"{given.preset}.json", given.work / given.preset
    path = published if given.check else work / RESULTS
    if not path.is_file():
        print(f"There is no {os.path.relpath(path)}: run the study first.", file=sys.stderr)
        return 1
    study = Study(json.loads(path.read_text(encoding="utf-8")))
    if not (given.check or given.publish):
        (work / OWN_PAGE).write_text(own_page(study), encoding="utf-8")
        write_plot(study, work / PLOT)
        print("\n".join(f"written: {os.path.relpath(work / name)}" for name in (OWN_PAGE, PLOT)))
        return 0
    page = PAGE.read_text(encoding="utf-8")
    made = filled(page, tables(study))
    if given.check:
        return int(made != page)
    published.write_bytes(path.read_bytes())
    PAGE.write_text(made, encoding="utf-8")
    write_plot(study, DOCS / "study-frontier.png")
    print(f"written: {', '.join(map(os.path.relpath, (published, PAGE, DOCS / 'study-frontier.png')))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
