"""Conversations and blind matches, on a real host with a tiny model; no page."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import threading
from random import Random

import pytest

from lora_dpo.data import read_pairs
from lora_dpo.demo.arena import Arena
from lora_dpo.demo.conversation import Conversation, StreamedAnswer, Turn, ask, write
from lora_dpo.demo.votes import VoteLog
from lora_dpo.errors import Busy, ConfigError, DataError
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.host import Host

GREEDY = Sampling(max_new_tokens=12)
LIVELY = Sampling(max_new_tokens=12, temperature=1.0)
PROMPT = [{"role": "user", "content": "Say it."}]


@pytest.fixture
def host(tiny_model_folder, tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "adapters/mine")
    with Host(load_base(str(tiny_model_folder), quantize="none"), tmp_path / "adapters") as host:
        yield host


def last(states):
    return list(states)[-1]


# --- a talk ---------------------------------------------------------------------------------------


def said(text):
    return StreamedAnswer("base", text)


def test_each_side_sees_its_own_answers_and_where_it_has_none_the_others():
    conversation = Conversation([Turn("A", [said("left"), said("right")]), Turn("B", [said("more"), None]), Turn("C")])
    roles = [(turn["role"], turn["content"]) for turn in conversation.conversation(1, "Be brief.")]
    heard = [("user", "A"), ("assistant", "right"), ("user", "B"), ("assistant", "more"), ("user", "C")]
    assert roles == [("system", "Be brief."), *heard]
    assert conversation.conversation(0, "  ")[1]["content"] == "left"


def test_forgetting_drops_an_exchange_and_what_came_after():
    conversation = Conversation([Turn("A"), Turn("B"), Turn("C")])
    assert [cut.user for cut in conversation.cut_from(1)] == ["B", "C"]
    assert [exchange.user for exchange in conversation.exchanges] == ["A"]
    with pytest.raises(ConfigError, match="no exchange 4 in this conversation: it has 1"):
        conversation.cut_from(3)


def test_both_sides_answer_the_same_words_with_the_same_seed(host):
    conversation = Conversation()
    exchange = last(ask(host, conversation, "Say it.", ["mine", "base"], LIVELY))
    alone = [host.answer(who, PROMPT, LIVELY, client="x").text for who in ("mine", "base")]
    assert [answer.text for answer in exchange.answers] == alone
    assert alone[0] != alone[1]
    assert [(answer.who, answer.tokens > 0) for answer in exchange.answers] == [("mine", True), ("base", True)]
    # byte tokens: <|im_start|> user \\n Say it. <|im_end|> \\n <|im_start|> assistant \\n
    assert {answer.prompt_tokens for answer in exchange.answers} == {1 + 5 + 7 + 1 + 1 + 1 + 10}
    # The second turn goes on from each side's own answer.
    last(ask(host, conversation, "More.", ["mine", "base"], GREEDY))
    turns = [*PROMPT, {"role": "assistant", "content": alone[1].strip()}, {"role": "user", "content": "More."}]
    assert conversation.exchanges[1].answers[1].text == host.answer("base", turns, GREEDY, client="x").text


def test_a_retry_draws_anew_and_only_then(host):
    conversation = Conversation()
    texts = []
    for again in (False, True, True):
        text = conversation.cut_from(0)[0].user if conversation.exchanges else "Say it."
        texts.append(last(ask(host, conversation, text, ["base"], LIVELY, again=again)).answers[0].text)
    assert len(set(texts)) == 3
    conversation.cut_from(0)
    assert last(ask(host, conversation, "Say it.", ["base"], LIVELY)).answers[0].text == texts[0]


def test_a_stop_keeps_what_was_said_so_far(host):
    conversation = Conversation()
    for exchange in ask(host, conversation, "Say it.", ["base", "mine"], Sampling(max_new_tokens=300)):
        if exchange.answers[0] and exchange.answers[0].text:
            conversation.stop()
    assert conversation.exchanges[0].answers[0].text
    assert conversation.exchanges[0].answers[0].tokens < 300
    assert conversation.exchanges[0].answers[1] is None
    # The next question is not stopped by the old signal.
    assert last(ask(host, conversation, "More.", ["base"], GREEDY)).answers[0].tokens


def test_a_stop_is_seen_while_waiting_for_a_turn_and_leaves_no_exchange(host):
    blocker = host.stream("base", PROMPT, Sampling(max_new_tokens=350), client="other")
    next(blocker)
    conversation = Conversation()
    threading.Timer(0.2, conversation.stop).start()
    for _ in ask(host, conversation, "Say it.", ["base"], GREEDY):
        pass
    assert conversation.exchanges == []
    assert host.waiting() == 0
    blocker.close()


def test_leaving_an_answer_frees_the_turn(host):
    answer = write(host, "base", PROMPT, Sampling(max_new_tokens=350), client="a")
    while not next(answer).text:
        pass
    answer.close()
    assert last(write(host, "base", PROMPT, GREEDY, client="b")).tokens  # waits for the freed turn only


def test_errors_leave_the_talk_as_it_was(host):
    conversation = Conversation()
    with pytest.raises(ConfigError, match="write something first"):
        last(ask(host, conversation, "  ", ["base"], GREEDY))
    with pytest.raises(Busy, match="The prompt has"):
        last(ask(host, conversation, "x" * 1000, ["base"], GREEDY))
    assert conversation.exchanges == []


def test_each_answer_has_its_own_stop_and_the_next_one_ends_it(host):
    conversation = Conversation()
    conversation.stop()  # nothing is being written: nothing happens, and the next answer is not stopped
    first = ask(host, conversation, "Say it.", ["base"], Sampling(max_new_tokens=300))
    while not next(first).answers[0].text:
        pass
    second = ask(host, conversation, "More.", ["base"], GREEDY)
    assert last(second).answers[0].tokens
    assert last(first).answers[0].tokens < 300
    assert [exchange.user for exchange in conversation.exchanges] == ["Say it.", "More."]


# --- matches --------------------------------------------------------------------------------------


@pytest.fixture
def arena(host, tmp_path):
    return Arena(host, VoteLog(tmp_path / "votes.jsonl"), adapters_dir=tmp_path / "adapters", draws=Random(1))


def played(arena, players, sampling=LIVELY):
    match = arena.draw(PROMPT, players, sampling)
    last(arena.answers(match, client="x"))
    return match


def test_order_is_random_and_the_seed_is_the_same_for_two_models(arena):
    matches = [arena.draw(PROMPT, ["base", "mine"], LIVELY) for _ in range(200)]
    first = sum(match.players == ("base", "mine") for match in matches)
    assert 70 < first < 130  # of 200 fair draws; 4.2 standard deviations
    assert {tuple(sorted(match.players)) for match in matches} == {("base", "mine")}
    assert all(match.sampling[0].seed == match.sampling[1].seed for match in matches)
    assert len({match.sampling[0].seed for match in matches}) == 200
    assert len({match.id for match in matches}) == 200


def test_of_three_players_each_pair_meets(arena):
    met = {tuple(sorted(arena.draw(PROMPT, ["base", "mine", "third"], LIVELY).players)) for _ in range(60)}
    assert met == {("base", "mine"), ("base", "third"), ("mine", "third")}


def test_one_player_alone_gives_two_samples(arena):
    match = played(arena, ["base", "base"])
    assert match.players == ("base", "base")
    assert match.sampling[0].seed != match.sampling[1].seed
    assert match.answers[0].text != match.answers[1].text


def test_the_weights_of_a_vote_are_those_that_answered(arena, tmp_path):
    weights = arena.adapters_dir / "mine" / "adapter_model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    match = played(arena, ["base", "mine"])
    weights.write_bytes(weights.read_bytes()[:-1] + b"0")  # another training under that name, before the vote
    arena.vote(match.id, "a")
    (pair,), _ = read_pairs(str(tmp_path / "votes.jsonl"))
    assert before in [pair.provenance[part].get("adapter_sha256") for part in ("chosen", "rejected")]


def test_a_vote_is_written_with_both_origins_and_counts_once(arena, tmp_path):
    match = played(arena, ["base", "mine"])
    assert arena.vote(match.id, "b") is match
    (pair,), _ = read_pairs(str(tmp_path / "votes.jsonl"))
    assert pair.chosen[0]["content"] == match.answers[1].text
    origin = pair.provenance
    assert (origin["chosen"]["who"], origin["rejected"]["who"]) == (match.players[1], match.players[0])
    assert origin["chosen"]["seed"] == match.sampling[1].seed
    sides = {origin[part]["who"]: origin[part] for part in ("chosen", "rejected")}
    assert len(sides["mine"]["adapter_sha256"]) == 64
    assert "adapter_sha256" not in sides["base"]
    assert (origin["model"], origin["model_fingerprint"]) == (arena.host.base.name, arena.host.base.fingerprint)
    # The same draw again gives the same answer: the origin is enough to make it.
    again = Sampling(max_new_tokens=12, temperature=1.0, top_p=origin["chosen"]["top_p"], seed=origin["chosen"]["seed"])
    assert arena.host.answer(match.players[1], PROMPT, again, client="x").text.strip() == match.answers[1].text
    with pytest.raises(ConfigError, match="voted on already"):
        arena.vote(match.id, "a")
    assert arena.book.count() == (1, 0)


def test_a_vote_that_failed_for_any_reason_can_be_given_again(arena, monkeypatch):
    match = played(arena, ["base", "mine"])

    def interrupted(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as failing:
        failing.setattr(VoteLog, "add", interrupted)
        with pytest.raises(OSError, match="Stale"):
            arena.vote(match.id, "a")
    arena.vote(match.id, "a")
    assert arena.book.count() == (1, 0)


def test_a_vote_without_pair_can_be_given_another_verdict(arena):
    match = played(arena, ["base", "mine"])
    match.answers[1] = match.answers[0]
    with pytest.raises(DataError, match="makes no pair"):
        arena.vote(match.id, "a")
    arena.vote(match.id, "both bad")
    assert arena.book.count() == (0, 1)


def test_votes_before_the_answers_and_for_unknown_matches_are_refused(arena):
    match = arena.draw(PROMPT, ["base", "mine"], LIVELY)
    with pytest.raises(ConfigError, match="Both answers must be there"):
        arena.vote(match.id, "a")
    with pytest.raises(ConfigError, match="no such match"):
        arena.vote("nope", "a")
    with pytest.raises(ConfigError, match="no verdict"):
        arena.vote(played(arena, ["base", "mine"]).id, "best")


def test_a_stopped_match_is_not_ready(arena):
    match, stop = arena.draw(PROMPT, ["base", "mine"], Sampling(max_new_tokens=300)), threading.Event()
    for a, _ in arena.answers(match, client="x", stop=stop):
        if a:
            stop.set()
    assert not match.ready
    assert match.answers == [None, None]


def test_what_cannot_be_drawn(arena):
    with pytest.raises(ConfigError, match="Nobody answers"):
        arena.draw(PROMPT, [], LIVELY)
    with pytest.raises(ConfigError, match="at temperature 0 are the same"):
        arena.draw(PROMPT, ["base"], GREEDY)
    with pytest.raises(ConfigError, match="nothing to answer"):
        arena.draw([{"role": "user", "content": " "}], ["base", "mine"], LIVELY)


def test_old_matches_are_forgotten(arena, monkeypatch):
    monkeypatch.setattr("lora_dpo.demo.arena.MOST_OPEN", 3)
    matches = [arena.draw(PROMPT, ["base", "mine"], LIVELY) for _ in range(4)]
    with pytest.raises(ConfigError, match="too old"):
        arena.match(matches[0].id)
    assert arena.match(matches[3].id) is matches[3]


def test_the_source_of_an_imported_prompt_is_kept(arena, tmp_path):
    match = arena.draw(PROMPT, ["base", "mine"], LIVELY, source="prompts.txt:3")
    last(arena.answers(match, client="x"))
    arena.vote(match.id, "skip")
    assert json.loads(arena.book.other.read_text())["origin"]["prompt_source"] == "prompts.txt:3"
