"""What the engine cannot express exactly goes to TRL's own passes, and a warning says why."""

import copy
import io
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig
from tiny import DYNAMIC, LONGROPE, LORA, PAIRS, Stock, build, columns, pair, tiny
from torch.testing._internal.two_tensor import TwoTensor
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.engine.pair_forward import DIFFERENCE, ROUNDED_DIFFERENCE, largest_difference
from lora_dpo.errors import ConfigError, ModelError, ReferenceMismatch
from lora_dpo.model.base import keep_packed_weights_differentiable
from lora_dpo.model.device import out_of_memory
from lora_dpo.model.lora import is_reference
from lora_dpo.training.engine_fallback import no_engine_because, unsupported_batch

OPTIONS = dict(max_steps=3, learning_rate=1e-2, logging_steps=1, per_device_train_batch_size=2, optim="sgd")
LONG = [pair([1, *range(20, 40)], [8, 9, 2], [10, 2]), *PAIRS]


def fresh(kind, folder, tmp_path, model=None, callbacks=(), rows=None, collator=None, **options):
    """A trainer whose adapter is new, so that the policy is the reference."""
    trainer = build(kind, model or tiny("llama"), folder, tmp_path, **{**OPTIONS, **options})
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.zero_()
    for callback in callbacks:
        trainer.add_callback(callback)
    if rows is not None:
        trainer.train_dataset = rows
    if collator is not None:
        trainer.data_collator = collator
    return trainer


def trained(kind, *args, **options):
    trainer = fresh(kind, *args, **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [row["loss"] for row in rows], [row["grad_norm"] for row in rows], trainer


def same_as_stock(folder, tmp_path, kind=DPOTrainer, stock=Stock, **options):
    ours, theirs = trained(kind, folder, tmp_path, **options), trained(stock, folder, tmp_path, **options)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=3e-5)
    return ours[2]


class Left:
    """Pads on the left."""

    def __init__(self):
        self.inner = DataCollatorForPreference(pad_token_id=0)

    def __call__(self, rows):
        batch = self.inner(rows)
        for row, mask in enumerate(batch["attention_mask"].clone()):
            for values in batch.values():
                values[row] = torch.roll(values[row], len(mask) - int(mask.sum()))
        return batch


class Adds(Left):
    """Adds a model input."""

    def __call__(self, rows):
        batch = self.inner(rows)
        return {**batch, "position_ids": 2 * torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


# --- a batch's form --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collator", "reason", "where"),
    [
        *((Left, "pads elsewhere", where) for where in ("guard", "stream", "precompute")),
        *((Adds, "adds position_ids", where) for where in ("guard", "first step", "accumulated")),
    ],
)
def test_a_collator_of_ones_own_trains_as_in_stock_trl(collator, reason, where, tiny_model_folder, tmp_path, caplog):
    class NoGuard(DPOTrainer):
        reference_guard = False

    options = {"collator": collator()}
    if where == "stream":
        options["rows"] = Dataset.from_list(columns(PAIRS)).to_iterable_dataset()
    if where == "accumulated":
        options |= {"gradient_accumulation_steps": 2, "max_steps": 1, "per_device_train_batch_size": 1}
    kind = DPOTrainer if where in ("guard", "precompute") else NoGuard
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        trainer = same_as_stock(tiny_model_folder, tmp_path, kind, **options)
    assert trainer.engine is None
    assert reason in caplog.text


def test_an_odd_batch_in_the_middle_of_a_step_loses_none_before_it(tiny_model_folder, tmp_path):
    class Sometimes(Left):
        calls = 0

        def __call__(self, rows):
            self.calls += 1
            return super().__call__(rows) if self.calls % 4 == 0 else self.inner(rows)

    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=1, max_steps=2)
    same_as_stock(tiny_model_folder, tmp_path, collator=Sometimes(), **options)


def test_evaluation_before_training_checks_too(tiny_model_folder, tmp_path):
    ours, stock = (fresh(kind, tiny_model_folder, tmp_path, collator=Adds()) for kind in (DPOTrainer, Stock))
    assert ours.evaluate()["eval_logps/chosen"] == pytest.approx(stock.evaluate()["eval_logps/chosen"], rel=1e-6)
    assert ours.engine is None


