"""One thinking model from training to all that uses its adapter: prompts are everywhere the tokenizer's own ids."""

import importlib
import io
import json
import shutil
import warnings
from pathlib import Path

import gguf
import pytest
from rich.console import Console
from templates import ALWAYS_THINKS, THINKING
from transformers import AutoTokenizer

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.describe import describe
from lora_dpo.adapters.loading import load_policy
from lora_dpo.adapters.passport import read_passport
from lora_dpo.cli.chat_loop import compare_once, say_once, speak
from lora_dpo.cli.commands import main
from lora_dpo.config.improve_recipe import ImproveRecipe
from lora_dpo.config.reading import check_recipe, read_recipe
from lora_dpo.data import read_pairs
from lora_dpo.data.prompts import Prompt
from lora_dpo.demo.arena import Arena
from lora_dpo.demo.conversation import Conversation, ask
from lora_dpo.demo.handlers import folded
from lora_dpo.demo.html import answer_card
from lora_dpo.demo.session import AppState
from lora_dpo.demo.votes import VoteLog
from lora_dpo.errors import AdapterError, BaseDiffers, ModelError, NoPairs
from lora_dpo.evaluation.evaluate import AssessPlan, assess
from lora_dpo.events import Note, Resolved, StopSignal
from lora_dpo.judging import Means, open_judge
from lora_dpo.judging.pair_making import make_pairs
from lora_dpo.judging.samples import SamplePlan
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling, generate, stream
from lora_dpo.quiet import quiet_libraries
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.merged_folder import merge
from lora_dpo.release.mixture import mix
from lora_dpo.serving.chat import open_chat
from lora_dpo.serving.host import Host, open_host
from lora_dpo.training.guard.completion_sampler import health_prompts
from lora_dpo.training.prepare import read_run
from lora_dpo.training.run import train

OFF = {"enable_thinking": False}
EMPTY = "<think>\n\n</think>\n\n"
SHORT = Sampling(max_new_tokens=4)
QUESTION = [{"role": "user", "content": "How many?"}]
HEARD = "lora_dpo.model.decoding", "lora_dpo.evaluation.kl", "lora_dpo.training.guard.completion_sampler"


@pytest.fixture(scope="module")
def model(tiny_model_folder, tmp_path_factory):
    """The tiny model with a template that thinks unless it is told not to."""
    folder = tmp_path_factory.mktemp("models") / "thinking"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def own(model):
    """The ids that the tokenizer itself gives a conversation, or a text that is asked."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(said, **kwargs):
        turns = [{"role": "user", "content": said}] if isinstance(said, str) else [dict(turn) for turn in said]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **kwargs))

    return ids


def listen(patch, heard):
    """Note the prompts that a model is asked with, however it is asked."""
    for name in HEARD:
        module = importlib.import_module(name)
        original = module.decode

        def decode(model, prompts, *rest, original=original):
            heard.extend(list(prompt) for prompt in prompts)
            return original(model, prompts, *rest)

        patch.setattr(module, "decode", decode)


@pytest.fixture
def heard(monkeypatch):
    found = []
    listen(monkeypatch, found)
    return found


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A training with the thought switched off: its folder, what it was asked with, what it said."""
    place = tmp_path_factory.mktemp("run")
    files = {}
    for name, numbers in (("train", range(6)), ("eval", range(10, 13))):
        rows = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": "Who knows."} for n in numbers]
        files[name] = str(place / f"{name}.jsonl")
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = check_recipe(
        {
            "model": {"name": str(model), "quantize": "none", "dtype": "float32", "template": OFF},
            "data": files,
            "evaluation": {"answers": 2, "max_new_tokens": 4},
            "health": {"prompts": 2, "max_new_tokens": 8, "every": 1},
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 2},
            "output": str(place / "adapters" / "off"),
        }
    )
    asked, said = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_DPO_CACHE", str(place / "cache"))
        listen(patch, asked)
        train(recipe, on_event=said.append)
    return place / "adapters" / "off", asked, said


