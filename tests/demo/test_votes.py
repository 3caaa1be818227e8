"""Votes: on the disk before they count, canonical, whole after any kill; and what they say about who wins."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import filelock
import pytest

from lora_dpo.data import read_pairs
from lora_dpo.data.journal import rewrite_durably
from lora_dpo.demo import votes
from lora_dpo.demo.votes import HeadToHead, ShownAnswer, VoteLog
from lora_dpo.errors import ConfigError, DataError, OutputError

PROMPT = [{"role": "user", "content": "Why is the sky blue?"}]


def side(text, who="base", **facts):
    return ShownAnswer(text, who, facts)


def vote(book, verdict="a", a="base", b="mine", number=0):
    return book.add(
        PROMPT, side(f"One {number}.", a, seed=1), side(f"Two {number}.", b, seed=1), verdict, vote_id=str(number)
    )


# --- what is written ------------------------------------------------------------------------------


def test_a_vote_is_a_pair_in_the_canonical_form_with_the_origin_of_both_answers(tmp_path):
    book = VoteLog(tmp_path / "votes.jsonl")
    a, b = side("Because.", "base", seed=3, temperature=0.8), side("Rayleigh.", "mine", seed=3, adapter_sha256="ab")
    assert book.add(PROMPT, a, b, "b", vote_id="x1", facts={"model": "tiny"}) == book.path
    row = json.loads(book.path.read_text())
    assert row["prompt"] == PROMPT
    assert row["chosen"] == [{"role": "assistant", "content": "Rayleigh."}]
    assert row["rejected"] == [{"role": "assistant", "content": "Because."}]
    origin = row["origin"]
    assert origin["chosen"] == {"who": "mine", "seed": 3, "adapter_sha256": "ab"}
    assert origin["rejected"] == {"who": "base", "seed": 3, "temperature": 0.8}
    assert (origin["shown"], origin["id"], origin["vote"], origin["model"]) == (["base", "mine"], "x1", "b", "tiny")
    pairs, report = read_pairs(str(book.path))  # as training reads it
    assert (len(pairs), report.dropped) == (1, [])
    assert pairs[0].provenance == origin


def test_other_verdicts_are_kept_and_are_no_pairs(tmp_path):
    book = VoteLog(tmp_path / "votes.jsonl")
    for number, verdict in enumerate(("both good", "both bad", "skip")):
        assert vote(book, verdict, number=number) == book.other
    assert not book.path.exists()
    rows = [json.loads(line) for line in book.other.read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["both good", "both bad", "skip"]
    assert (rows[0]["a"], rows[0]["origin"]["b"]) == ("One 0.", {"who": "mine", "seed": 1})
    assert book.count() == (0, 3)


def test_equal_and_empty_answers_make_no_pair_and_write_nothing(tmp_path):
    book = VoteLog(tmp_path / "votes.jsonl")
    with pytest.raises(DataError, match="chosen equals rejected"):
        book.add(PROMPT, side("Same."), side("Same.", "mine"), "a", vote_id="1")
    with pytest.raises(DataError, match="empty chosen answer"):
        book.add(PROMPT, side(""), side("Some.", "mine"), "a", vote_id="1")
    with pytest.raises(ConfigError, match="no verdict: allowed are a, b"):
        book.add(PROMPT, side("One."), side("Two."), "A", vote_id="1")
    assert book.count() == (0, 0)


def test_the_disk_is_waited_for_before_a_vote_counts(tmp_path, monkeypatch):
    book, synced, real = VoteLog(tmp_path / "votes.jsonl"), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), real(number)))
    vote(book)
    assert synced == [book.path.stat().st_ino, tmp_path.stat().st_ino]  # the new file, and its name in the folder
    vote(book, number=1)
    assert len(synced) == 3


def test_a_vote_that_the_disk_did_not_confirm_is_no_vote_and_may_be_given_again(tmp_path, monkeypatch):
    book = VoteLog(tmp_path / "votes.jsonl")
    vote(book, number=1)
    whole = book.path.read_bytes()

    def fail(number):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match=r"votes\.jsonl: Input/output error"):
            vote(book, number=2)
    assert book.path.read_bytes() == whole
    vote(book, number=2)
    assert book.count() == (2, 0)


# --- kills and threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b'{"prompt": [{"ro', b'{"prompt": "' + b"x" * (1 << 20), b"\xff\xfe"])
def test_what_a_kill_left_of_a_line_is_cut_off_before_the_next_vote(tmp_path, torn):
    book = VoteLog(tmp_path / "votes.jsonl")
    vote(book, number=1)
    whole = book.path.read_bytes()
    book.path.write_bytes(whole + torn)
    vote(book, number=2)
    assert book.path.read_bytes().startswith(whole)
    pairs, report = read_pairs(str(book.path))
    assert ([pair.chosen[0]["content"] for pair in pairs], report.dropped) == (["One 1.", "One 2."], [])


def test_a_whole_last_line_without_its_line_break_is_kept(tmp_path):
    book = VoteLog(tmp_path / "votes.jsonl")
    vote(book, number=1)
    book.path.write_bytes(book.path.read_bytes().rstrip(b"\n"))  # an editor did that
    vote(book, number=2)
    assert len(read_pairs(str(book.path))[0]) == 2


VOTER = """
import sys
from pathlib import Path
from lora_dpo.demo.votes import ShownAnswer, VoteLog
book = VoteLog(Path(sys.argv[1]))
for number in range(100_000):
    a, b = ShownAnswer(f"One {number}.", "base", {}), ShownAnswer(f"Two {number}. " + "x" * 5000, "mine", {})
    book.add([{"role": "user", "content": "Q"}], a, b, "a", vote_id=str(number))
    print(number, flush=True)  # the acknowledgement