def test_what_an_odd_batch_is():
    good = DataCollatorForPreference(pad_token_id=0)(columns(PAIRS))
    assert unsupported_batch(good, weighted=False) is None
    assert "adds pair_weight" in unsupported_batch({**good, "pair_weight": torch.ones(4)}, weighted=False)
    assert unsupported_batch({**good, "pair_weight": torch.ones(4)}, weighted=True) is None
    assert "leaves out attention_mask" in unsupported_batch(
        {k: v for k, v in good.items() if k[0] != "a"}, weighted=False
    )
    hole = {name: value.clone() for name, value in good.items()}
    hole["attention_mask"][0, 1] = 0
    assert "pads elsewhere" in unsupported_batch(hole, weighted=False)
    empty = {name: value.clone() for name, value in good.items()}
    for values in empty.values():
        values[0] = 0
    assert "pads elsewhere" in unsupported_batch(empty, weighted=False)
    scored = {name: value.clone() for name, value in good.items()}
    scored["completion_mask"][:] = 1
    assert "pads elsewhere" in unsupported_batch(scored, weighted=False)
    assert "pairs of rows" in unsupported_batch({name: value[:3] for name, value in good.items()}, weighted=False)


# --- the first batch, run both ways ----------------------------------------------------------------


def test_an_engine_that_computes_something_else_steps_aside_before_the_first_step(tiny_model_folder, tmp_path, caplog):
    # One layer with a configuration of its own does not get the stream's attention: it sees other pairs.
    def model():
        one = tiny("llama")
        one.model.layers[1].self_attn.config = copy.deepcopy(one.config)
        return one

    ours, stock = (trained(kind, tiny_model_folder, tmp_path, model=model()) for kind in (DPOTrainer, Stock))
    assert ours[0] == stock[0]
    assert ours[2].engine is None
    assert "on the first batch the engine's log-probabilities differ from TRL's by" in caplog.text
    assert ours[2].model.get_base_model().config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=r"engine\.fallback is false, but on the first batch"):
        trained(DPOTrainer, tiny_model_folder, tmp_path, model=model(), engine=EngineSection(fallback=False))


def test_nothing_is_cached_by_an_engine_that_steps_aside(tiny_model_folder, tmp_path, own_cache):
    def model():
        one = tiny("llama")
        one.model.layers[1].self_attn.config = copy.deepcopy(one.config)
        return one

    class FreshCache(DPOTrainer):
        pass

    trainer = fresh(FreshCache, tiny_model_folder, tmp_path, model=model(), precompute_ref_log_probs=True)
    stock = fresh(Stock, tiny_model_folder, tmp_path, model=model(), precompute_ref_log_probs=True)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert trainer.train_dataset[name][:] == stock.train_dataset[name][:]
    assert not list(own_cache.rglob("*.sqlite"))


def test_how_far_the_engine_may_be_from_trl(monkeypatch):
    model = tiny("llama")
    assert largest_difference(model) == DIFFERENCE
    assert largest_difference(tiny("llama").bfloat16()) == ROUNDED_DIFFERENCE
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # TF32
        assert largest_difference(model) == ROUNDED_DIFFERENCE
    model.model.layers[1].mlp.compute_dtype = torch.bfloat16  # as a 4-bit layer has it
    assert largest_difference(model) == ROUNDED_DIFFERENCE


def test_the_comparison_draws_no_random_numbers(tiny_model_folder, tmp_path):
    lora = LoraConfig(**{**LORA.to_dict(), "lora_dropout": 0.5})
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, lora=lora, disable_dropout=False)
    before = torch.get_rng_state()
    assert trainer.engine.difference(trainer.data_collator(columns(PAIRS))) is None
    assert torch.equal(torch.get_rng_state(), before)


# --- settings and set-ups --------------------------------------------------------------------------


class Triples(DPOTrainer):
    def compute_loss(self, *args, **kwargs):
        return 3.0 * super().compute_loss(*args, **kwargs)


class StockTriples(Stock):
    def compute_loss(self, *args, **kwargs):
        return 3.0 * super().compute_loss(*args, **kwargs)


