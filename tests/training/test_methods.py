"""SFT and KTO on a tiny model: TRL's losses at step 0, the same folder, resumed runs, and SFT before DPO."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from run_logs import logged
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo.adapters.passport import read_passport
from lora_dpo.cli.commands import main
from lora_dpo.config.reading import check_recipe, dump_recipe, read_recipe
from lora_dpo.config.recipe import LoraSection
from lora_dpo.config.trl_dpo import trainer_config, trainer_settings
from lora_dpo.data.answers import read_answers, tokenize_answers
from lora_dpo.errors import ConfigError, DataError, ReferenceMismatch
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.events import Compared, Progress, Resolved, Sampled, Stopped, StopSignal
from lora_dpo.model.base import load_base
from lora_dpo.model.lora import attach_lora, detach
from lora_dpo.training.planning.make_plan import plan
from lora_dpo.training.run import train
from lora_dpo.training.sft_kto_trainers import KTOTrainer, SFTTrainer, kto_rows, sft_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(method, **changes):
        trainer = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        changes["trainer"] = {**trainer, **changes.get("trainer", {})}
        return check_recipe(recipe_dict(method=method, **changes))

    return make


def answers_of(path, tokenizer, *, good_only):
    return tokenize_answers(tokenizer, read_answers(str(path), good_only=good_only)[0], max_length=None)[0]


def nats_a_token(model, answers):
    """Mean negative log-likelihood of the answers' tokens, one plain forward pass a row."""
    total, tokens = 0.0, 0
    for one in answers:
        ids = torch.tensor([one.prompt + one.answer])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
        places = range(len(one.prompt) - 1, ids.shape[1] - 1)
        total -= sum(float(logps[place, ids[0, place + 1]]) for place in places)
        tokens += len(one.answer)
    return total / tokens


# --- what the loss starts at ----------------------------------------------------------------------


def test_sft_starts_at_the_bases_own_log_likelihood_of_good_answers(recipe, tiny_model_folder):
    run = train(recipe("sft", trainer={"per_device_train_batch_size": 12}), name="sft")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    expected = nats_a_token(base, answers_of("pairs.jsonl", tokenizer, good_only=True))  # all 12 are the first batch
    assert logged(run.folder)[1] == pytest.approx(expected, rel=1e-5)
    held_out = nats_a_token(base, answers_of("eval.jsonl", tokenizer, good_only=True))
    assert logged(run.folder, "eval_loss")[0] == pytest.approx(held_out, rel=1e-5)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_starts_at_a_half(recipe, loss):
    plain = train(recipe("kto", trainer={"loss_type": loss, "max_steps": 1}), name="plain")
    assert logged(plain.folder)[1] == pytest.approx(0.5, abs=1e-6)
    assert logged(plain.folder, "eval_loss")[0] == pytest.approx(0.5, abs=1e-6)
    assert logged(plain.folder, "kl")[1] == pytest.approx(0.0, abs=1e-5)
    whole = {"loss_type": loss, "max_steps": 1, "desirable_weight": 1.5, "per_device_train_batch_size": 24}
    weighted = train(recipe("kto", trainer=whole), name="weighted")
    assert logged(weighted.folder)[1] == pytest.approx(0.5 * (1.5 * 12 + 1.0 * 12) / 24, abs=1e-6)