def test_a_training_asks_and_keeps_what_it_was_told(run, own):
    folder, asked, said = run
    assert {tuple(prompt) for prompt in asked} == {tuple(own(f"{n}?", **OFF)) for n in (10, 11)}
    assert read_passport(folder).chat_template_kwargs == OFF
    assert read_recipe(folder / "recipe.yaml").model.template == OFF
    assert ("chat template", "with enable_thinking=false") in describe(folder)
    assert "Chat template with enable_thinking=false: ask it with the same." in (folder / "README.md").read_text(
        "utf-8"
    )
    lines = next(event.lines for event in said if isinstance(event, Resolved))
    assert ("template", "with enable_thinking=false") in lines
    stored = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
    prompts = [pair["prompt"] for pair in stored["pairs"]]
    assert prompts[0] == own("10?", **OFF)


def test_a_run_warns_of_a_keyword_that_changes_nothing(model, recipe_dict, tmp_path):
    heard = []
    section = {"name": str(model), "template": {"enable_thinkng": False}}
    read_run(check_recipe(recipe_dict(model=section)), tmp_path / "out", heard.append, StopSignal())
    [note] = [event for event in heard if isinstance(event, Note)]
    assert note.warning
    assert "does not read enable_thinkng" in note.text


def test_looks_and_measurements_ask_as_a_chat_does(model, recipe_dict, own, tmp_path):
    recipe = check_recipe(recipe_dict(model={"name": str(model)}, health={"prompts": 3}))
    run = read_run(recipe, tmp_path / "out", lambda event: None, StopSignal())
    asked = {tuple(own(prompt)) for prompt in run.prompts}
    assert all(tuple(pair.prompt) not in asked for pair in run.held_out)  # the empty thought is context there
    looks = health_prompts(run, asked)
    assert {tuple(look.prompt) for look in looks} == asked
    goods = {
        tuple(own(pair.prompt)): len(pair.chosen[0]["content"].encode()) for pair in read_pairs(recipe.data.eval)[0]
    }
    assert all(look.good == goods[tuple(look.prompt)] for look in looks)


@pytest.mark.parametrize("use_adapter", [True, False])
def test_a_chat_asks_as_the_adapter_was_trained(run, own, heard, use_adapter):
    chat = open_chat(run[0], sampling=SHORT)
    chat.use_adapter = use_adapter
    "".join(chat.say("How many?"))
    on = open_chat(run[0], sampling=SHORT, chat_template_kwargs={"enable_thinking": True})
    "".join(on.say("How many?"))
    assert heard == [own(QUESTION, **OFF), own(QUESTION)]


def test_a_host_asks_each_as_it_was_trained_and_a_request_may_ask_otherwise(run, model, own):
    with Host(load_base(str(model), quantize="none"), run[0].parent) as host:

        def prompt(who, **more):
            pending = host.submit(who, QUESTION, SHORT, client="one", deliver=lambda outcome: None, **more)
            pending.cancel()
            return list(pending.asked.prompt)

        assert prompt("off") == own(QUESTION, **OFF)
        assert prompt("base") == own(QUESTION)
        assert prompt("off", chat_template_kwargs={"enable_thinking": True}) == own(QUESTION)
        assert prompt("base", chat_template_kwargs=OFF) == own(QUESTION, **OFF)
        reply = host.answer("base", QUESTION, SHORT, client="one", chat_template_kwargs=OFF)
        assert reply.prompt_tokens == len(own(QUESTION, **OFF))
        # the demo asks through it
        [turn] = list(ask(host, Conversation(), "How many?", ["off"], SHORT))[-1:]
        assert turn.answers[0].prompt_tokens == len(own(QUESTION, **OFF))


def test_an_evaluation_and_new_pairs_ask_alike(run, own, heard, tmp_path):
    data = tmp_path / "eval.jsonl"
    data.write_text('{"prompt": "How many?", "chosen": "Two.", "rejected": "Three, or four."}\n', encoding="utf-8")
    policy = load_policy(adapter=run[0])
    judge = open_judge(["implicit"], Means(base=policy.base, policy=policy.model, chat_template_kwargs=OFF))
    plan = AssessPlan(answers=1, kl_answers=1, sampling=SHORT)
    found = assess(policy, [str(data)], plan=plan, judge=judge)
    assert found.pairs.pairs == 1
    prompts = [Prompt(tuple(QUESTION), "p", 1)]
    plan = SamplePlan(answers=6, sampling=Sampling(max_new_tokens=3, temperature=2.0))
    with pytest.raises(NoPairs):  # three tokens are too few to end an answer
        make_pairs(prompts, policy, open_judge(["rules:no-repeat"]), tmp_path / "new.jsonl", plan=plan)
    assert len(heard) == 3 + 6
    assert all(prompt == own(QUESTION, **OFF) for prompt in heard)
    assert policy.facts["chat_template_kwargs"] == OFF
    on = load_policy(adapter=run[0], chat_template_kwargs={"enable_thinking": True})
    assert on.chat_template_kwargs == {"enable_thinking": True}