def test_a_subclass_with_its_own_loss_is_asked_for_it(tiny_model_folder, tmp_path):
    assert same_as_stock(tiny_model_folder, tmp_path, Triples, StockTriples).engine is None


def test_a_method_put_on_the_trainer_afterwards_is_called(tiny_model_folder, tmp_path):
    trainer = fresh(DPOTrainer, tiny_model_folder, tmp_path)
    plain, called = trainer.compute_loss, []
    trainer.compute_loss = lambda *args, **kwargs: (called.append(1), plain(*args, **kwargs))[1]
    trainer.train()
    assert len(called) == 3


def test_a_subclass_with_its_own_reference_is_asked_for_it(tiny_model_folder, tmp_path):
    def shifted(kind):
        class Mine(kind):
            reference_guard = False

            def compute_ref_log_probs(self, model, inputs):
                return tuple(value + shift for shift, value in enumerate(super().compute_ref_log_probs(model, inputs)))

        return Mine

    kinds = shifted(DPOTrainer), shifted(Stock)
    assert same_as_stock(tiny_model_folder, tmp_path, *kinds, precompute_ref_log_probs=True).engine is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "sft"], "per_device_train_batch_size": 1,
          "gradient_accumulation_steps": 2}, "in place"),
        ({"lora": LoraConfig(**{**LORA.to_dict(), "layer_replication": [[0, 2], [1, 2]]})}, "layer_replication"),
    ],
)  # fmt: skip
def test_settings_that_a_first_batch_cannot_show(options, reason, tiny_model_folder, tmp_path, caplog):
    assert same_as_stock(tiny_model_folder, tmp_path, **options).engine is None
    assert reason in caplog.text


def test_set_ups_that_need_trls_own_passes(monkeypatch, tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    assert no_engine_because(trainer, DPOTrainer) is None
    adapter = trainer.model.peft_config["default"]
    for of, name, value, reason in (
        (trainer, "is_fsdp_enabled", True, "sharded"),
        (trainer, "is_deepspeed_enabled", True, "sharded"),
        (trainer.args, "activation_offloading", True, "activation_offloading"),
        (trainer.args, "optim", "adalomo", "within the backward pass"),
        (adapter, "bias", "lora_only", "biases of the base"),
        (adapter, "alora_invocation_tokens", [5], "another kind than LoRA"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(of, name, value)
            assert reason in no_engine_because(trainer, DPOTrainer)


@pytest.mark.parametrize("options", [{"torch_compile": True}, {}], ids=["setting", "layer"])
def test_a_compiled_model(options, tiny_model_folder, tmp_path, caplog):
    model = tiny("llama")
    if not options:
        model.model.layers[1].compile()
    assert build(DPOTrainer, model, tiny_model_folder, tmp_path, **options).engine is None
    assert "compiled" in caplog.text


@pytest.mark.parametrize(
    ("kind", "rope", "max_length", "engine"),
    [
        ("phi3", LONGROPE, 16, True),
        ("phi3", LONGROPE, 17, False),
        ("llama", DYNAMIC | {"max_position_embeddings": 16}, None, False),
        ("llama", DYNAMIC | {"max_position_embeddings": 16}, 16, True),
        ("gemma3_text", {"rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": DYNAMIC["rope_parameters"],
        }}, None, False),
    ],
)  # fmt: skip
def test_rotary_frequencies_of_the_longest_row(kind, rope, max_length, engine, tiny_model_folder, tmp_path):
    options = dict(pairs=LONG, max_length=max_length, per_device_train_batch_size=2)
    trainer = build(DPOTrainer, tiny(kind, **rope), tiny_model_folder, tmp_path, **options)
    assert (trainer.engine is not None) == engine
    if engine:  # the second trainer finds the references of rows whose batch had another longest row
        stock, *ours = (
            trained(each, tiny_model_folder, tmp_path, model=tiny(kind, **rope), **options)
            for each in (Stock, DPOTrainer, DPOTrainer)
        )
        assert all(each[0] == pytest.approx(stock[0], abs=1e-5) for each in ours)


def test_a_base_whose_weights_are_no_plain_tensors(tiny_model_folder, tmp_path, caplog):
    model = tiny("llama")
    weight = model.lm_head.weight.data
    model.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    trainer = build(DPOTrainer, model, tiny_model_folder, tmp_path)
    assert trainer.engine is None
    assert "TwoTensor" in caplog.text


# --- between the steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_callback_may_use_the_model_and_pickle_it(checkpointing, tiny_model_folder, tmp_path):
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                hidden = model.get_base_model().model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
            if not checkpointing:  # for which transformers puts on a hook that cannot be pickled
                torch.save(model, io.BytesIO())
            seen.append((float(hidden.sum()), model.config._attn_implementation))

    def looked(kind):
        seen.clear()
        trainer = fresh(kind, tiny_model_folder, tmp_path, callbacks=[Looks()], gradient_checkpointing=checkpointing)
        if kind is DPOTrainer and checkpointing:
            trainer.engine.whole_step.budget.free = lambda: 1000  # so that layers are checkpointed
        trainer.train()
        return [*seen]

    ours, stock = looked(DPOTrainer), looked(Stock)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in stock], rel=1e-4)
    assert {name for _, name in ours} == {"sdpa"}


class StopsAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class LogsAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step == 2


@pytest.mark.parametrize(
    ("callback", "options"),
    [(StopsAt(), {"logging_steps": 10}), (LogsAt(), {"logging_steps": 10}), (LogsAt(), {"logging_strategy": "no"})],
)
def test_rows_that_nobody_announced_hold_what_trl_logs(callback, options, tiny_model_folder, tmp_path):
    names = []
    for kind in (DPOTrainer, Stock):
        trainer = fresh(kind, tiny_model_folder, tmp_path, callbacks=[callback], **options)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
        names.append([{name for name in row if "first_sight" not in name} for row in rows])
        assert all(row["entropy"] > 0.1 for row in rows)
    assert names[0] == names[1]


# --- the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"a": data}], ids=["one", "dict"])
def test_a_stream_is_evaluated(wrap, tiny_model_folder, tmp_path):
    values = []
    for kind in (DPOTrainer, Stock):
        trainer = build(kind, tiny("llama"), tiny_model_folder, tmp_path, per_device_eval_batch_size=2)
        stream = Dataset.from_list(columns(PAIRS)).to_iterable_dataset()
        assert isinstance(stream, IterableDataset)
        found = trainer.evaluate(wrap(stream))
        values.append([found[name] for name in found if name.endswith("loss")])
        assert trainer.precompute_ref_logps is False
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_references_in_the_data_count_only_where_trl_reads_them(tiny_model_folder, tmp_path):
    stored = Dataset.from_list(
        [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -9.0} for row in columns(PAIRS)]
    )
    same_as_stock(tiny_model_folder, tmp_path, rows=stored)


def test_an_evaluation_with_references_of_its_own_is_no_tie(tiny_model_folder, tmp_path):
    trainer = fresh(DPOTrainer, tiny_model_folder, tmp_path, precompute_ref_log_probs=True)
    assert trainer.evaluate()["eval_rewards/accuracies"] == 0  # the policy is still the reference
    stored = [{**row, "ref_chosen_logps": -900.0, "ref_rejected_logps": 0.0} for row in columns(PAIRS)]
    assert trainer.evaluate(Dataset.from_list(stored))["eval_rewards/accuracies"] == 1


def test_references_scored_ahead_are_trls_columns(tiny_model_folder, tmp_path):
    ours, stock = (
        build(kind, tiny("llama"), tiny_model_folder, tmp_path, precompute_ref_log_probs=True, ld_alpha=0.5)
        for kind in (DPOTrainer, Stock)
    )
    for mine, theirs in ((ours.train_dataset, stock.train_dataset), (ours.eval_dataset, stock.eval_dataset)):
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert mine[name][:] == pytest.approx(theirs[name][:], rel=1e-5)
    ours.close()
    assert ours.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)


def test_a_closed_trainer_evaluates(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.close()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)


