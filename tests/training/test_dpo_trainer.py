import copy
import math

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from lora_dpo import DPOTrainer
from lora_dpo.errors import ReferenceMismatch
from lora_dpo.model.lora import is_idle

ROWS = [
    {"prompt_ids": [257, 5, 6, 7], "chosen_ids": [8, 9, 258], "rejected_ids": [10, 258]},
    {"prompt_ids": [257, 65], "chosen_ids": [66, 67, 68, 69, 258], "rejected_ids": [72, 73]},
    {"prompt_ids": [257, 65, 66], "chosen_ids": [67, 258], "rejected_ids": [72, 73, 74, 75, 258]},
    {"prompt_ids": [257, 90], "chosen_ids": [91, 92, 258], "rejected_ids": [93]},
]
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")


def config(tmp_path, **settings):
    defaults = dict(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    return DPOConfig(**{**defaults, **settings})


def build(kind, folder, tmp_path, model=None, rows=ROWS, peft_config=LORA, ref_model=None, **settings):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return kind(
        model or AutoModelForCausalLM.from_pretrained(folder),
        ref_model,
        config(tmp_path, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def trained_adapter(folder, tmp_path):
    trainer = build(DPOTrainer, folder, tmp_path, learning_rate=5e-2)
    trainer.train()
    trainer.model.save_pretrained(str(tmp_path / "sft"))
    return tmp_path / "sft"


def test_loss_at_step_zero_is_ln_2(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_same_losses_and_metrics_as_stock_trl(tiny_model_folder, tmp_path):
    class StockOnTokens(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    logs = []
    for kind in (DPOTrainer, StockOnTokens):
        trainer = build(kind, tiny_model_folder, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
        trainer.train()
        if kind is DPOTrainer:
            # held against TRL's own pass 1, guard 2, probe 1, references of the other pairs 1, steps 3
            assert trainer.engine.forward.streams == 8
        logs.append(
            [
                {k: v for k, v in row.items() if not any(own in k for own in ("time", "second", "first_sight"))}
                for row in trainer.state.log_history[:-1]
            ]
        )
    for ours, stock in zip(*logs, strict=True):
        assert ours == pytest.approx(stock, rel=1e-5, abs=1e-6)


def test_text_rows_are_prepared_as_trl_prepares_them(tiny_model_folder, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "yes"}],
             "rejected": [{"role": "assistant", "content": "no"}]}] * 4  # fmt: skip
    ours, stock = (build(kind, tiny_model_folder, tmp_path, rows=rows) for kind in (DPOTrainer, trl.DPOTrainer))
    assert ours.train_dataset[0] == stock.train_dataset[0]


def test_the_guard_stops_a_trained_policy_against_the_bare_base(tiny_model_folder, tmp_path):
    adapter = trained_adapter(tiny_model_folder, tmp_path)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), str(adapter), is_trainable=True
    )
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, model=model, peft_config=None)
    trainer.model.delete_adapter("ref")  # what is left is the silent bug: reference = base
    with pytest.raises(ReferenceMismatch, match="already trained, but the reference is the bare base"):
        trainer.train()
    trainer.reference_guard = False
    trainer.train()


def test_the_guard_stops_a_foreign_ref_model(tiny_model_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.add_(0.3)
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, ref_model=other)
    with pytest.raises(ReferenceMismatch, match="ref_model is another model"):
        trainer.train()


def test_the_guard_stops_stale_precomputed_references(tiny_model_folder, tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, rows=rows)
    trainer.precompute_ref_logps = True
    with pytest.raises(ReferenceMismatch, match="ref_chosen_logps"):
        trainer.train()


@pytest.mark.parametrize("settings", [{}, {"ld_alpha": 0.5}, {"precompute_ref_log_probs": True}])
def test_the_guard_lets_an_honest_start_pass(tiny_model_folder, tmp_path, settings):
    assert build(DPOTrainer, tiny_model_folder, tmp_path, **settings).check_reference(pairs=4) < 1e-5


