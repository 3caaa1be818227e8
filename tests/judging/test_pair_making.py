"""Pairs from sampled answers: what is read, what is chosen, what is recorded, and going on after a kill."""

import gzip
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lora_dpo.judging.samples
from lora_dpo.adapters.loading import LoadedModel, attach_reference, load_policy
from lora_dpo.cli.commands import main
from lora_dpo.config.recipe import LoraSection
from lora_dpo.data import read_pairs
from lora_dpo.data.journal import Journal, alone, write_new
from lora_dpo.data.prompts import Prompt, prompts_with_report, read_prompts
from lora_dpo.errors import AdapterError, ConfigError, DataError, JudgeError, OutputError
from lora_dpo.judging.judge import Judge
from lora_dpo.judging.pair_making import Selection, choose, make_pairs
from lora_dpo.judging.policy_and_judge import load_with_judge
from lora_dpo.judging.samples import SamplePlan, batch_seed, conversation, sample_answers
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Answer, Sampling, generate
from lora_dpo.model.lora import attach_lora

PLAN = SamplePlan(answers=3, sampling=Sampling(max_new_tokens=10, temperature=1.0, seed=5), batch_size=4)


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(autouse=True)
def answers_end(monkeypatch):
    """A random model hardly ever ends its turn: let some bytes do it."""
    module = importlib.import_module("lora_dpo.model.decoding")
    monkeypatch.setattr(module, "stop_token_ids", lambda model, tokenizer: frozenset({*range(100, 130), 257}))


@pytest.fixture(scope="module")
def policy(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
    return LoadedModel(base, base.model)


@pytest.fixture
def prompts():
    Path("prompts.txt").write_text("".join(f"Say {'very ' * number}well.\n" for number in range(5)), encoding="utf-8")
    return read_prompts("prompts.txt")


def longest(prompt, answers):
    return [len(answer.text) for answer in answers]


LONGEST = Judge("mine:longest", longest)


# --- prompts --------------------------------------------------------------------------------------


def test_text_has_a_prompt_a_line():
    Path("p.txt").write_text("\ufeffOne?\n\n  # Two? \nOne?\n", encoding="utf-8")
    found = read_prompts("p.txt")
    assert [(prompt.text, prompt.row) for prompt in found] == [("One?", 1), ("# Two?", 3)]
    assert found[0].messages == ({"role": "user", "content": "One?"},)


def test_rows_have_text_or_messages_and_known_answers():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]
    rows = [{"prompt": "One?", "accepted": ["1", 1]}, {"prompt": turns}, {"messages": [turns[1]], "accepted": "2"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts("p.jsonl")
    assert [prompt.text for prompt in found] == ["One?", "Two?", "Two?"]
    assert [prompt.accepted for prompt in found] == [("1", "1"), (), ("2",)]
    assert found[1].messages == tuple(turns)


def test_preference_data_gives_its_prompts(write_pairs):
    found = read_prompts(str(write_pairs(count=4)))
    assert [prompt.row for prompt in found] == [1, 2, 3, 4]
    implicit = [{"role": "user", "content": "Hi"}]
    row = {side: [*implicit, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    Path("implicit.jsonl").write_text(json.dumps(row))
    assert read_prompts("implicit.jsonl")[0].messages == tuple(implicit)


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
BEFORE = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]
CALLS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "rain", "arguments": "{}"}}]},
    {"role": "tool", "content": "3 mm", "name": "rain"},
]
CALLED = [{"type": "function", "function": {"name": "rain", "arguments": {}}}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": BEFORE, "answers": [{"answer": a, "rank": r} for a, r in (("b", 1), ("c", 2))]}, TURNS),
        ({"prompt": BEFORE, "answers": [{"answer": a, "rank": 1} for a in "bc"]}, TURNS),  # a tie, but a prompt
        ({"prompt": BEFORE, "chosen": " So.", "rejected": " Dunno."}, TURNS),
        ({"prompt": BEFORE}, TURNS),
        ({"prompt": json.dumps(ASKED)}, ASKED),
        ({"prompt": str(ASKED), "chosen": "So.", "rejected": "Dunno."}, ASKED),
        ({"prompt": "Why?", "system": "Be brief."}, ASKED),
        ({"prompt": "Why?", "system": "Be brief.", "chosen": "So.", "rejected": "Dunno."}, ASKED),
        ({"messages": [*ASKED, {"role": "assistant", "content": "So."}], "label": False}, ASKED),
        ({"messages": ASKED, "completion": "So.", "label": True}, ASKED),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, ASKED[1:]),
        ({"prompt": CALLS}, [CALLS[0], {**CALLS[1], "tool_calls": CALLED}, CALLS[2]]),
        ({"prompt": "Why?", "answers": ["So."]}, ASKED[1:]),  # a column of the user's own
        ({"prompt": "Why?", "chosen": "a", "rejected": "a"}, ASKED[1:]),
        ({"prompt": "What does '\n\nHuman: Hi\n\nAssistant:' mean?"}, None),
    ],
)
def test_a_prompt_is_what_its_form_says(row, messages):
    Path("p.jsonl").write_text(json.dumps(row))
    [found] = read_prompts("p.jsonl")
    assert list(found.messages) == (messages or [{"role": "user", "content": row["prompt"]}])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "system": "Be brief.", "chosen": "", "rejected": "b"},
        {"question": "Why?", "system": "Be brief.", "chosen": "b", "rejected": "b", "chosen_score": 1},
        {"instruction": "Why?", "system": "Be brief.", "chosen": "b", "rejected": "b"},
        {"input": "Why?", "system": "Be brief.", "chosen": "b"},
        {"input": "Why?", "system": "Be brief.", "chosen_response": "b", "rejected_response": "b"},
        {"conversations": [{"from": "human", "value": "Why?"}], "system": "Be brief.", "chosen": "b", "rejected": "b"},
    ],
)
def test_a_prompt_is_asked_although_its_answers_make_no_pair(row):
    Path("p.jsonl").write_text(json.dumps(row))
    [found] = read_prompts("p.jsonl")
    assert list(found.messages) == ASKED


