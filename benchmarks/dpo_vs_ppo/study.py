"""DPO against PPO, SFT and best-of-N: pieces of work that are done once each, in order.

    python -m benchmarks.dpo_vs_ppo.study quick                  all that is left of the quick study
    python -m benchmarks.dpo_vs_ppo.study full --minutes 30      stop after the piece (or PPO iteration) under way then
    python -m benchmarks.dpo_vs_ppo.study full --plan            what it will compute

A killed study goes on with the same command. Results are in work/PRESET; a finished study is gathered in its
results.json, from which `report.py` makes tables, a plot and a page. What was published is in results/ and
docs/study.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lora_dpo import LoraDPOError, load_base
from lora_dpo.config.recipe import LoraSection
from lora_dpo.quiet import quiet_libraries

from .budget import plan_lines
from .lab import Answer, Lab, costing, kl_of, log_ratios
from .maths import agreement, best_and_worst, flip
from .offline import DPOSettings, pairs_of, train_dpo, train_sft
from .ppo import PPOSettings, train_ppo
from .presets import HERE, JUDGED, PRESETS, RESULTS, Preset
from .prompts import Opening, of_split

Result = dict[str, Any]

LONGER_BETAS = (0.3, 1.0)
"""β of the runs with twice the steps."""
ROUNDS_BETA = 0.3
"""β of a second run in two rounds, beside the one at the preset's `side_beta`."""


@dataclass
class Study:
    """What the pieces share."""

    preset: Preset
    folder: Path
    model: str
    deadline: float = float("inf")
    opened: Lab | None = None
    train: list[Opening] = field(default_factory=list)
    test: list[Opening] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.train = of_split("train", self.preset.train_prompts)
        self.test = [*of_split("subject", self.preset.test_prompts), *of_split("family", self.preset.test_prompts)]

    @property
    def lab(self) -> Lab:
        """The base, loaded once and only if a piece needs it."""
        if self.opened is None:
            base = load_base(self.model, quantize="none")
            rank = self.preset.rank
            lora = LoraSection(rank=rank, alpha=2 * rank, layers=self.preset.layers)
            self.opened = Lab(base, lora, self.preset.longest)
        return self.opened

    def out_of_time(self) -> bool:
        """True once the time that was given is used up."""
        return time.monotonic() > self.deadline

    def result(self, name: str) -> Result:
        """A finished piece's result."""
        found: Result = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return found

    def pool(self, name: str) -> list[list[Answer]]:
        """The sampled answers of a finished piece, by prompt."""
        return [[Answer(**answer) for answer in of_prompt] for of_prompt in self.result(name)["answers"]]


@dataclass(frozen=True)
class Piece:
    """One thing to do. `run` returns None if time ran out before its end."""

    name: str
    run: Callable[[Study], Result | None]


# --- what pieces do -------------------------------------------------------------------------------


def sample_pool(
    study: Study, asked: Sequence[Opening], times: int, *, adapter: str | None, temperature: float
) -> Result:
    """`times` answers to each opening."""
    lab, seed = study.lab, 7919
    ids = lab.ids([one.text for one in asked])
    with costing(lab) as cost, lab.saved(study.folder / adapter if adapter else None) as model:
        drawn = [lab.sample(model, ids, seed=seed * (turn + 1), temperature=temperature) for turn in range(times)]
    answers = [[vars(turn[number]) for turn in drawn] for number in range(len(asked))]
    return {"prompts": [one.text for one in asked], "answers": answers, "cost": vars(cost)}