def test_an_improvement_asks_by_its_recipe(model):

    settings = {
        "model": {"name": str(model), "template": OFF},
        "improve": {"prompts": "p", "held_out": "h", "judge": "j"},
    }
    recipe = ImproveRecipe.model_validate(settings)

    trained = recipe.training(reference="base", pairs=Path("a.jsonl"), output=Path("out"))
    assert trained.model.template == OFF


# --- where it goes --------------------------------------------------------------------------------


def test_a_merged_folder_has_them_as_defaults(run, own, tmp_path):
    merge(run[0], tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False) == own(
        QUESTION, **OFF
    )
    on = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False, enable_thinking=True)
    assert on == own(QUESTION)


def test_what_a_command_says_of_them(run, tmp_path, capsys):
    words = [str(run[0]), "--output", str(tmp_path / "merged"), "--no-report"]
    assert main(["merge", *words]) == 0
    assert "trained with enable_thinking=false: the defaults of the chat template in it" in capsys.readouterr().out
    assert main(["export", str(run[0]), "--to", "peft", "--output", str(tmp_path / "peft")]) == 0
    assert "give them to the server, since no template is in it" in capsys.readouterr().out


def test_a_mix_has_the_keywords_that_all_have(run, make_adapter, model, tmp_path):
    other = make_adapter(tmp_path / "other", model=model, rank=16)
    with pytest.warns(BaseDiffers, match="trained with other keywords for the chat template") as told:
        mix([(run[0], 1.0), (other, 1.0)], tmp_path / "mixed", method="linear")
    assert "(off: enable_thinking=false; other: none)" in str(told[-1].message)
    assert open_adapter(tmp_path / "mixed").chat_template_kwargs == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseDiffers)
        mix([(run[0], 1.0)], tmp_path / "alone", method="svd", rank=4)
    assert open_adapter(tmp_path / "alone").chat_template_kwargs == OFF


@pytest.mark.parametrize("bad", [{"tokenize": True}, {"a": "x" * 5000}, {"a b": 1}])
def test_a_passport_from_elsewhere_is_checked(run, tmp_path, bad):
    shutil.copytree(run[0], tmp_path / "theirs")
    path = tmp_path / "theirs" / "passport.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "chat_template_kwargs": bad}))
    with pytest.raises(AdapterError, match=r"passport\.json cannot be read \(.*Take the adapter from its source"):
        open_adapter(tmp_path / "theirs")


# --- what is thought ------------------------------------------------------------------------------


def written(monkeypatch, *pieces):
    def stream(model, tokenizer, messages, **settings):
        yield from pieces

    monkeypatch.setattr("lora_dpo.serving.chat.stream", stream)


@pytest.fixture
def chat(run):
    return open_chat(run[0], sampling=SHORT)


def shown(run, *asked):
    out = io.StringIO()
    run(*asked, Console(file=out, force_terminal=True, color_system="standard", width=100))
    return out.getvalue()


def test_a_terminal_shows_a_thought_dim_and_keeps_it_in_the_history(chat, monkeypatch):
    written(monkeypatch, "<th", "ink>\nHm", "m.\n</thi", "nk>\n\nTwo", ".")
    text = shown(speak, chat, "How many?")
    assert "\x1b[2mHm\x1b[0m" in text
    assert "Two" in text
    assert "think>" not in text
    assert "\x1b[2mTwo" not in text
    assert chat.history[-1]["content"] == "<think>\nHmm.\n</think>\n\nTwo."


