"""Whether a search found something to learn: every way it can end, from measured values alone."""

from pathlib import Path

import pytest

from lora_dpo.data.doctor.statistics import LengthBias
from lora_dpo.data.pairs import Origin, PreferencePair
from lora_dpo.evaluation.intervals import mean
from lora_dpo.tuning.result import Reported, TuneResult, remarks
from lora_dpo.tuning.score import Measured, score
from lora_dpo.tuning.trials import Trial
from lora_dpo.tuning.verdict import lengths_of, verdict_of


def measured(wins, total=30, **changes):
    right = (1.0,) * wins + (0.0,) * (total - wins)
    values = {"margin": 1.0, "finished": (True,), "tokens": (9,), "repeated": (0.0,), "chosen_tokens": 9.0}
    return Measured(right=right, **{**values, **changes})


def found(seen, fresh, **changes):
    given = {
        "flatters": False,
        "bias": LengthBias(0.6, 0.0, 0.6),
        "chosen_recipe": "adapters/a.search/chosen.yaml",
        "likely_reason": lambda: "The reason.",
    }
    return verdict_of(seen, Reported(fresh, score(fresh, fresh)), **{**given, **changes})


def test_what_is_ranked_right_on_both_parts_is_learnt():
    assert found(measured(25), measured(27)) == (
        "better",
        "90% of pairs that nothing was chosen by are ranked right (95% interval 74% to 97%).",
    )
    assert "90% of the pairs it was chosen by" in found(measured(25), measured(27), flatters=True)[1]


@pytest.mark.parametrize(
    ("seen", "fresh", "said"),
    [(25, 16, "no better than chance"), (16, 27, "of those it was chosen by no more than chance")],
)
def test_chance_on_either_part_is_nothing(seen, fresh, said):
    verdict, reason = found(measured(seen), measured(fresh))
    assert verdict == "nothing to learn"
    assert reason.startswith("Nothing to learn here: ")
    assert said in reason
    assert reason.endswith("The reason.")


@pytest.mark.parametrize(("wins", "verdict"), [(27, "better"), (16, "nothing to learn")])
@pytest.mark.parametrize("longer", [0.0, 1.0])
def test_a_judge_decides_whatever_length_predicts(wins, verdict, longer):
    fresh = measured(27, outcomes=(1.0,) * wins + (0.0,) * (30 - wins), longer_by=(1.0,) * 30)
    told = found(measured(25, outcomes=(1.0,)), fresh, bias=LengthBias(longer, 0.0, 1.0))
    assert told[0] == verdict
    assert ("the judge does not prefer" in told[1]) == (verdict != "better")


def test_labels_that_only_say_longer_are_nothing():
    told = found(measured(30), measured(30), bias=LengthBias(0.97, 0.0, 0.97))
    assert told[0] == "nothing to learn"
    assert "'the longer answer is the better one' (in characters) is right for 97% of the pairs" in told[1]
    assert "lora-dpo train adapters/a.search/chosen.yaml" in told[1]


def test_that_the_shorter_is_better_may_be_all_that_is_wanted():
    told = found(measured(30), measured(30), bias=LengthBias(0.02, 0.02, 0.97))
    assert told[0] == "better"
    assert "say no more than a length" in told[1]
    assert "'the shorter answer is the better one'" in told[1]


@pytest.mark.parametrize("longer", [0.06, 0.94])
def test_a_label_in_twenty_that_length_does_not_tell_is_something(longer):
    assert found(measured(30), measured(30), bias=LengthBias(longer, 0.0, 0.94))[0] == "better"
    assert "length" not in found(measured(30), measured(30), bias=LengthBias(longer, 0.0, 0.94))[1]


@pytest.mark.parametrize(
    ("number", "gain", "said"),
    [
        (0, mean([0.0, 0.0]), "nothing that was tried beats it"),
        (3, mean([0.0, 0.0, 0.0]), "On all 3 prompts the recipe as it was given does as well in quality."),
        (3, mean([0.2, 0.3, 0.4]), "It beats the recipe as it was given by 0.300 in quality, 95% interval 0."),
        (3, mean([-0.2, 0.3, 0.4]), "cannot be told from 3 prompts: by 0.167 in quality, 95% interval -"),
        (3, None, ""),
    ],
)
def test_what_is_said_of_the_choice(number, gain, said):
    trial = Trial(number, {"trainer.beta": 0.1, "lora.rank": 4}, 0)
    result = TuneResult("better", "", None, None, Path("a.search"), (trial,), trial, gain=gain)
    first, *more = remarks(result)
    assert first == f"Chosen: candidate {number}, beta 0.1, rank 4."
    assert len(more) == bool(said)
    assert not more or said in more[0]


def test_of_no_choice_nothing_is_said():
    assert list(remarks(TuneResult("no healthy run", "", None, None, Path("a.search"), (), None))) == []


def test_lengths_leave_thoughts_out():
    def pair(chosen, rejected):
        sides = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        return PreferencePair([{"role": "user", "content": "q"}], *sides, origin=Origin("data", 1))

    pairs = [pair("a longer one", "short"), pair("short", "<think>\na long, long thought\n</think>\n\nno")]
    assert lengths_of(pairs) == LengthBias(1.0, 0.0, 1.0)
    assert lengths_of([pair("no", "yes"), *pairs, pair("no", "so")]) == LengthBias(0.5, 0.25, 0.625)