def evaluate(study: Study, adapter: str) -> Result:
    """Reward and KL from the base of an adapter's answers to the test openings, by opening."""
    lab, times = study.lab, study.preset.test_answers
    ids = lab.ids([one.text for one in study.test])
    with costing(lab) as cost, lab.saved(study.folder / adapter) as model:
        drawn = [lab.sample(model, ids, seed=31_337 * (turn + 1)) for turn in range(times)]
        kls = [kl_of(model, ids, [answer.tokens for answer in turn]) for turn in drawn]
    return {
        "reward": [fmean(turn[number].reward for turn in drawn) for number in range(len(ids))],
        "kl": [fmean(turn[number] for turn in kls) for number in range(len(ids))],
        "tokens": fmean(len(answer.tokens) for turn in drawn for answer in turn),
        "samples": [study.test[i].text + drawn[0][i].text for i in range(0, len(ids), max(1, len(ids) // 4))],
        "cost": vars(cost),
    }


def agree(study: Study, adapter: str) -> Result:
    """How often an adapter's implicit reward orders two answers of the base as the true one does, by test opening."""
    lab, pool = study.lab, [of_prompt[:JUDGED] for of_prompt in study.pool("test-base")]
    ids = lab.ids([one.text for one in study.test])
    with costing(lab) as cost, lab.saved(study.folder / adapter) as model:
        guessed = [
            log_ratios(model, [asked] * len(answers), [answer.tokens for answer in answers])
            for asked, answers in zip(ids, pool, strict=True)
        ]
    true = [[answer.reward for answer in answers] for answers in pool]
    return {"agreement": [agreement(*one) for one in zip(guessed, true, strict=True)], "cost": vars(cost)}


@dataclass(frozen=True)
class Recipe:
    """One DPO run: which pairs, which loss, where it starts."""

    settings: DPOSettings
    pool: str = "pool"
    share: float = 1.0
    """Of the prompts, from the first on."""
    noise: float = 0.0
    start: str | None = None


def run_dpo(study: Study, name: str, recipe: Recipe) -> Result:
    """Pairs from a pool by the true reward, some labels turned round, and DPO on them."""
    lab, pool = study.lab, study.pool(recipe.pool)
    prompts = lab.ids(study.result(recipe.pool)["prompts"])
    used = range(round(recipe.share * len(pool)))
    found = [
        (number, *two)
        for number in used
        for two in best_and_worst([answer.reward for answer in pool[number]], most=study.preset.pairs_a_prompt)
    ]
    labels = flip([(better, worse) for _, better, worse in found], recipe.noise, seed=recipe.settings.seed)
    pairs = pairs_of(prompts, pool, [(number, *two) for (number, _, _), two in zip(found, labels, strict=True)])
    start = study.folder / recipe.start if recipe.start else None
    with costing(lab) as cost:
        train_dpo(lab, pairs, recipe.settings, study.folder / name, start=start)
    return {"pairs": len(pairs), "settings": vars(recipe.settings), "noise": recipe.noise, "cost": vars(cost)}


def run_sft(study: Study, name: str, *, pool: str, seed: int) -> Result:
    """SFT on each prompt's best answer, for as many steps and rows as DPO has pairs."""
    lab, answers = study.lab, study.pool(pool)
    prompts = lab.ids(study.result(pool)["prompts"])
    rows = [
        (prompt, max(of_prompt, key=lambda answer: answer.reward).tokens)
        for prompt, of_prompt in zip(prompts, answers, strict=True)
    ]
    with costing(lab) as cost:
        train_sft(
            lab, rows, study.folder / name, steps=study.preset.dpo_steps, learning_rate=study.preset.dpo_rate, seed=seed
        )
    return {"rows": len(rows), "cost": vars(cost)}


def run_ppo(study: Study, name: str, settings: PPOSettings) -> Result | None:
    """PPO on the training openings, with the true reward; costs add up over interruptions."""
    lab, folder = study.lab, study.folder / name
    spent = folder / "cost.json"
    before = json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else {}
    prompts = lab.ids([one.text for one in study.train])
    with costing(lab) as cost:
        log = train_ppo(lab, prompts, settings, folder, keep=study.preset.keep, out_of_time=study.out_of_time)
    total = {
        "seconds": cost.seconds + before.get("seconds", 0.0),
        "tokens": cost.tokens + before.get("tokens", 0),
        "peak_gb": max(cost.peak_gb, before.get("peak_gb", 0.0)),
    }
    write_json(spent, total)
    return None if log is None else {"log": log, "settings": vars(settings), "cost": total}


# --- the list of pieces ---------------------------------------------------------------------------


def pieces(preset: Preset) -> list[Piece]:
    """Everything that is to be done, in order; a piece needs only pieces above it."""
    found = [
        Piece("pool", lambda s: sample_pool(s, s.train, preset.samples, adapter=None, temperature=1.0)),
        Piece("test-base", lambda s: sample_pool(s, s.test, preset.base_answers, adapter=None, temperature=1.0)),
    ]
    for seed in preset.seeds:
        for beta in preset.betas:
            settings = DPOSettings(beta, preset.dpo_steps, learning_rate=preset.dpo_rate, seed=seed)
            found += _dpo(f"dpo-b{beta:g}-s{seed}", Recipe(settings))
        for weight in preset.kl_weights:
            found += _ppo(preset, weight, seed)
        name = f"sft-s{seed}"
        found += [Piece(name, lambda s, name=name, seed=seed: run_sft(s, name, pool="pool", seed=seed)), _eval(name)]
        name = f"dpo-b{preset.side_beta:g}-s{seed}"
        found.append(Piece(f"agree-{name}", lambda s, name=name: agree(s, name)))
    return found + (_side(preset) if preset.side else [])


def _dpo(name: str, recipe: Recipe) -> list[Piece]:
    return [Piece(name, lambda s: run_dpo(s, name, recipe)), _eval(name)]


def _ppo(preset: Preset, weight: float, seed: int) -> list[Piece]:
    name = f"ppo-w{weight:g}-s{seed}"
    settings = PPOSettings(weight, preset.iterations, preset.rollouts, learning_rate=preset.ppo_rate, seed=seed)
    evals = [_eval(f"{name}/iteration{number}") for number in preset.keep]
    return [Piece(name, lambda s: run_ppo(s, name, settings)), *evals]


def _eval(adapter: str) -> Piece:
    return Piece(f"eval-{adapter.replace('/iteration', '-i')}", lambda s: evaluate(s, adapter))


def _side(preset: Preset) -> list[Piece]:
    """One seed each: noisy labels, little data, off-policy pairs, references, an on-policy round, more steps."""
    beta, steps, seed = preset.side_beta, preset.dpo_steps, preset.seeds[0]

    def settings(**changes: Any) -> DPOSettings:
        return DPOSettings(**{"beta": beta, "steps": steps, "learning_rate": preset.dpo_rate, "seed": seed, **changes})

    found: list[Piece] = []
    for noise in preset.noise:
        for loss in ("plain", "smoothed", "robust"):
            # the losses are told the true share, below the half at which they end
            told = settings(loss=loss, noise=min(noise, 0.45))
            found += _dpo(f"dpo-{loss}-noise{noise:g}", Recipe(told, noise=noise))
    found += _dpo("dpo-quarter", Recipe(settings(), share=0.25))
    # pairs that the base would rarely write: drawn at temperature 1.5
    found.append(Piece("hot", lambda s: sample_pool(s, s.train, preset.samples, adapter=None, temperature=1.5)))
    found += _dpo("dpo-hot", Recipe(settings(), pool="hot"))
    found += [Piece("sft-hot", lambda s: run_sft(s, "sft-hot", pool="hot", seed=seed)), _eval("sft-hot")]
    found += _dpo("dpo-hot-after-sft", Recipe(settings(), pool="hot", start="sft-hot"))
    found += _dpo("dpo-after-sft", Recipe(settings(), start=f"sft-s{seed}"))
    for held, mark in ((beta, ""), (ROUNDS_BETA, f"-b{ROUNDS_BETA:g}")):
        found += _rounds(mark, lambda count, held=held: settings(beta=held, steps=count), steps)
    # is DPO's frontier that of its loss, or of how long it was trained?
    for held in LONGER_BETAS:
        found += _dpo(f"dpo-b{held:g}-twice", Recipe(settings(beta=held, steps=2 * steps)))
    return found


def _rounds(mark: str, settings: Callable[[int], DPOSettings], steps: int) -> list[Piece]:
    """Half of the prompts, then new pairs from that policy for the other half; as many samples and steps in all."""
    first, second, pool = f"dpo-round1{mark}", f"dpo-round2{mark}", f"pool-round2{mark}"
    sample = Piece(
        pool,
        lambda s: sample_pool(s, s.train[len(s.train) // 2 :], s.preset.samples, adapter=first, temperature=1.0),
    )
    return [
        *_dpo(first, Recipe(settings(steps // 2), share=0.5)),
        sample,
        *_dpo(second, Recipe(settings(steps - steps // 2), pool=pool, start=first)),
    ]


# --- running --------------------------------------------------------------------------------------


def run(study: Study, say: Callable[[str], None] = print) -> bool:
    """Do what is left. Returns False if time ran out first."""
    todo = pieces(study.preset)
    study.folder.mkdir(parents=True, exist_ok=True)
    _claim(study)
    for number, piece in enumerate(todo, start=1):
        target = study.folder / f"{piece.name}.json"
        if target.is_file():
            continue
        if study.out_of_time():
            say(f"out of time: {len(todo) - number + 1} of {len(todo)} pieces are left; the same command goes on")
            return False
        started = time.perf_counter()
        with quiet_libraries():
            result = piece.run(study)
        if result is None:
            say(f"out of time inside {piece.name}; the same command goes on")
            return False
        write_json(target, result)
        say(f"{number}/{len(todo)}  {piece.name}  {time.perf_counter() - started:.0f} s  {_headline(result)}")
    return True


def _headline(result: Result) -> str:
    if "reward" in result:
        return f"reward {fmean(result['reward']):+.3f}  KL {fmean(result['kl']):.2f}"
    if "log" in result:
        return f"reward {result['log'][0]['reward']:+.3f} to {result['log'][-1]['reward']:+.3f} while training"
    return ", ".join(f"{result[key]} {key}" for key in ("pairs", "rows") if key in result)


def _claim(study: Study) -> None:
    """Results of other sizes, or another model, are not mixed."""
    path, text = study.folder / "preset.json", {"preset": vars(study.preset), "model": study.model}
    now = json.loads(json.dumps(text))
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != now:
        raise SystemExit(f"{study.folder} holds results of other settings. Remove that folder to start over.")
    write_json(path, now)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


# --- one file of results --------------------------------------------------------------------------


def write_results(work: Path) -> Path:
    """Gather a finished study's pieces into one small file beside them: numbers by prompt, costs, a few samples."""
    import torch

    stored = json.loads((work / "preset.json").read_text(encoding="utf-8"))
    preset = PRESETS[stored["preset"]["name"]]
    found = {}
    for piece in pieces(preset):
        result = json.loads((work / f"{piece.name}.json").read_text(encoding="utf-8"))
        found[piece.name] = _slim(piece.name, result)
    machine = {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "vaderSentiment")}
    target = work / RESULTS
    write_json(target, {**stored, "machine": machine, "versions": versions, "pieces": found})
    return target


def _slim(name: str, result: Result) -> Result:
    if "answers" in result:
        scores = [[answer["reward"] for answer in of_prompt] for of_prompt in result["answers"]]
        return {"scores": scores if name == "test-base" else fmean(map(fmean, scores)), "cost": _short(result["cost"])}
    return {key: _short(value) for key, value in result.items()}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_short(one) for one in value]
    return {key: _short(one) for key, one in value.items()} if isinstance(value, dict) else value


# --- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after about this long")
    parser.add_argument("--model", default="smollm2-135m", help="the base")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where unfinished work is kept")
    parser.add_argument("--plan", action="store_true", help="only say what will be computed")
    given = parser.parse_args(arguments)
    preset = PRESETS[given.preset]
    if given.plan:
        names = [piece.name for piece in pieces(preset)]
        print("\n".join(plan_lines(preset, names, given.work / preset.name)))
        return 0
    study = Study(preset, given.work / preset.name, given.model, deadline=time.monotonic() + 60 * given.minutes)
    try:
        done = run(study)
    except LoraDPOError as error:
        print(f"error: {error}")
        return 1
    if not done:
        return 3
    print(f"written: {os.path.relpath(write_results(study.folder))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