def test_rows_without_a_prompt_are_left_out_and_counted():
    rows = [
        {"question": "yes?", "chosen": "yes", "rejected": "no"},
        {"text": "b?"},
        {"prompt": " "},
        {"chosen": "a", "rejected": "a"},
        {"prompt": "yes?"},
        {"prompt": "sure?"},
        {"prompt": "well?"},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, report = prompts_with_report("p.jsonl")
    assert [(prompt.text, prompt.row) for prompt in found] == [("yes?", 1), ("sure?", 6), ("well?", 7)]
    assert (report.rows, report.kept, report.left_out.total()) == (7, 3, 4)
    assert report.summary("p.jsonl") == (
        "3 of 7 rows of p.jsonl; left out: 1 without 'prompt', 1 empty prompt, 1 chosen equals rejected, "
        "1 a repeated prompt"
    )
    _, limited = prompts_with_report("p.jsonl", limit=1)
    assert limited.summary("p.jsonl").startswith("1 of 7 rows of p.jsonl; left out: 2 beyond the limit")
    Path("p.txt").write_text("One?\n\nTwo?\nOne?\n")
    assert prompts_with_report("p.txt")[1].summary("p.txt") == "2 of 3 rows of p.txt; left out: 1 a repeated prompt"


def test_a_form_can_be_forced_on_prompts():
    Path("p.jsonl").write_text(json.dumps({"prompt": "Not this.", "question": "This?", "chosen": "a", "rejected": "b"}))
    assert [prompt.text for prompt in read_prompts("p.jsonl")] == ["Not this."]
    assert [prompt.text for prompt in read_prompts("p.jsonl", format="orca")] == ["This?"]
    with pytest.raises(ConfigError, match="Did you mean orca"):
        read_prompts("p.jsonl", format="orcas")
    Path("p.txt").write_text("One?")
    with pytest.raises(ConfigError, match=r"changes nothing with p\.txt: a \.txt holds one prompt a line"):
        read_prompts("p.txt", format="orca")


def test_known_answers_of_a_csv_cell_are_a_list():
    Path("p.csv").write_text(
        'prompt,accepted\nOne?,"[""x"", ""y""]"\nTwo?,"[1, 2)"\nThree?,\nFour?," [4] "\nFive?,true\n'
    )
    known = [prompt.accepted for prompt in read_prompts("p.csv")]
    assert known == [("x", "y"), ("[1, 2)",), (), ("4",), ("true",)]


def test_known_answers_of_a_repeated_prompt_add_up():
    rows = [{"prompt": "Two?", "accepted": known} for known in ("2", ["two", "2"], "ii")]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [found] = read_prompts("p.jsonl")
    assert (found.accepted, found.row) == (("2", "two", "ii"), 1)


@pytest.mark.parametrize("name", ["prompts.tx", "promts.txt", "prompt"])
def test_a_mistyped_file_of_prompts_is_answered_with_the_one_that_is_here(prompts, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=rf"{name} does not exist.*Did you mean prompts\.txt\?"):
        read_prompts(name)


def test_a_folder_of_prompts_is_read_file_by_file():
    Path("p").mkdir()
    Path("p/b.jsonl").write_text(json.dumps({"prompt": "Two?"}))
    Path("p/a.csv").write_text("prompt,accepted\nOne?,1\n")
    assert [(prompt.text, prompt.source, prompt.accepted) for prompt in read_prompts("p")] == [
        ("One?", "p/a.csv", ("1",)),
        ("Two?", "p/b.jsonl", ()),
    ]


def test_a_line_of_text_is_one_prompt_whatever_is_in_it():
    Path("p.txt").write_bytes("One\u2028line?\r\nTwo\x85?\n".encode())
    assert [prompt.text for prompt in read_prompts("p.txt")] == ["One\u2028line?", "Two\x85?"]


def test_a_limit_is_spread_over_the_file():
    Path("p.txt").write_text("\n".join(map(str, range(10))))
    assert [prompt.text for prompt in read_prompts("p.txt", limit=4)] == ["0", "2", "5", "7"]
    assert len(read_prompts("p.txt", limit=40)) == 10


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "none.txt does not exist"),
        ("empty.txt", b" \n\n", "holds no prompt"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text (byte 3)"),
        ("p.jsonl", b'{"text": "b"}', "p.jsonl, row 1: without 'prompt'. A prompt is text"),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl, row 1: prompt is neither text"),
        ("p.jsonl", b'{"prompt": []}', "p.jsonl, row 1: empty prompt. A prompt is text, or messages that end where"),
        ("p.jsonl", b'{"prompt": " "}', "p.jsonl, row 1: empty prompt"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}', "p.jsonl, row 1: prompt holds half of a character"),
        (
            "p.jsonl",
            b'{"prompt": [{"role": "bot", "content": "a"}]}',
            "prompt has a message with an unknown role ('bot')",
        ),
        ("p.jsonl", b'{"prompt": [{"role": "assistant", "content": "a"}]}', "ends with the assistant"),
        (
            "p.jsonl",
            b'{"prompt": "a", "tools": [{"name": "f"}]}',
            "p.jsonl, row 1: it has tools, which are not offered",
        ),
        (
            "p.jsonl",
            b'{"question": " ", "chosen": "b", "rejected": "b"}',
            "holds no prompt: p.jsonl, row 1: empty prompt",
        ),
        ("p.jsonl", b'{"prompt": "a", "accepted": {"b": 1}}', "row 1: 'accepted' must be"),
        ("p.jsonl", b'{"prompt": "a", "accepted": true}', "row 1: 'accepted' must be a text or a list of texts; it is"),
        ("p.jsonl", b'{"prompt": "a", "accepted": ["b", false]}', "row 1: 'accepted' must be"),
        (
            "p.csv",
            b"prompt,accepted\na,\"['b', 'c']\"\n",
            "row 2: 'accepted' must be a text or a list of texts, in a table a",
        ),
    ],
)
def test_prompts_that_cannot_be_used_are_named(name, content, says):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(says)):
        read_prompts(name)