def test_a_script_gets_the_answer_alone_and_a_word_on_the_thought(chat, monkeypatch):
    written(monkeypatch, "<think>\nHm, so.\n</think>\n\n", "Two.")
    out = io.StringIO()
    assert say_once(chat, "How many?", out) == "thought 2 words first, not shown"
    assert out.getvalue() == "Two.\n"
    written(monkeypatch, "<think>\nHm")
    assert say_once(chat, "How many?", out).endswith("was cut before it answered: raise --max-new-tokens")
    written(monkeypatch, "Two.")
    assert say_once(chat, "How many?", out) == ""


def test_a_comparison_shows_the_answers(chat, monkeypatch):
    written(monkeypatch, "<think>\nHm.\n</think>\n\n", "Two.")
    text = shown(compare_once, chat, "How many?")
    assert "(thought 1 word first, not shown)" in text
    assert "Hm" not in text


def test_a_page_folds_a_thought_away():
    text = "<think>\nHm, <b>hm</b>.\n</think>\n\nTwo."
    markdown = folded(text)
    assert markdown.startswith("<details><summary>thought 2 words</summary>\n\nHm, &lt;b>hm&lt;/b>.")
    assert markdown.endswith("</details>\n\nTwo.")
    assert folded("Two.") == "Two."
    assert folded("<think></think>Two.") == "Two."
    assert folded("<think>Hm").startswith("<details><summary>thought 1 word, no answer yet</summary>")
    card = answer_card("A", text)
    assert '<details class="folded"><summary>thought 2 words</summary>Hm, &lt;b&gt;hm&lt;/b&gt;.</details>Two.' in card


def test_a_thought_that_the_prompt_opens_is_whole_in_the_answer(model, tmp_path, make_adapter):
    folder = tmp_path / "always"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(ALWAYS_THINKS, encoding="utf-8")
    base = load_base(str(folder), quantize="none")
    [answer] = generate(base.model, base.tokenizer, [QUESTION], sampling=SHORT)
    assert answer.text.startswith("<think>\n")
    assert (answer.said, answer.said_tokens, answer.tokens) == ("", 0, 4)
    pieces = list(stream(base.model, base.tokenizer, QUESTION, sampling=SHORT))
    assert pieces[0] == "<think>\n"
    assert "".join(pieces).strip() == answer.text
    with Host(base, tmp_path / "none") as host:
        [turn] = list(ask(host, Conversation(), "How many?", ["base"], SHORT))[-1:]
        assert turn.answers[0].text.startswith("<think>\n")
        assert not host.answer("base", QUESTION, SHORT, client="one").text.startswith("<think>")


def test_the_gguf_file_has_them_in_its_template(run, tmp_path, text_tokenizer, make_adapter, tiny_model_folder):
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)
    text_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(THINKING, encoding="utf-8")
    adapter = make_adapter(tmp_path / "adapter", model=folder)
    path = adapter / "passport.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "chat_template_kwargs": OFF}))
    with quiet_libraries():
        export(adapter, tmp_path / "m.gguf", to="gguf")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.chat_template"]
    text = bytes(field.parts[field.data[0]]).decode()
    assert text == "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}\n" + THINKING
    with pytest.raises(ModelError, match="does more than write turns"):
        export(adapter, tmp_path / "ollama", to="ollama")


def test_commands_on_data_write_with_them(model, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "How many?", "chosen": "Two.", "rejected": "Three."}\n', encoding="utf-8")
    words = [str(path), "--model", str(model), "--template"]
    assert main(["data", "show", *words, "enable_thinking=false"]) == 0
    assert "does not read" not in capsys.readouterr().err
    assert main(["data", "check", *words, "enable_thinkng=false"]) == 0
    assert "does not read enable_thinkng" in " ".join(capsys.readouterr().err.split())
    assert main(["data", "show", str(path), "--template", "enable_thinking=false"]) == 1
    assert "name it with --model" in capsys.readouterr().err


