import json

import pytest

from lora_dpo.contest import judged, voted
from lora_dpo.errors import DataError
from lora_dpo.generate import Answer
from lora_dpo.judges import Judge
from lora_dpo.prompts import Prompt


def prompts(count):
    return [Prompt(({"role": "user", "content": f"question {number}"},), "p.txt", number) for number in range(count)]


def answer(text, tokens=None):
    return Answer(text, len(text.split()) if tokens is None else tokens, True)


def judge(function):
    return Judge("test", function)


LONGER_IS_BETTER = judge(lambda prompt, answers: [float(len(one.text)) for one in answers])


def test_outcomes_of_a_worked_example():
    ours = [answer("aaa bb"), answer("a"), answer("same")]
    theirs = [answer("a"), answer("aaa bb"), answer("same")]
    found = judged(prompts(3), ours, theirs, LONGER_IS_BETTER, against="base")
    assert found.outcomes == (1.0, 0.0, 0.5)
    assert found.counts == (1, 1, 1)
    assert found.longer_by == (1.0, -1.0, 0.0)
    assert found.win_rate.value == 0.5
    assert found.to_json()["contradicted"] == 0


def test_a_judge_that_looks_at_places_alone_decides_nothing():
    first_wins = judge(lambda prompt, answers: [1.0, 0.0])
    found = judged(prompts(4), [answer("a")] * 4, [answer("b")] * 4, first_wins, against="base")
    assert found.outcomes == (0.5,) * 4
    assert found.contradicted == 4


def test_a_winner_in_one_order_and_a_tie_in_the_other_has_won():
    def half_placed(prompt, answers):
        return [1.0, 0.0] if answers[0].text == "ours" else [0.5, 0.5]

    found = judged(prompts(1), [answer("ours")], [answer("theirs")], judge(half_placed), against="base")
    assert found.outcomes == (1.0,)
    assert found.contradicted == 0


def test_swapping_the_models_mirrors_the_outcomes():
    one, other = [answer("aa"), answer("b"), answer("c c")], [answer("a"), answer("bb"), answer("c c")]
    forth = judged(prompts(3), one, other, LONGER_IS_BETTER, against="x")
    back = judged(prompts(3), other, one, LONGER_IS_BETTER, against="x")
    assert [1 - value for value in back.outcomes] == list(forth.outcomes)
    assert back.win_rate.value == pytest.approx(1 - forth.win_rate.value)


def test_what_cannot_be_judged_is_left_out_and_counted():
    sometimes = judge(lambda prompt, answers: [None, None] if prompt.row == 1 else [1.0, 1.0])
    found = judged(prompts(3), [answer("a")] * 3, [answer("b")] * 3, sometimes, against="base")
    assert (len(found.outcomes), found.unjudged) == (2, 1)
    nothing = judge(lambda prompt, answers: [None, None])
    with pytest.raises(DataError, match="could score no prompt"):
        judged(prompts(2), [answer("a")] * 2, [answer("b")] * 2, nothing, against="base")


# --- votes ----------------------------------------------------------------------------------------


def vote(verdict, a="base", b="mine", text_a="one two", text_b="one"):
    origin = {"vote": verdict, "shown": [a, b]}
    prompt = [{"role": "user", "content": "q"}]
    if verdict in ("a", "b"):
        sides = [(a, text_a), (b, text_b)]
        (won, chosen), (lost, rejected) = sides if verdict == "a" else sides[::-1]
        return {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "origin": {**origin, "chosen": {"who": won}, "rejected": {"who": lost}},
        }
    sides = {"a": {"who": a}, "b": {"who": b}}
    return {"prompt": prompt, "a": text_a, "b": text_b, "verdict": verdict, "origin": {**origin, **sides}}


@pytest.fixture
def votes(tmp_path):
    def write(*rows):
        decided = [row for row in rows if "chosen" in row]
        others = [row for row in rows if "chosen" not in row]
        for name, some in (("votes.jsonl", decided), ("votes.other.jsonl", others)):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
        return str(tmp_path / "votes.jsonl")

    return write


def test_votes_are_counted_from_our_side(votes):
    path = votes(vote("b"), vote("b"), vote("a"), vote("both good"), vote("skip"), vote("a", a="other"))
    found = voted(path, us="mine", against="base")
    assert sorted(found.outcomes) == [0.0, 0.5, 1.0, 1.0]
    assert found.counts == (2, 1, 1)
    assert set(found.longer_by) == {-1.0}
    other_side = voted(path, us="base", against="mine")
    assert sorted(1 - value for value in other_side.outcomes) == sorted(found.outcomes)


def test_no_vote_between_the_two_is_said_with_whom_there_are_votes_on(votes):
    with pytest.raises(DataError, match=r"no vote between mine and other.*base, mine"):
        voted(votes(vote("a")), us="mine", against="other")


def test_ordinary_pairs_are_no_votes(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="no vote"):
        voted(str(tmp_path / "pairs.jsonl"), us="mine", against="base")