def test_continuing_from_an_adapter_its_frozen_copy_is_the_reference(tiny_model_folder, tmp_path):
    adapter = trained_adapter(tiny_model_folder, tmp_path)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), str(adapter), is_trainable=True
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, model=model, peft_config=None, learning_rate=1e-1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    after = dict(trainer.model.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name.replace(".default.", ".ref.")], value)
    assert any(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("adapter", "kept"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"]), False),
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights="gaussian"), False),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), False),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), False),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), True),  # B is drawn, too
        (LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False), True),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), True),  # nothing is known of it here
    ],
)
def test_of_an_adapter_that_changes_nothing_yet_no_frozen_copy_is_kept(adapter, kept, tiny_model_folder, tmp_path):
    adapter = copy.deepcopy(adapter)
    adapter.task_type = "CAUSAL_LM"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), adapter)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, model=model, peft_config=None, max_steps=1)
    assert ("ref" in trainer.model.peft_config) == kept
    assert any(".ref" in name for name, _ in trainer.model.named_parameters()) == kept
    assert [name for name, p in trainer.model.named_parameters() if p.requires_grad] == trainable
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_what_only_sounds_like_lora_is_not_taken_for_idle(tiny_model_folder):
    adapter = VBLoRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], vector_length=8, num_vectors=16)
    assert not is_idle(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), adapter))


def test_adapter_weights_stay_exact_float32_on_a_4bit_base(tiny_model_folder, tmp_path):
    from lora_dpo.config.recipe import LoraSection
    from lora_dpo.model.base import load_base
    from lora_dpo.model.lora import attach_lora

    base = load_base(str(tiny_model_folder), quantize="nf4", packed=True)
    model = attach_lora(base.model, LoraSection(rank=4), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    trainer = build(
        DPOTrainer, tiny_model_folder, tmp_path, model=model, peft_config=None, max_steps=2, learning_rate=1e-8
    )
    now = dict(trainer.model.named_parameters())
    assert all(now[name].dtype == torch.float32 and torch.equal(now[name], value) for name, value in before.items())
    trainer.train()
    moved = [not torch.equal(now[name], value) for name, value in before.items()]
    assert any(moved) or any(p.abs().max() > 0 for name, p in now.items() if "lora_B.default" in name)


def test_tiny_updates_reach_the_masters(tiny_model_folder, tmp_path):
    # At 1e-6 an Adam step moves a weight of 0.1 by 1e-5 of itself: bf16 (3e-3) would round it away.
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, learning_rate=1e-6, max_steps=2)
    trainer.reference_guard = False
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_bf16_autocast_is_off_without_a_gpu(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path, bf16=True)
    assert not trainer.args.bf16
    assert trainer.accelerator.mixed_precision == "no"


@pytest.mark.parametrize("kind", ["GraniteMoe", "Phimoe"])
def test_a_mixture_that_calls_its_experts_otherwise_trains_with_the_router_loss(tiny_model_folder, tmp_path, kind):
    sizes = dict(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    found = {}
    for name, kind_of_trainer in (("ours", DPOTrainer), ("stock", trl.DPOTrainer)):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
        if name == "stock":
            model.config.num_experts = 4  # what TRL looks for
        rows = [{"prompt": "Hi", "chosen": " yes, well", "rejected": " no"}] * 4
        trainer = build(kind_of_trainer, tiny_model_folder, tmp_path / name, model=model, rows=rows, max_steps=1)
        trainer.train()
        found[name] = trainer.state.log_history[0]
    assert found["ours"]["aux_loss"] > 0.5
    for key in ("loss", "aux_loss"):
        assert found["ours"][key] == pytest.approx(found["stock"][key], rel=1e-5)


def test_references_of_no_rows_are_none(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny_model_folder, tmp_path)
    assert trainer.score_references(Dataset.from_list([])) == []