"""


@pytest.mark.posix
def test_a_kill_loses_no_acknowledged_vote(tmp_path):
    draws, acknowledged = random.Random(1), 0
    book = VoteLog(tmp_path / "votes.jsonl")
    for attempt in range(6):
        voter = subprocess.Popen([sys.executable, "-c", VOTER, str(book.path)], stdout=subprocess.PIPE, text=True)
        first = voter.stdout.readline()
        assert first.strip() == "0"
        time.sleep(draws.uniform(0.0, 0.25))
        voter.send_signal(signal.SIGKILL)
        acknowledged += 1 + len(voter.stdout.read().split())
        voter.wait()
        vote(book, number=1_000_000 + attempt)  # whoever comes next mends the end
        acknowledged += 1
    pairs, report = read_pairs(str(book.path), on_bad_row="error")
    # A vote may be on the disk and its acknowledgement cut off, never the other way round.
    assert acknowledged <= len(pairs) <= acknowledged + 6
    assert report.dropped == []


@pytest.mark.posix
def test_many_threads_and_processes_lose_nothing(tmp_path):
    path = tmp_path / "votes.jsonl"
    books = [VoteLog(path), VoteLog(path)]
    child = os.fork()
    if child == 0:
        for number in range(40):
            vote(books[0], number=number)
        os._exit(0)
    threads = [
        threading.Thread(target=lambda book=book, n=n: [vote(book, number=n * 100 + i) for i in range(20)])
        for n, book in enumerate(books * 2, start=1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert len(read_pairs(str(path), on_bad_row="error")[0]) == 40 + 4 * 20


def test_a_vote_waits_while_the_file_is_written_anew(tmp_path, monkeypatch):
    book = VoteLog(tmp_path / "votes.jsonl")
    lock = tmp_path / ".votes.jsonl.lock"
    append, locked = votes.append_durably, []

    def is_locked():
        try:
            with filelock.FileLock(lock, timeout=0):
                return False
        except filelock.Timeout:
            return True

    def noted(path, row):
        locked.append(is_locked())
        append(path, row)

    monkeypatch.setattr(votes, "append_durably", noted)
    voter = threading.Thread(target=vote, args=(book,))
    with VoteLog(book.path).held():  # another process holds it as well
        assert is_locked()
        voter.start()
        assert not book.path.exists()
    voter.join(60)
    assert book.count() == (1, 0)
    assert locked == [True]  # it wrote, and held the file alone
    assert not is_locked()


def test_rewriting_changes_removes_and_leaves_the_rest_to_the_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n":1}\nno row\n{"n": 2}\n{"n":3}')
    left = rewrite_durably(path, lambda line, row: None if line == 3 else {"n": 30} if row["n"] == 3 else row)
    assert left == 2
    assert path.read_text() == '{"n":1}\nno row\n{"n": 30}\n'
    assert list(tmp_path.iterdir()) == [path]


# --- who wins -------------------------------------------------------------------------------------


def test_a_record_has_the_interval_of_its_decided_votes():
    # 7 of 10: centre (0.7 + z²/20) / (1 + z²/10) = 0.6445, half 0.2478 with z = 1.96 (by hand)
    assert HeadToHead("a", "b", 7, 3, 9, 9, 9).interval == pytest.approx((0.3968, 0.8922), abs=2e-4)
    assert HeadToHead("a", "b", 0, 5, 0, 0, 0).interval == (0.0, pytest.approx(0.4345, abs=2e-4))  # z² / (n + z²)
    assert HeadToHead("a", "b", 0, 0, 1, 0, 0).interval == (0.0, 1.0)


def test_the_table_counts_each_pair_of_models_with_the_base_second(tmp_path):
    book = VoteLog(tmp_path / "votes.jsonl")
    votes = [
        ("a", "base", "mine"), ("b", "base", "mine"), ("b", "base", "mine"), ("a", "mine", "base"),
        ("both good", "mine", "base"), ("both bad", "base", "mine"), ("skip", "base", "mine"),
        ("a", "zeta", "mine"), ("a", "base", "base"),
    ]  # fmt: skip
    for number, (verdict, a, b) in enumerate(votes):
        vote(book, verdict, a, b, number)
    assert book.records() == [HeadToHead("mine", "base", 3, 1, 1, 1, 1), HeadToHead("mine", "zeta", 0, 1, 0, 0, 0)]
    assert book.records()[0].rate == 0.75


def test_rows_that_are_no_votes_do_not_count_and_do_not_stop_the_table(tmp_path):
    book = VoteLog(tmp_path / "votes.jsonl")
    vote(book)
    odd = [
        "no json", "[]", '{"origin": 3}', '{"origin": {"vote": "a"}}', '{"origin": {"vote": ["a"]}}',
        '{"origin": {"vote": "a", "chosen": {"who": 1}, "rejected": {"who": "x"}}}',
    ]  # fmt: skip
    with book.path.open("a") as file:
        file.write("".join(line + "\n" for line in odd))
    assert len(book.records()) == 1


@pytest.mark.parametrize("text", ["# My notes\nthe last line, without a newline", "{broken", "", "whole\n"])
def test_a_conversation_that_is_saved_into_any_file_takes_nothing_of_it(text, tmp_path):
    path = tmp_path / "notes.md"
    path.write_text(text)
    votes.append_durably(path, {"messages": []}, ours=False)
    assert path.read_text() == text + ("" if not text or text.endswith("\n") else "\n") + '{"messages": []}\n'