# --- choosing -------------------------------------------------------------------------------------


def some(*texts, cut=()):
    return [Answer(text, 1, index not in cut) for index, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("answers", "scores", "selection", "pairs"),
    [
        (some("a", "b", "c"), [1, 3, 2], {}, [(1, 0)]),
        (some("a", "b", "c"), [1, 3, 2], {"select": "gaps"}, [(1, 0), (1, 2), (2, 0)]),
        (some("a", "b", "c"), [1, 3, 2], {"select": "gaps", "min_gap": 1.5}, [(1, 0)]),
        (some("a", "b", "c"), [1, 3, 2], {"min_gap": 2.0}, [(1, 0)]),
        (some("a", "b", "c"), [1, 3, 2], {"min_gap": 2.1}, []),
        (some("a", "b"), [1, 1], {"select": "gaps"}, []),
        (some("a", "a"), [1, 2], {}, []),
        (some("a", "b", "c", cut=[1]), [1, 3, 2], {}, [(2, 0)]),
        (some("a", "b", "c", cut=[0]), [1, 3, 2], {}, [(1, 0)]),
        (some("a", "b", cut=[0, 1]), [1, 2], {}, []),
        (some("a", "", "c"), [1, 0, 2], {}, [(2, 0)]),
        (some("a", "b", "c"), [None, 3, 2], {}, [(1, 2)]),
        (some("a", "b"), [None, None], {}, []),
    ],
)
def test_what_is_chosen(answers, scores, selection, pairs):
    found, reason = choose(answers, scores, Selection(**selection))
    assert found == pairs
    assert bool(reason) == (not pairs)