def test_commands_that_ask_a_model_warn_of_a_keyword_that_changes_nothing(run, model, tmp_path, capsys):
    adapter, prompts = str(run[0]), tmp_path / "prompts.txt"
    prompts.write_text("How many?\n", encoding="utf-8")
    short = ["--max-new-tokens", "4", "--template"]
    pairs = ["pairs", str(prompts), "--model", str(model), "--judge", "rules:no-repeat", "--answers", "2"]
    for number, (name, warned) in enumerate((("enable_thinkng", True), ("enable_thinking", False))):
        for words in (
            ["chat", adapter, "--prompt", "How many?", *short, f"{name}=true"],
            ["eval", adapter, "--data", str(run[0].parents[1] / "eval.jsonl"), "--answers", "1", "--kl-answers", "0",
             "--output", str(tmp_path / f"measured{number}"), *short, f"{name}=true"],
            [*pairs, "--output", str(tmp_path / f"pairs{number}.jsonl"), *short, f"{name}=true"],
        ):  # fmt: skip
            main(words)
            said = " ".join(capsys.readouterr().err.split())
            assert (f"warning: The chat template of '{model}' does not read {name}" in said) == warned, words[0]
            assert "error:" not in said or words[0] == "pairs", said


def test_the_base_is_asked_as_the_adapter_beside_it(run, model, own, heard, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(run[0], folder / "off")
    shutil.copytree(run[0], folder / "on")
    passport = json.loads((folder / "on" / "passport.json").read_text(encoding="utf-8"))
    (folder / "on" / "passport.json").write_text(json.dumps({**passport, "chat_template_kwargs": {}}), encoding="utf-8")
    without, with_them = own(QUESTION), own(QUESTION, **OFF)
    with Host(load_base(str(model), quantize="none", dtype="float32"), folder) as host:

        def asked(*players):
            heard.clear()
            list(ask(host, Conversation(), "How many?", players, SHORT))
            compared = list(heard)
            heard.clear()
            arena = Arena(host, VoteLog(tmp_path / "votes.jsonl"), adapters_dir=folder)
            sampling = Sampling(max_new_tokens=4, temperature=1.0)
            match = arena.draw(QUESTION, players, sampling)
            list(arena.answers(match, client="one"))
            if len(players) == 2:  # in a random order
                order = dict(zip(match.players, heard, strict=True))
                assert [order[player] for player in players] == compared
            return compared

        assert asked("base", "off") == [with_them, with_them]
        assert asked("off", "base") == [with_them, with_them]
        assert asked("base", "on") == [without, without]
        assert asked("off", "on") == [with_them, without]  # each as it was trained
        assert asked("base") == [without]


@pytest.mark.parametrize(
    ("named", "kwargs", "said"),
    [
        ({}, OFF, "with enable_thinking=false (as the reference adapter was trained)"),
        (OFF, OFF, "with enable_thinking=false (as the reference adapter was trained)"),
        ({"enable_thinking": True}, {"enable_thinking": True}, "with enable_thinking=true"),
    ],
)
def test_training_goes_on_with_the_keywords_of_its_reference(
    run, model, own, heard, recipe_dict, tmp_path, monkeypatch, named, kwargs, said
):
    monkeypatch.chdir(tmp_path)
    told = []
    settings = recipe_dict(trainer={"max_steps": 1}, reference=f"adapter:{run[0]}", health={"prompts": 1, "every": 1})
    settings["model"]["name"], settings["model"]["template"] = str(model), named
    folder = train(check_recipe(settings), name="further", on_event=told.append).folder
    assert read_passport(folder).chat_template_kwargs == kwargs
    assert read_recipe(folder / "recipe.yaml").model.template == kwargs
    lines = next(event.lines for event in told if isinstance(event, Resolved))
    assert ("template", said) in lines
    tail = own(QUESTION, **kwargs)[-12:]
    assert heard
    assert all(prompt[-12:] == tail for prompt in heard)


def test_the_demo_trains_and_watches_with_the_keywords_of_the_reference(run, model, own, heard, recipe_dict, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(run[0], folder / "off")
    with open_host(str(model), folder, quantize="none", dtype="float32") as host:
        app_state = AppState(host, tmp_path / "collected", scratch=tmp_path / "scratch")
        settings = recipe_dict(
            trainer={"max_steps": 1}, reference=f"adapter:{folder / 'off'}", health={"action": "none"},
            output=str(folder / "further"),
        )  # fmt: skip
        settings["model"] = app_state.host.model_section().model_dump(exclude_defaults=True)
        training = app_state.start_training(check_recipe(settings), "further", ["How many?"])
        assert training.job.wait(120)
        assert training.job.error is None
    assert read_passport(folder / "further").chat_template_kwargs == OFF
    assert own("How many?", **OFF) in heard
    assert own("How many?") not in heard