def test_dpo_after_sft_starts_at_ln_2_against_the_sft_adapter_on_one_base(recipe, tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    first = train(recipe("sft", trainer={"max_steps": 6}), name="sft", base=base)
    base.model = detach(first.model)
    settings = {"loss_type": "sigmoid", "max_steps": 3}
    second = recipe("dpo", reference=f"adapter:{first.folder}", trainer=settings)
    found = train(second, name="dpo", base=base)
    assert logged(found.folder)[1] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(found.folder)[3] < math.log(2)
    assert read_passport(found.folder).reference == f"adapter:{first.folder}"
    base.model = detach(found.model)
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    with pytest.raises(ConfigError, match=r"lora .* comes from the reference adapter"):
        train(recipe("sft", reference=f"adapter:{first.folder}", lora={"rank": 2}), name="no")


# --- the same folder, the same habits -------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_a_run_leaves_the_same_adapter_folder_as_dpo(recipe, method):
    events = []
    run = train(recipe(method), name=method, on_event=events.append)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curves.png", "measured.json", "metrics.jsonl",
        "passport.json", "recipe.yaml", "report.html", "verify.json",
    ]  # fmt: skip
    passport = read_passport(run.folder)
    assert passport.recipe["method"] == method
    assert passport.data["train"]["answers"] == (12 if method == "sft" else 24)
    assert passport.metrics["after"]["pairs"]["pairs"] == 4
    assert read_recipe(run.folder / "recipe.yaml").method == method
    card = (run.folder / "README.md").read_text()
    assert ("SFT" if method == "sft" else "KTO") in card
    assert "Direct Preference" not in card
    lines = dict(next(event.lines for event in events if isinstance(event, Resolved)))
    assert lines["train data"].startswith(f"{12 if method == 'sft' else 24} answers read")
    assert ("nll of good answers" if method == "sft" else "12 good at weight 1, 12 bad at 1") in lines["objective"]
    table = {row[0]: row[1:] for row in next(event.rows for event in events if isinstance(event, Compared))}
    assert "reward accuracy" in table
    assert any(name.startswith("held-out loss") for name in table)
    assert verify(run.folder).ok


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_it_learns(recipe, method):
    run = train(recipe(method, trainer={"max_steps": 20, "beta": 0.5} if method == "kto" else {"max_steps": 20}))
    losses = list(logged(run.folder).values())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    held_out = logged(run.folder, "eval_loss")
    assert held_out[20] < held_out[0]
    assert run.after.pairs.accuracy > 0.5
    if method == "sft":
        assert run.after.pairs.chosen_logratio > 0


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_resumed_losses_equal_uninterrupted_ones(recipe, method):
    whole = train(recipe(method, trainer={"max_steps": 5}), name="whole")
    stop = StopSignal()

    def stop_after_two(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 2:
            stop.requested = True

    with pytest.raises(Stopped) as stopped:
        train(recipe(method, trainer={"max_steps": 5}), name="cut", on_event=stop_after_two, stop=stop)
    assert stopped.value.resumable
    resumed = train(recipe(method, trainer={"max_steps": 5}), name="cut", resume=True)
    assert logged(resumed.folder) == pytest.approx(logged(whole.folder), rel=1e-6)
    assert logged(resumed.folder, "eval_loss") == pytest.approx(logged(whole.folder, "eval_loss"), rel=1e-6)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(resumed.model.state_dict()[name], value, atol=1e-7), name


def test_sft_on_conversations_alone_has_a_held_out_loss_and_no_pairs(recipe, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"Here: {n}."}]}
        for n in range(9)
    ]
    for name, part in (("shown.jsonl", rows[:6]), ("held.jsonl", rows[6:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    events = []
    data = {"train": "shown.jsonl", "eval": "held.jsonl"}
    run = train(recipe("sft", data=data), name="shown", on_event=events.append)
    assert run.after.pairs is None
    assert run.after.answers.chosen_mean_tokens == len("Here: 7.")
    rows = next(event.rows for event in events if isinstance(event, Compared))
    assert rows[-1][0] == "held-out loss (nats a token)"
    assert verify(run.folder).ok


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_the_guard_looks_at_answers_where_no_data_is_a_pair(recipe, tmp_path, method):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say {n}."}],
            "completion": [{"role": "assistant", "content": f"Here: {n}."}],
            "label": n % 2 == 0,
        }
        for n in range(12)
    ]
    for name, part in (("votes.jsonl", rows[:6]), ("held.jsonl", rows[6:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    for held_out, asked in (("held.jsonl", {"Say 6.", "Say 8.", "Say 10."}), (None, {"Say 0.", "Say 2.", "Say 4."})):
        events = []
        data = {"train": "votes.jsonl", "eval": held_out}
        changes = {"data": data, "health": {"action": "warn", "every": 2}}
        if held_out is None:
            changes["evaluation"] = {"answers": 0, "show": 0}
        train(recipe(method, **changes), name=f"looked-{held_out}", on_event=events.append)
        [look] = [event for event in events if isinstance(event, Sampled)]
        assert look.step == 2
        looked_at = {re.search(r"Say \d+\.", prompt)[0] for prompt, _, _ in look.rows}
        assert looked_at  # those among them that are answered before and after anyway, if there are any
        assert looked_at <= asked


def test_kto_needs_both_kinds_and_sft_a_good_one(recipe, tmp_path):
    vote = {"prompt": "Why?", "completion": "Because.", "label": True}
    (tmp_path / "votes.jsonl").write_text(json.dumps(vote) + "\n" + json.dumps({**vote, "completion": "So."}) + "\n")
    with pytest.raises(DataError, match="All 2 training answers are good: KTO needs both kinds"):
        train(recipe("kto", data={"train": "votes.jsonl"}))
    (tmp_path / "votes.jsonl").write_text(json.dumps({**vote, "label": False}) + "\n")
    with pytest.raises(DataError, match="no usable answer: a thumb down"):
        train(recipe("sft", data={"train": "votes.jsonl"}))


# --- against stock TRL ----------------------------------------------------------------------------


def test_the_same_numbers_as_stock_trl_on_text(tiny_model_folder, write_pairs, tmp_path):
    """TRL tokenises, pairs and trains by itself; the template must not write what is no part of an answer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
    assert "<|im_end|>' }}" in tokenizer.chat_template
    path = write_pairs(count=6)
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    votes = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    answers = answers_of(path, tokenizer, good_only=False)
    common = dict(max_steps=3, learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", seed=1,
                  per_device_train_batch_size=4, gradient_checkpointing=False, bf16=False, use_cpu=True,
                  disable_tqdm=True)  # fmt: skip

    def run(kind, config, rows):
        model = attach_lora(AutoModelForCausalLM.from_pretrained(tiny_model_folder), LoraSection(rank=4), seed=3)
        trainer = kind(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        wanted = ("loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "mean_token_accuracy")
        return [{key: row[key] for key in wanted if key in row} for row in trainer.state.log_history[:-1]]

    kto = trl.KTOConfig(str(tmp_path / "kto"), **common)
    theirs, ours = run(trl.KTOTrainer, kto, votes), run(KTOTrainer, kto, kto_rows(answers))
    assert len(ours) == 3
    for mine, stock in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(stock, rel=1e-5, abs=1e-6)
    good = [one for one in answers if one.up]
    text = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    theirs = run(trl.SFTTrainer, trl.SFTConfig(str(tmp_path / "sft"), **common), text)
    skip = trl.SFTConfig(str(tmp_path / "sft2"), dataset_kwargs={"skip_prepare_dataset": True}, **common)
    ours = run(SFTTrainer, skip, sft_rows(good))
    for mine, stock in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(stock, rel=1e-5, abs=1e-6)


def test_kto_stops_at_a_policy_that_is_not_its_reference(tiny_model_folder, write_pairs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = attach_lora(AutoModelForCausalLM.from_pretrained(tiny_model_folder), LoraSection(rank=4), seed=3)
    rows = kto_rows(answers_of(write_pairs(count=3), tokenizer, good_only=False))
    args = trl.KTOConfig(str(tmp_path / "kto"), report_to="none", bf16=False, use_cpu=True,
                         per_device_train_batch_size=2, gradient_checkpointing=False,
                         max_steps=1, save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = KTOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert trainer.check_reference() < 1e-6
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(0, 0.1)
    with pytest.raises(ReferenceMismatch, match="loss would not start at"):
        trainer.train()


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_an_adapter_on_a_packed_4_bit_base_keeps_float32_values(recipe, tiny_model_folder, method):
    base = load_base(str(tiny_model_folder), quantize="nf4", packed=True, dtype="float32")
    events = []
    before = {}

    def remember(event):
        if isinstance(event, Progress) and event.stage == "training" and not before:
            before.update({name: p.dtype for name, p in base.model.named_parameters() if ".default." in name})
        events.append(event)

    changed = recipe(method, model={"quantize": "nf4", "packed": True}, trainer={"learning_rate": 1e-6})
    run = train(changed, name="packed", base=base, on_event=remember)
    assert set(before.values()) == {torch.float32}
    moved = [p for name, p in run.model.named_parameters() if "lora_B.default" in name]
    assert all(0 < float(p.abs().max()) < 1e-5 for p in moved)


def test_the_kl_answers_are_the_neighbours(write_pairs, tokenizer):
    rows = kto_rows(answers_of(write_pairs(count=3), tokenizer, good_only=False))
    random.Random(0).shuffle(rows)
    from lora_dpo.training.sft_kto_trainers import _rotated

    columns = {key: [row[key] for row in rows] for key in rows[0]}
    rotated = _rotated(columns)["KL_completion_ids"]
    assert rotated == [rows[index - 1]["completion_ids"] for index in range(len(rows))]
    assert _rotated(columns)["prompt_ids"] == columns["prompt_ids"]


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("sft", {"trainer": {"beta": 0.1}}, "trainer.beta is not a field of TRL's SFTConfig"),
        ("sft", {"trainer": {"packing": True}}, "trainer.packing has no effect here"),
        ("sft", {"trainer": {"completion_only_loss": False}}, "trainer.completion_only_loss has no effect here"),
        ("sft", {"trainer": {"loss_type": "sigmoid"}}, "with method: sft allowed are nll, dft"),
        ("sft", {"trainer": {"loss_type": ["nll"]}}, "trainer.loss_type is"),
        ("sft", {"engine": {"tokens": 512}}, "engine.tokens changes nothing with method: sft"),
        ("sft", {"data": {"min_gap": 1.0}}, "data.min_gap changes nothing with method: sft"),
        ("kto", {"data": {"pair_weight": "gap"}}, "data.pair_weight changes nothing with method: kto"),
        ("sft", {"trainer": {"bf16": True}}, "set model.dtype: bfloat16 instead"),
        ("sft", {"trainer": {"learning_rate": 0.0}}, "a number above 0"),
        ("sft", {"trainer": {"report_to": "pigeon"}}, "report_to has 'pigeon'"),
        ("kto", {"trainer": {"loss_weights": [1.0]}}, "trainer.loss_weights is not a field of TRL's KTOConfig"),
        ("kto", {"trainer": {"loss_type": "ktoo"}}, "Did you mean kto"),
        ("kto", {"trainer": {"per_device_train_batch_size": 1}}, "Set 2 or more"),
        ("kto", {"trainer": {"train_sampling_strategy": "random"}}, "answers are shuffled once"),
        ("kto", {"trainer": {"precompute_ref_log_probs": True}}, "the reference is scored in every step"),
        ("kto", {"trainer": {"sync_ref_model": True}}, "no second model"),
        ("kto", {"engine": {"split_pairs": True}}, "engine.split_pairs changes nothing"),
        ("kto", {"lora": {"dropout": 0.1}}, "set trainer.disable_dropout: false"),
        ("kto", {"lora": {"targets": ["lm_head"]}}, "lora.targets has lm_head"),
        ("dpo", {"trainer": {"desirable_weight": 2.0}}, "trainer.desirable_weight is not a field of TRL's DPOConfig"),
        ("dpoo", {}, "method is 'dpoo'"),
    ],
)
def test_a_setting_that_the_method_would_ignore_is_refused(recipe_dict, method, change, message):
    settings = recipe_dict(method=method, **{"trainer": {}, **change})
    settings["trainer"] = change.get("trainer", {})
    with pytest.raises(ConfigError) as refused:
        trainer_settings(check_recipe(settings))
    assert message in str(refused.value)


def test_a_kto_without_kl_may_draw_at_random(recipe_dict):
    trainer = {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random", "per_device_train_batch_size": 1}
    settings = recipe_dict(method="kto")
    settings["trainer"] = trainer
    assert trainer_settings(check_recipe(settings))["train_sampling_strategy"] == "random"


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_fields_named_in_the_tables_are_trls(method, tmp_path):
    import dataclasses

    from lora_dpo.config.trl_sft_kto import METHODS

    fields = {field.name for field in dataclasses.fields(getattr(trl, METHODS[method].config))}
    assert set(METHODS[method].defaults) <= fields
    assert set(METHODS[method].elsewhere) <= fields
    config = trainer_config(METHODS[method].defaults, output_dir=tmp_path, dtype="float32", method=method)
    assert type(config).__name__ == METHODS[method].config


def test_a_plan_of_pairs_refuses_single_answers(recipe):
    with pytest.raises(ConfigError, match="known of pairs, not with method: kto"):
        plan(recipe("kto"))


@pytest.mark.parametrize(("method", "answers"), [("sft", 12), ("kto", 24)])
def test_a_plan_of_single_answers_reads_what_training_reads(method, answers, recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(method)))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{answers} answers" in shown
    assert f"not known for {method}; measured by train with trainer.max_steps=5" in shown
    assert "None" not in shown
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["data"]["train"]["pairs"], found["steps"], found["cut"]) == (answers, 2, 0)
    assert found["weights"] > 0 < found["adapter"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--measure"]) == 1
    assert "Leave them out" in capsys.readouterr().err


RECIPES = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_methods_are_valid_and_name_their_command(path, tmp_path):
    recipe = read_recipe(path)
    settings = trainer_settings(recipe)
    trainer_config(settings, output_dir=tmp_path, dtype="float32", method=recipe.method)
    header = path.read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert f"lora-dpo train {path.relative_to(ROOT)}" in header
    assert (ROOT / recipe.data.train).is_file()


def test_there_are_recipes_of_each_method():
    assert {read_recipe(path).method for path in RECIPES} == {"dpo", "sft", "kto"}