def test_an_eval_split_may_be_named_train(tiny_model_folder, tmp_path):
    # scored ahead by TRL's own passes
    trainer = build(Triples, tiny("llama"), tiny_model_folder, tmp_path)
    held_out = {"train": Dataset.from_list(columns(PAIRS[:2])), "test": Dataset.from_list(columns(PAIRS[:1]))}
    trainer = Triples(
        tiny("llama"), args=trainer.args.__class__(**{**OPTIONS, "output_dir": str(tmp_path), "bf16": False,
        "use_cpu": True, "report_to": "none", "precompute_ref_log_probs": True, "gradient_checkpointing": False}),
        train_dataset=Dataset.from_list(columns(PAIRS)), eval_dataset=held_out, peft_config=LORA,
        processing_class=trainer.processing_class,
    )  # fmt: skip
    assert len(trainer.train_dataset) == 4
    assert [len(trainer.eval_dataset[name]) for name in ("train", "test")] == [2, 1]
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    assert all("ref_chosen_logps" in trainer.eval_dataset[name].column_names for name in ("train", "test"))


def test_weights_in_the_data_count_only_where_they_are_asked_for(tiny_model_folder, tmp_path):
    weighted = Dataset.from_list(columns(PAIRS)).add_column("pair_weight", [0.0, 3.0, 0.5, 0.5])
    same_as_stock(tiny_model_folder, tmp_path, rows=weighted)


def test_a_collator_that_masks_something_gets_references_of_its_own(tiny_model_folder, tmp_path):
    class NoEnd(Left):
        def __call__(self, rows):
            batch = self.inner(rows)
            return {**batch, "completion_mask": batch["completion_mask"] * (batch["input_ids"] != 2)}

    trained(DPOTrainer, tiny_model_folder, tmp_path)  # fills the cache
    assert same_as_stock(tiny_model_folder, tmp_path, collator=NoEnd()).engine is not None


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (LoraConfig(**{**LORA.to_dict(), "init_lora_weights": "olora"}), "init_lora_weights='olora' starts an adapter"),
        (LoraConfig(**{**LORA.to_dict(), "init_lora_weights": "pissa"}), "init_lora_weights='pissa' starts an adapter"),
        (LoraConfig(**{**LORA.to_dict(), "init_lora_weights": "pissa_niter_2"}), "'pissa_niter_2' starts an adapter"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "With PromptTuningConfig"),
    ],
)
def test_the_guard_names_what_the_adapter_starts_from(lora, says, tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path, lora=lora)
    with pytest.raises(ReferenceMismatch, match=says) as caught:
        trainer.train()
    assert "reference_guard = False" in str(caught.value)


# --- ties ------------------------------------------------------------------------------------------


def test_ties_are_wrong_as_in_stock_trl(tiny_model_folder, tmp_path):
    # the policy is the reference at step 1; later, equal answers still tie
    equal = [pair([1, 5, 6], [7, 8, 9, 2], [7, 8, 9, 2]), pair([1, 9], [10, 2], [10, 2])]
    for pairs in (PAIRS, equal):
        accuracies = []
        for kind in (DPOTrainer, Stock):
            trainer = fresh(kind, tiny_model_folder, tmp_path, pairs=pairs, eval_strategy="steps", eval_steps=1,
                            loss_type=["sft"] if pairs is equal else ["sigmoid"])  # fmt: skip
            trainer.evaluate()
            trainer.train()
            rows = trainer.state.log_history
            accuracies.append([value for row in rows for name, value in row.items() if "accuracies" in name])
        assert accuracies[0] == accuracies[1]
        assert accuracies[0][0] == 0


def test_when_the_policy_is_still_the_reference(tiny_model_folder, tmp_path):
    lora = LoraConfig(**{**LORA.to_dict(), "modules_to_save": ["norm"]})
    model = fresh(DPOTrainer, tiny_model_folder, tmp_path, lora=lora).model
    values = dict(model.named_parameters())

    def moves_away(end):
        value = next(value for name, value in values.items() if name.endswith(end)).data
        before = value.clone()
        value.flatten()[-1] += 1e-6
        moved = not is_reference(model)
        value.copy_(before)
        return moved

    assert is_reference(model)
    assert moves_away("lora_B.default.weight")
    assert not moves_away("lora_A.default.weight")  # times B = 0
    assert moves_away("modules_to_save.default.weight")
    model.add_adapter("ref", model.peft_config["default"])
    values = dict(model.named_parameters())
    assert not is_reference(model)  # its A is drawn anew
    for name, value in values.items():
        if ".ref." in name:
            value.data.copy_(values[name.replace(".ref.", ".default.")])
    assert is_reference(model)
    for end in ("lora_A.default.weight", "lora_B.default.weight", "modules_to_save.default.weight"):
        assert moves_away(end)