# --- sampling -------------------------------------------------------------------------------------


def sample(policy, prompts, plan=PLAN, name="s.jsonl"):
    return sample_answers(policy.model, policy.base.tokenizer, prompts, plan, journal=Path(name), policy={"model": "m"})


def texts(samples):
    return [[sample.answer for sample in row] for row in samples]


def test_every_prompt_gets_its_answers_and_they_differ(policy, prompts):
    found = sample(policy, prompts)
    assert [[sample.id for sample in row] for row in found] == [[f"{p}/{a}" for a in range(3)] for p in range(5)]
    assert len({answer.text for row in texts(found) for answer in row}) > 10
    assert {answer.finished for row in texts(found) for answer in row} == {True, False}


def test_an_answer_can_be_drawn_again_from_what_is_recorded(policy, prompts):
    found = sample(policy, prompts)
    rows = [json.loads(line) for line in Path("s.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    batch = [row for row in rows if row["batch"] == 1]
    chats = [prompts[row["prompt"]].messages for row in batch]
    sampling = Sampling(max_new_tokens=10, temperature=1.0, seed=batch[0]["seed"])
    again = generate(policy.model, policy.base.tokenizer, chats, sampling=sampling)
    assert again == [found[row["prompt"]][row["answer"]].answer for row in batch]


@pytest.mark.parametrize("kept", [0, 1, 2, 5, 6, 9, 16])
@pytest.mark.parametrize("cut", [0, 7])
def test_a_killed_run_goes_on_to_the_same_answers(policy, prompts, monkeypatch, kept, cut):
    whole = texts(sample(policy, prompts, name="whole.jsonl"))
    lines = Path("whole.jsonl").read_bytes().splitlines(keepends=True)
    Path("s.jsonl").write_bytes(b"".join(lines[:kept]) + (lines[kept][:cut] if kept < len(lines) else b""))
    drawn = []
    real = generate
    monkeypatch.setattr(lora_dpo.judging.samples, "generate", lambda *a, **n: drawn.append(len(a[2])) or real(*a, **n))
    assert texts(sample(policy, prompts)) == whole
    assert sum(drawn) == 15 - 4 * (max(0, kept - 1) // 4) if kept < 16 else drawn == []


@pytest.mark.parametrize(
    ("change", "key"),
    [({"answers": 4}, "answers"), ({"system": "Hi"}, "system"), ({"sampling": Sampling(seed=6)}, "temperature")],
)
def test_answers_of_other_settings_are_never_mixed_in(policy, prompts, change, key):
    sample(policy, prompts)
    before = Path("s.jsonl").read_bytes()
    from dataclasses import replace

    with pytest.raises(OutputError, match=rf"begun with other settings \({key} was"):
        sample(policy, prompts, replace(PLAN, **change))
    with pytest.raises(OutputError, match="prompts_sha256"):
        sample(policy, prompts[:4])
    assert Path("s.jsonl").read_bytes() == before


def test_seeds_of_batches_and_of_neighbouring_runs_are_all_different():
    assert len({batch_seed(seed, batch) for seed in range(20) for batch in range(20)}) == 400


def test_a_system_turn_is_asked_and_not_kept(policy, prompts):
    from dataclasses import replace

    loud = texts(sample(policy, prompts, replace(PLAN, system="Shout.")))
    assert loud != texts(sample(policy, prompts, name="plain.jsonl"))


def test_a_prompt_with_a_system_turn_keeps_its_own():
    own = Prompt(tuple(ASKED), "p", 1)
    assert conversation(own, "Shout.") == ASKED
    assert conversation(Prompt((ASKED[1],), "p", 1), "Shout.")[0] == {"role": "system", "content": "Shout."}


# --- the journal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"hello\n", b"[1]\n", b"{}\n", b'{"settings": 1}\n', b"\xff\n", b'{"a": 1}\nx\n'])
def test_a_file_that_is_no_journal_is_left_alone(content):
    Path("j").write_bytes(content)
    with pytest.raises(OutputError):
        Journal(Path("j"), {"a": 1})
    assert Path("j").read_bytes() == content


def test_a_journal_of_answers_with_line_separators_goes_on():
    rows = [{"text": text} for text in ("a\u2028b", "c\u2029d", "e\x85f\x0bg")]
    Journal(Path("j"), {"a": "x\u2028y"}).append(rows)
    assert Journal(Path("j"), {"a": "x\u2028y"}).rows == rows


def test_a_journal_without_rows_is_begun_anew_with_other_settings():
    for settings in ({"judge": "mine:broken"}, {"judge": "mine:corrected", "facts": {"by": 2}}):
        assert Journal(Path("j"), settings).rows == []
        assert rows_of("j") == [{"settings": settings}]
    Journal(Path("j"), settings).append([{"scores": [1]}])
    with pytest.raises(OutputError, match=r"\(facts was \{'by': 2\}, now \{'by': 3\}\)\. Do that\."):
        Journal(Path("j"), {**settings, "facts": {"by": 3}}, instead="Do that.")
    assert Journal(Path("j"), settings).rows == [{"scores": [1]}]


def test_two_processes_never_write_to_one_place():
    with alone(Path("x")):
        code = "from lora_dpo.data.journal import alone; from pathlib import Path\nwith alone(Path('x')): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "Another process is writing x" in done.stderr
    with alone(Path("x")):
        pass
    assert not Path("x.lock").exists()


def test_a_new_file_never_replaces_one():
    write_new(Path("a/b"), "1")
    with pytest.raises(OutputError, match="never overwritten"):
        write_new(Path("a/b"), "2")
    assert Path("a/b").read_text() == "1"
    assert os.listdir("a") == ["b"]


# --- the whole ------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_pairs_are_training_data_and_say_where_they_come_from(policy, prompts):
    report = make_pairs(prompts, policy, LONGEST, Path("out/p.jsonl"), plan=PLAN)
    assert report.prompts == 5
    assert report.answers == 15
    assert report.pairs == len(rows_of("out/p.jsonl")) == report.prompts - sum(report.skipped.values()) > 0
    assert report.chosen_longer >= 0
    pairs, read = read_pairs("out/p.jsonl")
    assert (len(pairs), read.dropped) == (report.pairs, [])
    samples = {f"{row['prompt']}/{row['answer']}": row for row in rows_of("out/p.jsonl.samples.jsonl")[1:]}
    for row in rows_of("out/p.jsonl"):
        origin = row["origin"]
        assert row["chosen_score"] > row["rejected_score"]
        for side in ("chosen", "rejected"):
            drawn = samples[origin["answers"][side]]
            assert row[side] == [{"role": "assistant", "content": drawn["text"]}]
            assert origin["seeds"][side] == drawn["seed"]
            assert len(drawn["text"]) == row[f"{side}_score"]
        assert samples[origin["answers"]["chosen"]]["finished"]
        assert origin["judge"] == "mine:longest"
        assert origin["model_fingerprint"] == policy.base.fingerprint
        assert origin["sampling"] == PLAN.facts()
        assert row["prompt"] == [dict(message) for message in prompts[origin["prompt"]["row"] - 1].messages]


def test_a_taken_output_is_refused_before_anything_is_sampled(policy, prompts):
    Path("p.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="never overwritten"):
        make_pairs(prompts, policy, LONGEST, Path("p.jsonl"), plan=PLAN)
    assert not Path("p.jsonl.samples.jsonl").exists()


@pytest.mark.parametrize("name", ["p.jsonl.gz", "P.JSONL.GZ"])
def test_pairs_are_packed_if_their_name_says_so(policy, prompts, name):
    report = make_pairs(prompts, policy, LONGEST, Path(name), plan=PLAN)
    make_pairs(prompts, policy, LONGEST, Path("p.jsonl"), plan=PLAN)
    unpacked = gzip.decompress(Path(name).read_bytes())
    assert unpacked == Path("p.jsonl").read_bytes()
    assert len(read_pairs(name)[0]) == report.pairs > 0


def test_a_name_of_another_kind_is_refused_before_anything_is_sampled(policy, prompts):
    with pytest.raises(ConfigError, match="should end in"):
        make_pairs(prompts, policy, LONGEST, Path("p.csv"), plan=PLAN)
    assert os.listdir() == ["prompts.txt"]


def test_a_judge_that_was_mended_scores_the_kept_answers(policy, prompts, monkeypatch):
    def broken(prompt, answers):
        raise ValueError("a bug")

    with pytest.raises(JudgeError, match="a bug"):
        make_pairs(prompts, policy, Judge("mine:f", broken, {"source": 1}), Path("p.jsonl"), plan=PLAN)
    monkeypatch.setattr(lora_dpo.judging.samples, "generate", None)
    assert make_pairs(prompts, policy, Judge("mine:f", longest, {"source": 2}), Path("p.jsonl"), plan=PLAN).pairs


def test_scores_of_another_judge_are_not_mixed_in_and_the_way_on_is_named(policy, prompts):
    alike = Judge("mine:alike", lambda prompt, answers: [1 for _ in answers])
    with pytest.raises(DataError, match="No prompt gave a pair"):
        make_pairs(prompts, policy, alike, Path("p.jsonl"), plan=PLAN)
    with pytest.raises(OutputError, match=r"judge was 'mine:alike', now 'mine:longest'") as caught:
        make_pairs(prompts, policy, LONGEST, Path("p.jsonl"), plan=PLAN)
    says = "Remove p.jsonl.scores.jsonl to judge the kept answers anew, or judge them into another output with"
    assert f"{says} --samples p.jsonl.samples.jsonl." in str(caught.value)
    Path("p.jsonl.scores.jsonl").unlink()
    assert make_pairs(prompts, policy, LONGEST, Path("p.jsonl"), plan=PLAN).pairs


def test_a_judge_that_fails_half_way_keeps_what_it_judged(policy, prompts):
    seen = []

    def fails(prompt, answers):
        seen.append(prompt.text)
        if len(seen) == 3:
            raise ValueError("no more")
        return longest(prompt, answers)

    with pytest.raises(JudgeError, match="no more"):
        make_pairs(prompts, policy, Judge("mine:f", fails), Path("p.jsonl"), plan=PLAN)
    assert not Path("p.jsonl").exists()
    make_pairs(prompts, policy, Judge("mine:f", fails), Path("p.jsonl"), plan=PLAN)
    assert len(seen) == 6  # two kept, the third once more
    make_pairs(prompts, policy, LONGEST, Path("straight.jsonl"), plan=PLAN)
    strip = [{**row, "origin": None} for row in rows_of("p.jsonl")]
    assert strip == [{**row, "origin": None} for row in rows_of("straight.jsonl")]


def test_answers_can_be_judged_anew_without_sampling(policy, prompts, monkeypatch):
    make_pairs(prompts, policy, LONGEST, Path("p.jsonl"), plan=PLAN)
    monkeypatch.setattr(lora_dpo.judging.samples, "generate", None)
    shortest = Judge("mine:shortest", lambda prompt, answers: [-len(answer.text) for answer in answers])
    report = make_pairs(prompts, policy, shortest, Path("q.jsonl"), plan=PLAN, samples=Path("p.jsonl.samples.jsonl"))
    assert report.chosen_longer == 0


def test_scores_by_other_known_answers_are_not_used_again(policy, prompts):
    from dataclasses import replace

    known = [replace(prompt, accepted=("x",)) for prompt in prompts]
    make_pairs(known, policy, LONGEST, Path("p.jsonl"), plan=PLAN)
    Path("p.jsonl").unlink()
    corrected = [replace(prompt, accepted=("y",)) for prompt in prompts]
    with pytest.raises(OutputError, match=r"scores\.jsonl was begun with other settings \(accepted_sha256 was"):
        make_pairs(corrected, policy, LONGEST, Path("p.jsonl"), plan=PLAN)


def test_without_a_pair_nothing_is_written_and_the_reasons_are_counted(policy, prompts):
    alike = Judge("mine:alike", lambda prompt, answers: [1 for _ in answers])
    with pytest.raises(DataError, match=r"No prompt gave a pair \(\d with answers scored alike"):
        make_pairs(prompts, policy, alike, Path("p.jsonl"), plan=PLAN)
    assert not Path("p.jsonl").exists()


def test_known_answers_are_asked_for_before_sampling(policy, prompts):
    with pytest.raises(ConfigError, match="rows need 'accepted'"):
        make_pairs(prompts, policy, Judge("rules:exact", longest, needs_accepted=True), Path("p.jsonl"), plan=PLAN)
    assert not Path("p.jsonl.samples.jsonl").exists()


# --- the policy -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    """An adapter that changes the model a lot, saved as training saves it, without a passport."""
    import torch

    folder = tmp_path_factory.mktemp("adapters") / "one"
    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
    model = attach_lora(base.model, LoraSection(rank=4), seed=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def test_the_adapter_answers_and_is_recorded(adapter, tiny_model_folder, policy, prompts):
    with_adapter = load_policy(str(tiny_model_folder), adapter=adapter, quantize="none")
    assert texts(sample(with_adapter, prompts, name="a.jsonl")) != texts(sample(policy, prompts, name="b.jsonl"))
    facts = with_adapter.facts
    assert facts["adapter"] == str(adapter)
    assert re.fullmatch("[0-9a-f]{64}", facts["adapter_sha256"])


def test_the_implicit_reward_of_a_continued_adapter_is_against_the_adapter_it_continued(
    adapter, tiny_model_folder, prompts, monkeypatch
):
    policy, judge = load_with_judge(
        ["implicit"], cache=Path("c"), model=str(tiny_model_folder), adapter=adapter, quantize="none"
    )
    answers = some("one", "another")
    against_base = judge.score(prompts[0], answers)
    assert all(abs(score) > 1e-3 for score in against_base)
    # its own copy as the reference: the policy is its reference, and every reward is 0
    import types

    own = types.SimpleNamespace(reference=f"adapter:{adapter}", reference_sha256=None)
    monkeypatch.setattr("lora_dpo.adapters.loading.read_passport", lambda folder: own)
    attach_reference(policy)
    assert judge.score(prompts[0], answers) == pytest.approx([0, 0], abs=1e-5)
    monkeypatch.setattr(
        "lora_dpo.adapters.loading.read_passport", lambda folder: types.SimpleNamespace(reference="adapter:gone")
    )
    with pytest.raises(AdapterError, match="adapter:gone, which is not there"):
        attach_reference(policy)


def test_without_a_model_there_is_no_policy():
    with pytest.raises(AdapterError, match="--model or --adapter"):
        load_policy()


def test_a_function_called_implicit_is_not_the_implicit_judge(tiny_model_folder):
    Path("my_own_judge.py").write_text("def implicit(prompt, answers):\n    return [1.0 for _ in answers]\n")
    options = {"cache": Path("c"), "model": str(tiny_model_folder), "quantize": "none"}
    _, judge = load_with_judge(["my_own_judge:implicit"], **options)
    assert judge.spec == "my_own_judge:implicit"
    with pytest.raises(ConfigError, match="--adapter"):
        load_with_judge(["0.5*implicit"], **options)


def test_the_implicit_judge_is_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match="--adapter"):
        load_with_judge(["implicit"], cache=Path("c"), model="none")


# --- the command ----------------------------------------------------------------------------------


def command(model, *more, judge="rules:chars>=9"):
    common = ["pairs", "prompts.txt", "--model", str(model), "--quantize", "none", "--judge", judge]
    return [*common, "--max-new-tokens", "8", "--answers", "3", "-o", "p.jsonl", *more]


def test_strict_refuses_a_base_that_is_not_quite_the_adapters(adapter, tiny_model_folder, prompts, capsys):
    given = command(tiny_model_folder, "--adapter", str(adapter))
    assert main([*given, "--strict"]) == 1  # it has no passport
    assert "unverified" in capsys.readouterr().err
    assert main(given) == 0


def test_the_command_writes_pairs_and_accounts_for_every_prompt(tiny_model_folder, prompts, capsys):
    with Path("prompts.txt").open("a") as file:
        file.write("Say well.\n")
    assert main(command(tiny_model_folder)) == 0
    said = capsys.readouterr().out
    assert f"written p.jsonl   {len(rows_of('p.jsonl'))} pairs" in said
    assert "5 gave pairs" in said
    assert "5 of 6 rows of prompts.txt; left out: 1 a repeated prompt" in said
    assert "over 15 answers" in said
    assert sorted(os.listdir()) == ["p.jsonl", "p.jsonl.samples.jsonl", "p.jsonl.scores.jsonl", "prompts.txt"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--select", "best"], "Did you mean best-worst?"),
        (["--quantize", "nf8"], "--quantize is 'nf8'"),
        (["--criterion", "x"], "--criterion is about an LLM judge, and there is none"),
        (["--judge", "llm:m@http://127.0.0.1:9", "--judge-prices", "1"], "write two numbers"),
        (["--judge", "llm:m@http://127.0.0.1:9", "--judge-prices", "-1,nan"], "write two numbers, 0 or more"),
        (["--judge", "llm:m@http://127.0.0.1:9", "--judge-prices", "1,inf"], "write two numbers, 0 or more"),
        (["--judge", "rules:fun"], "There is no rule 'fun'"),
        (["--adapter", "nowhere"], "There is no adapter folder at adapters/nowhere"),
    ],
)
@pytest.mark.linux
def test_a_mistake_is_one_line_and_leaves_nothing(tiny_model_folder, prompts, capsys, more, says):
    assert main(command(tiny_model_folder, *more)) == 1
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert os.listdir() == ["prompts.txt"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["-o", "p.csv"], "p.csv should end in .jsonl or .jsonl.gz"),
        (
            ["-o", "/proc/x/p.jsonl"],
            "/proc/x/p.jsonl: No such file or directory. Nothing can be made there",
        ),
        (["--samples", "/proc/x/s.jsonl"], "Cannot write /proc/x/s.jsonl: No such file or directory."),
        (["-o", "x" * 300 + ".jsonl"], "File name too long. Choose a shorter name"),
        (["-o", "/dev/null/p.jsonl"], "Not a directory. A part of that path is a file"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_a_model_is_loaded(prompts, capsys, more, says):
    assert main(command("no-such-model", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert os.listdir() == ["prompts.txt"]


@pytest.mark.slow
@pytest.mark.posix
def test_a_killed_command_goes_on_where_it_was(tiny_model_folder, tmp_path):
    """SIGKILL in the middle of sampling, in a real process; the same command then samples only the rest."""
    Path("prompts.txt").write_text("".join(f"Say {number}.\n" for number in range(40)), encoding="utf-8")
    arguments = [*command(tiny_model_folder), "--batch-size", "4"]
    journal = tmp_path / "p.jsonl.samples.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(lora_dpo.__file__).parent.parent)}
    start = [sys.executable, "-m", "lora_dpo", *arguments]
    process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 8) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes()
    assert 8 < before.count(b"\n") < 121  # killed in the middle
    done = subprocess.run(start, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    # a random model ends no answer itself, so there is no pair; all answers are there
    assert "No prompt gave a pair (40 without an answer that ended by itself)" in done.stderr
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    ids = [(row["prompt"], row["answer"]) for row in rows_of(journal)[1:]]
    assert set(ids) == {(prompt, answer) for prompt in range(40) for answer in range(3)}


@pytest.mark.slow
@pytest.mark.long
def test_the_real_model_makes_pairs_that_train(tmp_path):
    """In a process of its own: the real ends of turn, the real template, and training on what was written."""
    root = Path(lora_dpo.__file__).parent.parent
    (tmp_path / "models").symlink_to(root / "models")
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def run(*arguments):
        start = [sys.executable, "-m", "lora_dpo", *arguments]
        return subprocess.run(start, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    made = ["--limit", "3", "--max-new-tokens", "32", "--answers", "3", "--judge", "rules:length<=15", "-o", "p.jsonl"]
    run("pairs", str(root / "data" / "quickstart.jsonl"), "--model", "smollm2-135m", *made)
    pairs, report = read_pairs(str(tmp_path / "p.jsonl"))
    assert pairs
    assert not report.dropped
    settings = ["data.train=p.jsonl", "data.eval=null", "evaluation.questions=null", "trainer.max_steps=1"]
    settings += ["evaluation.answers=32", "evaluation.show=4", "trainer.per_device_train_batch_size=1", "output=a"]
    run("train", str(root / "configs" / "quickstart.yaml"), *settings)
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
