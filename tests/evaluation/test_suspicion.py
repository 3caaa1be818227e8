"""Pairs that disagree with the rest: the order by worked numbers, by a run's own margins, and scored anew."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from lora_dpo import load_policy, read_pairs
from lora_dpo.adapters.stored_margins import PairMargin, write_margins
from lora_dpo.data import Origin
from lora_dpo.data.pairs import pair_mark
from lora_dpo.data.write import write_rows
from lora_dpo.errors import DataError
from lora_dpo.evaluation import suspicious_pairs
from lora_dpo.evaluation.suspicion import by_suspicion, doubt_of, loss_of, ordered_rows
from lora_dpo.events import Progress


@pytest.mark.parametrize("margin", [-800.0, -3.0, 0.0, 0.25, 40.0, 9e4])
def test_doubt_and_loss_are_those_of_the_bradley_terry_model(margin):
    scaled = torch.tensor(0.1 * margin, dtype=torch.float64)
    assert doubt_of(margin, 0.1) == pytest.approx(torch.sigmoid(-scaled).item(), abs=1e-12)
    assert loss_of(margin, 0.1) == pytest.approx(-logsigmoid(scaled).item(), rel=1e-9, abs=1e-12)


def margin(row, mean, mark=""):
    return PairMargin(Origin("a.jsonl", row), mark, None, mean, mean, 0 if mean is None else 1)


def test_the_most_negative_margin_comes_first_and_ties_stay_in_order():
    margins = [margin(1, 2.0), margin(2, -1.0), margin(3, None), margin(4, 0.0), margin(5, -7.0), margin(6, 0.0)]
    assert [one.origin.row for one in by_suspicion(margins)] == [5, 2, 4, 6, 1]


# --- of a file ------------------------------------------------------------------------------------


@pytest.fixture
def place(tiny_adapter, write_pairs, tmp_path, monkeypatch):
    """An adapter and six pairs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_adapter, "mine")
    write_pairs("pairs.jsonl", count=6)


def keep(*means):
    """Write margins of the first pairs into the adapter's folder."""
    pairs, _ = read_pairs("pairs.jsonl")
    rows = [PairMargin(pair.origin, pair_mark(pair), 0.5, mean, mean, 1)
            for pair, mean in zip(pairs, means, strict=False)]  # fmt: skip
    write_margins(Path("mine"), rows)


def rows_of(found):
    return [one.pair.origin.row for one in found.pairs]


def test_a_file_that_the_run_knows_is_ordered_without_a_model(place, loads):
    keep(3.0, -2.0, 1.0, -9.0, 0.5, 2.0)
    found = suspicious_pairs("pairs.jsonl", "mine")
    assert rows_of(found) == [4, 2, 5, 3, 6, 1]
    assert (found.scored, found.against, loads) == (False, 2, [])
    first = found.pairs[0]
    assert (first.margin, first.before, first.after) == (-9.0, 0.5, -9.0)
    assert first.doubt == pytest.approx(doubt_of(-9.0, 0.1))


def test_pairs_are_known_by_what_they_say_and_not_by_their_places(place, loads):
    keep(3.0, -2.0, 1.0, -9.0, 0.5, 2.0)
    lines = Path("pairs.jsonl").read_text().splitlines()
    Path("other.jsonl").write_text("".join(line + "\n" for line in reversed(lines[1:])))
    assert rows_of(suspicious_pairs("other.jsonl", "mine")) == [3, 5, 2, 4, 1]
    assert loads == []


def test_other_pairs_are_all_scored_with_the_adapter_and_its_reference(place):
    keep(3.0, -2.0, 1.0)  # of three pairs alone
    events = []
    found = suspicious_pairs("pairs.jsonl", "mine", on_event=events.append)
    assert found.scored
    assert [one.margin for one in found.pairs] == sorted(one.margin for one in found.pairs)
    assert sorted(rows_of(found)) == [1, 2, 3, 4, 5, 6]
    assert {one.pair.origin.row for one in found.pairs if one.before is not None} == {1, 2, 3}
    assert Progress("pairs, adapter", 6, 6) in events
    # one by hand
    policy, one = load_policy(adapter=Path("mine")), found.pairs[0]
    texts = [
        policy.base.tokenizer.apply_chat_template([*one.pair.prompt, *side], tokenize=False).rstrip()
        for side in (one.pair.chosen, one.pair.rejected)
    ]
    begin = len(policy.base.tokenizer.apply_chat_template(one.pair.prompt, add_generation_prompt=True)["input_ids"])

    def logp(text):
        ids = torch.tensor([policy.base.tokenizer(text, add_special_tokens=False)["input_ids"]])
        table = torch.log_softmax(policy.model(input_ids=ids).logits[0, begin - 1 : -1].float(), dim=-1)
        return table.gather(1, ids[0, begin:, None]).sum().item()

    with torch.no_grad():
        ours = logp(texts[0]) - logp(texts[1])
        with policy.model.disable_adapter():
            theirs = logp(texts[0]) - logp(texts[1])
    assert one.margin == pytest.approx(ours - theirs, abs=1e-3)
    assert abs(one.margin) > 0.01


def test_a_pair_that_is_too_long_is_left_out_and_said(place):
    said = {"prompt": "x" * 2000, "chosen": "yes", "rejected": "no"}
    Path("pairs.jsonl").write_text(Path("pairs.jsonl").read_text() + json.dumps(said) + "\n")
    found = suspicious_pairs("pairs.jsonl", "mine")
    assert [one.origin.row for one in found.dropped] == [7]
    assert len(found.pairs) == 6
    assert found.reasons() == [("prompt fills max_length (1024 tokens)", 1)]


def test_the_ordered_rows_are_the_same_pairs_with_their_places(place):
    keep(3.0, -2.0, 1.0, -9.0, 0.5, 2.0)
    found = suspicious_pairs("pairs.jsonl", "mine")
    write_rows(ordered_rows(found), Path("ordered.jsonl"))
    rows = [json.loads(line) for line in Path("ordered.jsonl").read_text().splitlines()]
    assert [row["learned"]["row"] for row in rows] == [4, 2, 5, 3, 6, 1]
    assert rows[0]["learned"] == {"file": "pairs.jsonl", "row": 4, "doubt": 0.7109, "margin": -9.0, "before": 0.5,
                                  "after": -9.0}  # fmt: skip
    again, _ = read_pairs("ordered.jsonl")
    assert [pair_mark(pair) for pair in again] == [pair_mark(one.pair) for one in found.pairs]


def test_a_file_without_a_pair_is_an_error(place):
    Path("pairs.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="no usable pair"):
        suspicious_pairs("pairs.jsonl", "mine")