# --- rows without a token to score -----------------------------------------------------------------

BARE = pair([1], [], [])  # one token: nothing is predicted
NONE = pair([1, 5], [], [6, 2])  # no chosen token


@pytest.mark.parametrize("pairs", [[BARE, BARE], [BARE, PAIRS[0]], [NONE, PAIRS[1]], [NONE, NONE]])
def test_rows_without_a_scored_token_are_as_in_stock_trl(pairs, tiny_model_folder, tmp_path):
    options = dict(pairs=pairs, max_steps=1, loss_type=["sigmoid", "sft"])
    stock = trained(Stock, tiny_model_folder, tmp_path, **options)
    for tokens in ("auto", 1):
        ours = trained(DPOTrainer, tiny_model_folder, tmp_path, engine=EngineSection(tokens=tokens), **options)
        for mine, theirs in zip(ours[:2], stock[:2], strict=True):
            assert mine == pytest.approx(theirs, rel=3e-5, abs=1e-6, nan_ok=True)


# --- quantised bases -------------------------------------------------------------------------------


def test_weights_that_are_repacked_already_are_refused():
    part = torch.nn.Linear(2, 2)
    part.support_avx512bf16_for_cpu = True
    keep_packed_weights_differentiable(torch.nn.Sequential(part))
    assert part.support_avx512bf16_for_cpu is False
    part.weight.quant_state = type("QuantState", (), {"packing_format_for_cpu": True})()
    with pytest.raises(ModelError, match="The 4-bit weights of 0 were repacked for inference"):
        keep_packed_weights_differentiable(torch.nn.Sequential(part))


@pytest.fixture
def quantised(tokenizer, tmp_path):
    """Loads a tiny base as a user of bitsandbytes does."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path / "base"
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def load(**how):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**how)
        )

    return load


class StockMasters(Stock):
    """Stock TRL, but for its rounding of the adapter to bf16 on a 4-bit base."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if "lora_A" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            if "lora_" in name:
                parameter.data = parameter.data.float()


class Masters(DPOTrainer, StockMasters):
    pass


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("how", [NF4, {"load_in_8bit": True}])
def test_a_base_that_the_caller_quantised(how, evaluated, quantised, tiny_model_folder, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1} if evaluated else {}
    if evaluated and "load_in_4bit" in how:  # there stock TRL's own gradients are cut after an evaluation
        ours = [trained(Masters, tiny_model_folder, tmp_path, model=quantised(**how), **more) for more in ({}, options)]
        assert ours[0][:2] == ours[1][:2]
        return
    ours, stock = (
        trained(kind, tiny_model_folder, tmp_path, model=quantised(**how), **options)
        for kind in (Masters, StockMasters)
    )
    assert ours[0] == pytest.approx(stock[0], abs=1e-5)
    assert ours[1] == pytest.approx(stock[1], rel=3e-5)
    if evaluated:
        losses = [[r["eval_loss"] for r in t.state.log_history if "eval_loss" in r] for t in (ours[2], stock[2])]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# --- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "ran_out"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_which_errors_say_that_memory_ran_out(message, ran_out):
    assert out_of_memory(RuntimeError(message)) is ran_out


def test_an_error_of_the_card_itself_says_it_too():
    # of no class that torch's allocator raises: the driver's, and cuBLAS's for its working space
    assert not issubclass(torch.AcceleratorError, torch.OutOfMemoryError)
    assert out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert out_of_memory(torch.AcceleratorError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not out_of_memory(torch.AcceleratorError("CUDA error: device-side assert triggered"))


def test_memory_that_python_lacks_has_run_out():
    assert out_of_memory(MemoryError("std::bad_alloc"))
