"""One base, many adapters, many who ask, and a training beside them: nobody gets or loses what is another's."""

import gc
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import in_a_child
from safetensors.torch import load_file

from lora_dpo.adapters.folder import strictness
from lora_dpo.adapters.passport import read_passport, write_passport
from lora_dpo.adapters.store import list_adapters
from lora_dpo.config.reading import check_recipe
from lora_dpo.config.recipe import LoraSection
from lora_dpo.demo.session import AppState
from lora_dpo.errors import AdapterError, Busy, ConfigError, ModelError, OutputError, PackageError, PromptTooLong
from lora_dpo.events import Progress
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling, generate
from lora_dpo.model.lora import attach_lora, share_weights
from lora_dpo.serving.adapter_pool import KEPT
from lora_dpo.serving.host import Host, open_host
from lora_dpo.serving.training_job import TrainingJob

ROOT = Path(__file__).resolve().parents[2]
SHORT = Sampling(max_new_tokens=12)


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def pool(make_adapter, tmp_path_factory):
    """Two adapters that fit the tiny model, and what is no adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("alpha", "beta")):
        make_adapter(folder / name, seed=number, rank=2 + number)
    (folder / "notes").mkdir()
    (folder / ".alpha.half").mkdir()
    return folder


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return load_base(str(tiny_model_folder), quantize="none")


@pytest.fixture
def adapters(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pool, tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.fixture
def host(base, adapters):
    with Host(base, adapters, max_waiting=8) as opened:
        wait_until_warm(opened)
        yield opened


def wait_until_warm(host):
    deadline = time.monotonic() + 300  # on a machine that is busy with something else
    while host.is_warming():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alone(tiny_model_folder, folder, text, sampling=SHORT):
    """The answer of a base with nothing else in memory."""
    from lora_dpo.adapters.folder import attach_adapter

    base = load_base(str(tiny_model_folder), quantize="none")
    model = attach_adapter(base, folder) if folder else base.model
    return generate(model, base.tokenizer, [ask(text)], sampling=sampling)[0]


# --- trees over the same weights ------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "packed"), [("none", False), ("nf4", False), ("nf4", True)])
def test_a_second_tree_has_the_same_weights_and_a_life_of_its_own(tiny_model_folder, quantize, packed):
    base = load_base(str(tiny_model_folder), quantize=quantize, packed=packed)
    ids = torch.tensor([[256, 5, 6, 7, 8]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
    other = share_weights(base)
    mine, theirs = dict(base.model.named_parameters()), dict(other.model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    policy = attach_lora(other.model, LoraSection(rank=2), seed=0)
    policy.enable_input_require_grads()
    other.model.gradient_checkpointing_enable()
    policy.train()
    policy(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in policy.parameters())
    assert not any(p.grad is not None or p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert not any(getattr(part, "gradient_checkpointing", False) for part in base.model.modules())
    assert not any("lora_" in name for name, _ in base.model.named_modules())
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, before)


# --- who answers ----------------------------------------------------------------------------------


def test_names_are_the_base_and_the_adapters_that_fit(host, adapters, make_adapter, tiny_model_folder, tmp_path):
    assert host.names() == ["base", "alpha", "beta"]
    shutil.copytree(adapters / "beta", adapters / "gamma")
    assert host.names() == ["base", "alpha", "beta", "gamma"]  # as the disk is now
    (adapters / "gamma" / "adapter_model.safetensors").write_bytes(b"broken")
    assert host.names() == ["base", "alpha", "beta"]
    with pytest.raises(AdapterError, match="gamma"):  # the reason, not just "there is none"
        host.answer("gamma", ask("hi"), SHORT, client="a")
    shutil.copytree(adapters / "beta", adapters / "base")
    assert host.names() == ["base", "alpha", "beta"]  # that name is taken
    assert host.incompatibility("base") is None  # it is the model without an adapter


def test_what_is_not_quite_the_base_is_told_and_strict_leaves_it_out(base, adapters):
    passport = read_passport(adapters / "beta")
    write_passport(adapters / "beta", replace(passport, quantize="nf4"))
    with Host(base, adapters) as lenient:
        assert lenient.names() == ["base", "alpha", "beta"]
        assert lenient.incompatibility("alpha") is None
        assert "quantised as nf4, here they are none" in lenient.incompatibility("beta")
    with strictness(True), Host(base, adapters) as strict:
        assert strict.names() == ["base", "alpha"]
        assert "quantised as nf4, here they are none" in strict.incompatibility("beta")
        with pytest.raises(AdapterError, match="quantised as nf4"):
            strict.answer("beta", ask("hi"), SHORT, client="a")
    (adapters / "beta" / "adapter_model.safetensors").write_bytes(b"broken")
    with Host(base, adapters) as lenient:
        assert "beta" in lenient.incompatibility("beta")  # why it is not there


def test_each_answers_as_it_does_alone(host, adapters, tiny_model_folder):
    for who in ("alpha", "base", "beta", "alpha", "base"):
        reply = host.answer(who, ask("Say it."), SHORT, client="a")
        lonely = alone(tiny_model_folder, None if who == "base" else adapters / who, "Say it.")
        assert (reply.text.strip(), reply.tokens, reply.finished) == (lonely.text, lonely.tokens, lonely.finished), who
    assert len({host.answer(who, ask("Say it."), SHORT, client="a").text for who in host.names()}) == 3


def test_an_adapter_that_was_replaced_on_the_disk_is_read_again(host, adapters):
    before = host.answer("alpha", ask("hi"), SHORT, client="a").text
    other = host.answer("beta", ask("hi"), SHORT, client="a").text
    shutil.rmtree(adapters / "alpha")
    with pytest.raises(AdapterError, match="no model alpha here"):
        host.answer("alpha", ask("hi"), SHORT, client="a")
    shutil.copytree(adapters / "beta", adapters / "alpha")
    assert host.answer("alpha", ask("hi"), SHORT, client="a").text == other != before


@pytest.mark.parametrize("name", ["alfa", "../alpha", "", "notes", ".alpha.half", "alpha/../beta"])
def test_what_is_no_name_of_a_model_is_refused(host, name):
    with pytest.raises(AdapterError, match="There is no model"):
        host.answer(name, ask("hi"), SHORT, client="a")


def test_adapters_are_in_memory_before_anyone_asks_for_them(base, adapters, monkeypatch):
    monkeypatch.setattr("lora_dpo.serving.adapter_pool.SETTLED", 0.0)
    with Host(base, adapters) as host:
        wait_until_warm(host)
        check_warm(host, adapters)


def check_warm(host, adapters):
    assert sorted(host.in_memory()) == ["alpha", "beta"]
    shutil.copytree(adapters / "beta", adapters / ".coming")
    (adapters / ".coming").rename(adapters / "coming")
    assert "coming" in host.names()  # a page that lists the names is enough
    wait_until_warm(host)
    assert "coming" in host.in_memory()


def test_few_bytes_of_adapters_are_put_into_memory_ahead_newest_first(base, adapters, monkeypatch):
    weights = adapters / "alpha" / "adapter_model.safetensors"
    os.utime(weights, (2e9, 2e9))
    monkeypatch.setattr("lora_dpo.serving.adapter_pool.AHEAD", weights.stat().st_size)
    monkeypatch.setattr("lora_dpo.serving.adapter_pool.SETTLED", 0.0)
    with Host(base, adapters) as host:
        wait_until_warm(host)
        assert host.in_memory() == ["alpha"]


def test_an_adapter_that_cannot_be_put_on_is_tried_once_and_says_why(base, adapters, monkeypatch):
    from lora_dpo.serving import adapter_pool

    tried = []

    def refuse(view, folder):
        tried.append(folder.name)
        raise AdapterError(f"peft cannot take {folder.name}")

    monkeypatch.setattr(adapter_pool, "put_adapter", refuse)
    monkeypatch.setattr(adapter_pool, "SETTLED", 0.0)
    with Host(base, adapters) as host:
        wait_until_warm(host)
        assert host.names() == ["base"]
        with pytest.raises(AdapterError, match="peft cannot take alpha"):
            host.answer("alpha", ask("hi"), SHORT, client="a")
    assert sorted(tried) == ["alpha", "beta"]


def test_memory_that_is_short_for_a_moment_hides_no_adapter(base, adapters, monkeypatch):
    from lora_dpo.serving import adapter_pool

    tried, put = [], adapter_pool.put_adapter

    def short(view, folder):
        tried.append(folder.name)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(adapter_pool, "put_adapter", short)
    monkeypatch.setattr(adapter_pool, "SETTLED", 0.0)
    with Host(base, adapters) as host:
        wait_until_warm(host)
        assert sorted(tried) == ["alpha", "beta"]  # once each, not at every look
        assert host.names() == ["base", "alpha", "beta"]
        with pytest.raises(ModelError, match="Memory ran out for this answer"):
            host.answer("alpha", ask("hi"), SHORT, client="a")
        monkeypatch.setattr(adapter_pool, "put_adapter", put)
        assert host.answer("alpha", ask("hi"), SHORT, client="a").tokens


def test_what_has_just_been_written_is_not_read_ahead(base, adapters, monkeypatch):
    monkeypatch.setattr("lora_dpo.serving.adapter_pool.SETTLED", 1000.0)
    with Host(base, adapters) as host:  # the fixture has just copied them
        wait_until_warm(host)
        assert host.in_memory() == []
        assert host.names() == ["base", "alpha", "beta"]


def test_many_adapters_do_not_fill_the_memory(host, adapters):
    for number in range(KEPT + 3):
        shutil.copytree(adapters / "beta", adapters / f"copy{number}")
        host.answer(f"copy{number}", ask("hi"), Sampling(max_new_tokens=1), client="a")
    assert len(host.in_memory()) == KEPT
    assert f"copy{KEPT + 2}" in host.in_memory()


def test_the_base_is_loaded_once_for_all(tiny_model_folder, adapters, recipe_dict, loads):
    with open_host(str(tiny_model_folder), adapters, quantize="none") as host:
        for who in host.names():
            host.answer(who, ask("hi"), SHORT, client="a")
        job = host.start_training(check_recipe(recipe_dict()), "new")
        assert job.wait(60), job.state
        assert job.state == "done", job.error
        assert "new" in host.names()
        host.answer("new", ask("hi"), SHORT, client="a")
    assert len(loads) == 1


# --- the queue ------------------------------------------------------------------------------------


def test_pieces_join_to_the_reply_with_its_counts(host):
    stream = host.stream("alpha", ask("hello"), Sampling(max_new_tokens=9, temperature=1.0, seed=5), client="a")
    text = "".join(stream)
    assert stream.reply.text == text
    assert stream.reply.tokens <= 9
    assert stream.reply.prompt_tokens == len(
        host.base.tokenizer.apply_chat_template(ask("hello"), add_generation_prompt=True)["input_ids"]
    )
    assert stream.reply.seconds > 0
    assert list(stream) == []


def test_a_prompt_that_is_too_long_is_refused_and_the_answer_stays_in_the_context(base, adapters):
    too_long = pytest.raises(PromptTooLong, match=r"has \d+ tokens; at most 60")
    with Host(base, adapters, max_prompt_tokens=60) as host, too_long:
        host.answer("base", ask("x" * 100), SHORT, client="a")
    with Host(base, adapters) as host:
        assert host.context == 512
        assert host.max_prompt_tokens == 384
        reply = host.answer("base", ask("x" * 350), Sampling(max_new_tokens=1000, temperature=2.0), client="a")
        assert reply.prompt_tokens + reply.tokens <= 512


def test_a_text_without_end_is_refused_before_it_is_tokenised(host, monkeypatch):
    from lora_dpo.serving import host as module

    monkeypatch.setattr(module, "prompt_ids", lambda *nothing: pytest.fail("it was tokenised"))
    with pytest.raises(PromptTooLong, match="1,000,000 characters"):
        host.answer("base", ask("x" * 1_000_000), SHORT, client="a")


class Gate:
    """Holds the thread that computes at its first token, until it is opened."""

    def __init__(self, host, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        stream = host.stream_from

        def wait(*asked, **settings):
            self.reached.set()
            assert self.open.wait(20)
            return stream(*asked, **settings)

        monkeypatch.setattr(host, "stream_from", wait)


def test_too_many_are_refused_and_a_stream_that_is_dropped_frees_its_place(host, monkeypatch):
    gate = Gate(host, monkeypatch)
    running = host.stream("base", ask("first"), SHORT, client="first")
    assert gate.reached.wait(20)
    waiting = [host.stream("base", ask(str(n)), SHORT, client=str(n)) for n in range(8)]
    assert host.waiting() == 8
    with pytest.raises(Busy, match="8 requests are waiting"):
        host.stream("base", ask("more"), SHORT, client="more")
    del waiting[3]  # nobody holds it any more
    assert host.waiting() == 7
    waiting.append(host.stream("base", ask("more"), SHORT, client="more"))
    running.close()
    gate.open.set()
    texts = ["".join(stream) for stream in waiting]
    assert all(stream.reply.text == text for stream, text in zip(waiting, texts, strict=True))
    assert list(running) == []
    assert running.reply is None


def test_an_answer_that_nobody_wants_ends_at_its_next_token(host):
    endless = Sampling(max_new_tokens=400, temperature=2.0, seed=1)
    stream = host.stream("base", ask("x"), endless, client="a")
    next(stream)
    request = stream.request
    del stream
    host.answer("base", ask("hi"), Sampling(max_new_tokens=1), client="b")
    assert request.tokens < 100


def test_closing_tells_those_who_wait(base, adapters, monkeypatch):
    host = Host(base, adapters)
    wait_until_warm(host)
    gate = Gate(host, monkeypatch)
    streams = [host.stream("base", ask(str(n)), SHORT, client="a") for n in range(3)]
    assert gate.reached.wait(20)
    threading.Timer(0.2, gate.open.set).start()
    host.close()
    for stream in streams:
        with pytest.raises(Busy):
            list(stream)
    with pytest.raises(Busy, match="shut down"):
        host.stream("base", ask("late"), SHORT, client="a")


def test_something_else_is_computed_in_a_turn_on_a_tree_of_its_own(host):
    before = host.answer("base", ask("Say it."), SHORT, client="x").text

    def work(base):
        attach_lora(base.model, LoraSection(rank=2), seed=0)
        return base.name, threading.current_thread().name

    assert host.take_turn(work) == (host.base.name, "answers")
    assert host.answer("base", ask("Say it."), SHORT, client="x").text == before
    with pytest.raises(KeyError, match="nothing"):
        host.take_turn(lambda base: {}["nothing"])
    host.close()
    with pytest.raises(Busy, match="shut down"):
        host.take_turn(lambda base: None)


def test_a_drained_host_has_answered_all_and_takes_nothing_more(host, recipe, monkeypatch):
    gate = Gate(host, monkeypatch)
    streams = [host.stream("base", ask(str(n)), SHORT, client=str(n)) for n in range(3)]
    assert gate.reached.wait(20)
    threading.Timer(0.2, gate.open.set).start()
    host.drain("Closed for a moment.")
    assert host.waiting() == 0
    assert all("".join(stream) == stream.reply.text for stream in streams)
    for late in (
        lambda: host.stream("base", ask("late"), SHORT, client="a"),
        lambda: host.start_training(recipe(), "x"),
    ):
        with pytest.raises(Busy, match="Closed for a moment"):
            late()


def test_a_host_that_trains_is_not_drained(host, recipe):
    job = host.start_training(recipe(), "mine")
    with pytest.raises(Busy, match="The training of mine goes on"):
        host.drain("Closed.")
    job.stop(keep=False)
    assert job.wait(60)
    assert host.answer("base", ask("Hi"), SHORT, client="a").tokens


def test_an_answer_that_breaks_is_told_and_the_next_one_is_given(host, monkeypatch):
    stream = host.stream_from

    def out_of_memory(*asked, **settings):
        monkeypatch.setattr(host, "stream_from", stream)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(host, "stream_from", out_of_memory)
    with pytest.raises(ModelError, match="Memory ran out for this answer"):
        host.answer("base", ask("hi"), SHORT, client="a")
    assert host.answer("base", ask("hi"), SHORT, client="a").prompt_tokens


def test_many_threads_each_get_their_own_text(host, adapters, tiny_model_folder):
    names = host.names()
    cases = [(names[n % 3], f"question {n % 5}") for n in range(15)]
    expected = {
        case: alone(tiny_model_folder, None if case[0] == "base" else adapters / case[0], case[1]).text
        for case in set(cases)
    }
    assert len(set(expected.values())) > 5
    wrong = []

    def client(number):
        case = cases[number]
        for _ in range(3):
            try:
                text = host.answer(case[0], ask(case[1]), SHORT, client=str(number)).text.strip()
            except Busy:
                continue
            if text != expected[case]:
                wrong.append((case, text))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert host.waiting() == 0


# --- training beside ------------------------------------------------------------------------------


@pytest.fixture
def recipe(recipe_dict):
    def make(**trainer):
        settings = recipe_dict(trainer={"max_steps": 6, **trainer}, lora={"rank": 4, "dropout": 0.1})
        settings["trainer"].update(disable_dropout=False, gradient_checkpointing=True)
        return check_recipe(settings)

    return make


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def trained(job):
    return [e.done for e in job.events if isinstance(e, Progress) and e.stage == "training"]


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_training_between_answers_gives_the_same_adapter_bit_for_bit(host, adapters, recipe, monkeypatch):
    monkeypatch.setattr("lora_dpo.serving.training_job.SLICE", 0.0)  # others go first before every pass
    quiet = host.start_training(recipe(), "quiet")
    assert quiet.wait(120)
    assert quiet.state == "done", quiet.error
    before = {who: host.answer(who, ask("Say it."), SHORT, client="a").text for who in ("base", "alpha", "beta")}
    job = host.start_training(recipe(), "loud")
    during = set()
    while job.running:
        for who, text in before.items():
            sampling = SHORT if who != "beta" else Sampling(max_new_tokens=12, seed=len(during))
            assert host.answer(who, ask("Say it."), sampling, client="a").text == text
            during.update(trained(job)[-1:])
    assert job.state == "done", job.error
    assert len(during & set(range(1, 6))) >= 3, "the answers did not come between the steps: nothing is proved"
    assert weights(job.folder) == weights(quiet.folder)
    losses = [
        [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for folder in (job.folder, quiet.folder)
    ]
    assert losses[0] == losses[1]
    assert host.names() == ["base", "alpha", "beta", "loud", "quiet"]
    assert (
        host.answer("loud", ask("Say it."), SHORT, client="a").text
        == host.answer("quiet", ask("Say it."), SHORT, client="a").text
    )


def test_pause_stands_still_while_answers_go_on_and_resume_goes_on(host, recipe):
    job = host.start_training(recipe(max_steps=12), "new")
    until(lambda: len(trained(job)) > 2)
    job.pause()
    assert job.state == "paused"
    host.answer("base", ask("hi"), SHORT, client="a")  # after it the training stands
    seen = len(job.events)
    for _ in range(5):  # a training that goes on has its turn between two answers
        host.answer("alpha", ask("hi"), SHORT, client="a")
    assert len(job.events) <= seen + 1
    job.resume()
    assert job.wait(120)
    assert job.state == "done", job.error


def test_stop_and_keep_saves_the_adapter_of_that_step(host, recipe):
    job = host.start_training(recipe(max_steps=50), "early")
    until(lambda: len(trained(job)) > 3)
    job.stop(keep=True)
    assert job.state == "stopping"
    assert job.wait(120)
    assert job.state == "done", job.error
    passport = json.loads((job.folder / "passport.json").read_text())
    step = trained(job)[-1]
    assert passport["metrics"]["stopped"] == {"step": step, "of": 50}
    assert f"stopped by hand after step {step} of 50" in (job.folder / "README.md").read_text()
    assert not list(job.folder.parent.glob("*.partial"))
    assert host.answer("early", ask("hi"), SHORT, client="a").prompt_tokens


@pytest.mark.parametrize(
    "end", [lambda job: job.stop(keep=True), lambda job: job.stop(keep=False), TrainingJob.interrupt]
)
def test_a_pause_that_comes_after_the_stop_does_not_hold_it_up(host, recipe_dict, end):
    job = host.start_training(check_recipe(recipe_dict(trainer={"max_steps": 2000, "learning_rate": 1e-8})), "late")
    until(lambda: len(trained(job)) > 2)
    job.pause()  # so that the end cannot come before the second one
    end(job)
    job.pause()
    assert job.wait(60), job.state


@pytest.mark.parametrize("paused", [False, True])
def test_stop_without_keeping_leaves_nothing(host, adapters, recipe, paused):
    job = host.start_training(recipe(max_steps=50), "gone")
    until(lambda: len(trained(job)) > 2)
    if paused:
        job.pause()
    job.stop(keep=False)
    assert job.wait(120)
    assert (job.state, job.folder, job.error) == ("stopped", None, None)
    assert host.names() == ["base", "alpha", "beta"]
    assert not list(adapters.glob("gone*"))
    assert host.start_training(recipe(max_steps=1), "gone").wait(120)
    assert "gone" in host.names()


def test_a_training_and_the_answers_beside_it_have_a_tokenizer_each(host, recipe, monkeypatch):
    given = []
    monkeypatch.setattr("lora_dpo.serving.training_job.train", lambda recipe, *, base, **_: given.append(base))
    assert host.start_training(recipe(), "new").wait(60)
    [base] = given
    assert base.tokenizer is not host.base.tokenizer
    assert base.tokenizer.get_vocab() == host.base.tokenizer.get_vocab()


def test_one_training_at_a_time_under_a_free_name(host, recipe):
    job = host.start_training(recipe(max_steps=50), "new")
    with pytest.raises(Busy, match="training of new goes on"):
        host.start_training(recipe(), "other")
    job.stop(keep=False)
    assert job.wait(120)
    with pytest.raises(OutputError, match="already exists"):
        host.start_training(recipe(), "alpha")
    with pytest.raises(PackageError, match="cannot be called base"):
        host.start_training(recipe(), "base")
    with pytest.raises(PackageError):
        host.start_training(recipe(), "../up")
    with pytest.raises(ConfigError, match="Unset it"):
        host.start_training(recipe().model_copy(update={"output": "elsewhere"}), "new")


@pytest.mark.parametrize(
    ("crash", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "Memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "Memory ran out"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
)
def test_a_training_that_breaks_leaves_answers_working_and_no_adapter(host, adapters, recipe, monkeypatch, crash, said):
    from lora_dpo.training.dpo_trainer import DPOTrainer

    before = host.answer("alpha", ask("Say it."), SHORT, client="a").text
    step, calls = DPOTrainer.training_step, []

    def break_at_third(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise crash
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", break_at_third)
    job = host.start_training(recipe(), "broken")
    assert job.wait(120)
    assert job.state == "failed"
    assert said in job.error
    assert host.answer("alpha", ask("Say it."), SHORT, client="a").text == before
    assert host.names() == ["base", "alpha", "beta"]
    assert not list(adapters.glob("broken*"))
    monkeypatch.undo()
    os.chdir(adapters.parent)
    assert host.start_training(recipe(), "broken").wait(120)
    assert "broken" in host.names()


@pytest.mark.slow
def test_after_a_training_its_memory_is_free(host, recipe):
    def trainable():
        gc.collect()
        return sum(isinstance(o, torch.nn.Parameter) and o.requires_grad for o in gc.get_objects())

    job = host.start_training(recipe(max_steps=1), "one")
    assert job.wait(120)
    before = trainable()
    for name in ("two", "three"):
        assert host.start_training(recipe(max_steps=1), name).wait(120)
    assert trainable() <= before


def test_closing_keeps_a_checkpoint_to_go_on_from(base, adapters, recipe_dict):
    def recipe(**trainer):
        return check_recipe(recipe_dict(trainer=trainer))

    with Host(base, adapters) as host:
        whole = host.start_training(recipe(max_steps=8), "whole")
        assert whole.wait(120)
        job = host.start_training(recipe(max_steps=8), "cut")
        until(lambda: len(trained(job)) > 2)
    assert job.state == "stopped"
    with Host(base, adapters) as host:
        assert host.names() == ["base", "alpha", "beta", "whole"]
        again = host.start_training(recipe(max_steps=8), "cut")
        assert again.wait(120)
        assert "Continue it with --resume" in again.error
        desk = AppState(host, adapters.parent / "collected", scratch=adapters.parent / "scratch")
        assert desk.interrupted() == ["cut"]
        training = desk.continue_training("cut")
        again = training.job
        assert desk.interrupted() == []  # it goes on
        assert again.wait(120)
        assert again.state == "done", again.error
        assert [step for step, _ in training.watch.seen.steps] == list(range(1, 9))  # those from before, too
        with pytest.raises(AdapterError, match="no interrupted run cut here"):
            desk.continue_training("cut")
        one, other = (load_file(job.folder / "adapter_model.safetensors") for job in (again, whole))
        assert all(torch.allclose(one[name], other[name], atol=1e-7) for name in other)


def test_stop_and_keep_right_after_going_on_keeps_what_was_trained(base, adapters, recipe_dict):
    recipe = check_recipe(recipe_dict(trainer={"max_steps": 2000, "learning_rate": 1e-8}))
    with Host(base, adapters) as host:
        job = host.start_training(recipe, "cut")
        until(lambda: len(trained(job)) > 2)
        job.interrupt()
        assert job.wait(120)
        again = host.start_training(recipe, "cut", resume=True)
        again.stop(keep=True)  # before a step of its own
        assert again.wait(120)
        assert again.state == "done", again.error
        assert "cut" in host.names()


def test_the_recipe_of_another_model_is_refused(host, recipe, tmp_path, tiny_model_folder):
    shutil.copytree(tiny_model_folder, tmp_path / "other")
    other = recipe().model.model_copy(update={"name": str(tmp_path / "other")})
    job = host.start_training(recipe().model_copy(update={"model": other}), "new")
    assert job.wait(60)
    assert job.state == "failed"
    assert "but the recipe names" in job.error
    assert host.model_section().name == str(tiny_model_folder)


@pytest.mark.slow
def test_killed_in_the_middle_of_training_there_is_no_adapter_or_a_whole_one(
    tiny_model_folder, adapters, recipe_dict, tmp_path
):
    settings = check_recipe(recipe_dict(trainer={"max_steps": 4, "save_steps": 1}))

    def work():
        with open_host(str(tiny_model_folder), adapters, quantize="none") as host:
            job = host.start_training(settings, "new")
            while job.running:
                host.answer("base", ask("hi"), Sampling(max_new_tokens=2), client="a")
        assert job.error is None, job.error

    started = time.monotonic()
    assert in_a_child(work) == 0
    took = time.monotonic() - started
    assert [row.name for row in list_adapters(adapters)] == ["alpha", "beta", "new"]
    shutil.rmtree(adapters / "new")
    kills = 0
    for share in (0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97):
        in_a_child(work, kill_after=share * took)
        names = [row.name for row in list_adapters(adapters)]
        assert names in (["alpha", "beta"], ["alpha", "beta", "new"])
        if "new" in names:
            assert [row.state for row in list_adapters(adapters) if row.name == "new"] == ["not yet verified"]
            assert (adapters / "new" / "verify.json").is_file()
        else:
            kills += 1
        for left in [*adapters.glob("new*"), *adapters.glob(".new*")]:
            shutil.rmtree(left)
    assert kills > 1, "no kill came in time: nothing is proved"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models/smollm2-135m/config.json").is_file(), reason="the real model is not here")
def test_switching_between_the_real_models_adapters_takes_no_time(monkeypatch, loads):
    monkeypatch.chdir(ROOT)
    with open_host("smollm2-135m", ROOT / "adapters") as host:
        wait_until_warm(host)
        one = Sampling(max_new_tokens=1)
        times = {"same": [], "other": []}
        before = ""
        for who in ("base", "base", "quickstart", "quickstart") * 3:
            began = time.monotonic()
            host.answer(who, ask("Hi"), one, client="a")
            times["same" if who == before else "other"].append(time.monotonic() - began)
            before = who
        assert min(times["other"]) - min(times["same"]) < 0.2
        assert len(loads) == 1
