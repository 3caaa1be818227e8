import json

import pytest

from lora_dpo.data.prompts import Prompt
from lora_dpo.errors import DataError
from lora_dpo.evaluation.win_rate import judged, voted
from lora_dpo.judging import Judge
from lora_dpo.model.decoding import Answer


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


def vote(verdict, a="base", b="mine", text_a="one two", text_b="one", prompt="q"):
    origin = {"vote": verdict, "shown": [a, b]}
    prompt = [{"role": "user", "content": prompt}]
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
    cast = [("b", "base"), ("b", "base"), ("a", "base"), ("both good", "base"), ("skip", "base"), ("a", "other")]
    path = votes(*(vote(verdict, a=a, prompt=f"q{number}") for number, (verdict, a) in enumerate(cast)))
    found = voted(path, us="mine", against="base")
    assert sorted(found.outcomes) == [0.0, 0.5, 1.0, 1.0]
    assert found.counts == (2, 1, 1)
    assert set(found.longer_by) == {-1.0}
    other_side = voted(path, us="base", against="mine")
    assert sorted(1 - value for value in other_side.outcomes) == sorted(found.outcomes)


def test_votes_on_one_prompt_are_one_unit(votes):
    many = [vote("b"), vote("b"), vote("a"), vote("both bad", text_b="one two three")]
    found = voted(votes(*many, vote("a", prompt="other")), us="mine", against="base")
    assert sorted(found.outcomes) == [0.0, 2.5 / 4]
    assert sorted(found.longer_by) == [-1.0, (3 * -1 + 1) / 4]
    assert (found.votes, found.win_rate.n, found.counts) == (5, 2, (1, 0, 1))


def of(row, *, mine=None, base=None):
    """The same vote, with the adapter's hash and the base's fingerprint in its origin."""
    for side in ("chosen", "rejected", "a", "b"):
        if mine and row["origin"].get(side, {}).get("who") == "mine":
            row["origin"][side]["adapter_sha256"] = mine
    if base:
        row["origin"]["model_fingerprint"] = base
    return row


def test_votes_on_other_weights_or_another_base_are_left_out(votes):
    path = votes(
        of(vote("b", prompt="1"), mine="aaa", base="fff"),
        vote("b", prompt="2"),  # says nothing: taken
        of(vote("a", prompt="3"), mine="bbb", base="fff"),
        of(vote("both good", prompt="4"), mine="bbb"),
        of(vote("a", prompt="5"), mine="aaa", base="eee"),
    )
    found = voted(path, us="mine", against="base", weights={"mine": "aaa"}, base="fff")
    assert (found.outcomes, found.foreign) == ((1.0, 1.0), 3)
    assert found.to_json()["foreign_votes"] == 3
    assert voted(path, us="mine", against="base").foreign == 0
    with pytest.raises(DataError, match="5 votes under these names are on other weights or another base"):
        voted(votes(*(of(vote("a"), mine="bbb") for _ in range(5))), us="mine", against="base", weights={"mine": "aaa"})


def test_no_vote_between_the_two_is_said_with_whom_there_are_votes_on(votes):
    with pytest.raises(DataError, match=r"no vote between mine and other.*base, mine"):
        voted(votes(vote("a")), us="mine", against="other")


def test_ordinary_pairs_are_no_votes(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="no vote"):
        voted(str(tmp_path / "pairs.jsonl"), us="mine", against="base")
