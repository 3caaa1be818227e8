"""Clients take turns in a circle; the queue has an end; closing tells everybody."""

import threading

import pytest

from lora_dpo.errors import Busy
from lora_dpo.serving.fair_queue import INTERNAL, FairQueue


class Noted:
    def __init__(self, name):
        self.name = name

    def run(self):
        raise NotImplementedError


def taken(turns, count):
    return [turns.take().name for _ in range(count)]


def test_clients_take_turns_and_each_keeps_its_order():
    turns = FairQueue(10)
    for client, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")):
        turns.put(client, Noted(name))
    assert taken(turns, 6) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_client_that_comes_back_goes_to_the_end():
    turns = FairQueue(10)
    turns.put("a", Noted("a1"))
    turns.put("b", Noted("b1"))
    assert turns.take().name == "a1"
    turns.put("a", Noted("a2"))
    turns.put("c", Noted("c1"))
    assert taken(turns, 3) == ["b1", "a2", "c1"]


def test_one_more_than_may_wait_is_refused_but_never_the_house_itself():
    turns = FairQueue(2)
    turns.put("a", Noted("a1"))
    turns.put("b", Noted("b1"))
    with pytest.raises(Busy, match="2 requests are waiting"):
        turns.put("c", Noted("c1"))
    turns.put(INTERNAL, Noted("training"))
    assert turns.waiting() == 2
    turns.take()
    turns.put("c", Noted("c1"))
    assert taken(turns, 3) == ["b1", "training", "c1"]


def test_who_leaves_the_line_frees_a_place():
    turns = FairQueue(1)
    first, second = Noted("first"), Noted("second")
    turns.put("a", first)
    assert turns.withdraw("a", first)
    turns.put("a", second)
    assert turns.take() is second
    assert not turns.withdraw("a", second)
    assert not turns.withdraw("nobody", second)


def test_taking_waits_and_closing_ends_it():
    turns = FairQueue(2)
    found = []
    thread = threading.Thread(target=lambda: found.extend([turns.take(), turns.take()]))
    thread.start()
    work = Noted("late")
    turns.put("a", work)
    turns.close()  # work that was not taken yet is handed back instead
    thread.join(5)
    assert not thread.is_alive()
    assert found in ([work, None], [None, None])
    with pytest.raises(Busy, match="shut down"):
        turns.put("a", Noted("too late"))


def test_closing_hands_back_what_waits():
    turns = FairQueue(5)
    for name in ("a", "b"):
        turns.put(name, Noted(name))
    assert [work.name for work in turns.close()] == ["a", "b"]
    assert turns.take() is None
    assert turns.waiting() == 0


def test_names_of_one_place_share_its_turns():
    turns = FairQueue(10)
    for client in ("a/1", "a/2", "a/3", "b/1", "a/1"):
        turns.put(client, Noted(client))
    assert taken(turns, 5) == ["a/1", "b/1", "a/2", "a/3", "a/1"]


@pytest.mark.parametrize(("greedy", "polite"), [("a", "b"), ("a", "b/x"), ("a/1", "b"), ("a/1", "a/2")])
def test_who_has_most_gives_way_and_is_named(greedy, polite):
    turns = FairQueue(4)
    many = [Noted(f"greedy {number}") for number in range(4)]
    assert [turns.put(greedy, work) for work in many] == [None] * 4
    assert turns.put(polite, Noted("polite")) is many[-1]  # the newest
    assert turns.waiting() == 4
    assert taken(turns, 4) == ["greedy 0", "polite", "greedy 1", "greedy 2"]


def test_many_names_are_one_place():
    turns = FairQueue(4)
    names = [Noted(f"a/{number}") for number in range(4)]
    for work in names:
        turns.put(work.name, work)
    assert turns.put("b", Noted("b1")) in names
    assert turns.put("c", Noted("c1")) in names
    with pytest.raises(Busy, match="4 requests are waiting"):
        turns.put("a/new", Noted("one more"))  # the other places have fewer
    assert [turns.take().name for _ in range(4)].count("b1") == 1


def test_nobody_gives_way_to_one_who_would_have_as_many():
    turns = FairQueue(3)
    for client in ("a", "a", "b"):
        turns.put(client, Noted(client))
    with pytest.raises(Busy):
        turns.put("b", Noted("b"))
    with pytest.raises(Busy):
        turns.put("a", Noted("a"))
    assert turns.waiting() == 3


def test_a_client_without_a_place_is_counted():
    turns = FairQueue(1)
    turns.put("/me", Noted("one"))
    with pytest.raises(Busy):
        turns.put("/me", Noted("two"))
