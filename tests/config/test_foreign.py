"""Settings of other tools as a recipe: what each becomes, to the letter, and what has no counterpart.

The inputs are ours, written after the tools' own descriptions of their settings.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import pytest
from bounded import ends_well
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.config.foreign import read_foreign
from lora_dpo.config.foreign.command_line import commands, flags
from lora_dpo.config.reading import check_recipe
from lora_dpo.config.trl_common import check_optimizer
from lora_dpo.config.trl_dpo import trainer_config, trainer_settings
from lora_dpo.data.read import read_pairs
from lora_dpo.errors import ConfigError

DIFFERENT_COLUMNS = "they differ, and data.columns is one for all files: give the columns of the files the same names"
TEMPLATE = "the chat template is the base's own; look at a pair with lora-dpo data show DATA --model NAME"
OUTPUT = "the adapter goes to adapters/ by the recipe's name; set output: for another place"
DTYPE = "model.dtype stays auto: bfloat16 on GPUs that have it, float16 on others, float32 on CPUs"
SHARE = "trainer.warmup_steps: 0.1, which below 1 is a share of all steps"
READ = "rows are read and tokenised before training starts, in one process"
WHOLE = "set lora.modules_to_save to them: each is copied whole, beside the base's own"
NO_DROPOUT = "it did nothing there: DPO and KTO switch all dropout off"
ONE_DEVICE = "a run has one base on one device; a script with lora_dpo.DPOTrainer can be sharded"


def batch(text):
    return f"{text} a step, as there on one GPU; on several it was as many times that"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def read():
    def write_and_read(text, name="theirs.yaml"):
        Path(name).write_text(text, encoding="utf-8")
        made = read_foreign(Path(name))
        recipe = check_recipe(made.settings)
        trainer_settings(recipe)  # nothing that a run would refuse
        return made

    return write_and_read


def remarks(made):
    """`{name: text}` of what has changed, of what is left out, and of what does not train the same."""
    parts = (made.changed, [one for one in made.missing if not one.loud], [one for one in made.missing if one.loud])
    found = [{one.name: one.text for one in part} for part in parts]
    assert [len(part) for part in parts] == [len(part) for part in found], "a name is told twice"
    return found


# --- LLaMA-Factory --------------------------------------------------------------------------------

LLAMA_FACTORY = """
model_name_or_path: some/chat-model
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
lora_dropout: 0.1
pref_beta: 0.2
pref_loss: sigmoid
pref_ftx: 0.5
quantization_bit: 4
dataset: mine, theirs
template: chatty
cutoff_len: 1024
max_samples: 500
preprocessing_num_workers: 8
output_dir: saves/x
overwrite_output_dir: true
plot_loss: true
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 100
deepspeed: examples/deepspeed/ds_z3_config.json
"""


def test_llama_factory_dpo_with_an_sft_term(read):
    Path("data").mkdir()
    info = {
        "mine": {"file_name": "mine.json", "ranking": True},
        "theirs": {"hf_hub_url": "owner/pairs", "subset": "en", "ranking": True, "columns": {"prompt": "question"}},
    }
    Path("data/dataset_info.json").write_text(json.dumps(info))
    made = read(LLAMA_FACTORY)
    assert made.tool == "LLaMA-Factory"
    assert made.settings == {
        "model": {"name": "some/chat-model", "quantize": "nf4"},
        "data": {"train": ["data/mine.json", "owner/pairs/en:train[:500]"], "hold_out": 0.1},
        "trainer": {
            "beta": 0.2,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, 0.5],
            "num_train_epochs": 3.0,
            "warmup_steps": 0.1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": 5e-6,
            "lr_scheduler_type": "cosine",
            "max_length": 1024,
            "logging_steps": 10,
            "save_steps": 500,
            "eval_strategy": "steps",
            "eval_steps": 100,
        },
        "lora": {"rank": 8, "alpha": 16, "targets": "all-linear"},
    }
    assert made.origins["lora.alpha"] == "LLaMA-Factory's default: 2 × lora_rank"
    assert made.origins["trainer.max_length"] == "cutoff_len"
    changed, left_out, loud = remarks(made)
    assert changed == {
        "bf16": DTYPE,
        "cutoff_len": "trainer.max_length: only answers are cut, there prompts are, too",
        "dataset: mine": "data.train: data/mine.json, by dataset_info.json",
        "dataset: theirs": "data.train: owner/pairs/en:train[:500], by dataset_info.json",
        "val_size": "data.hold_out: 0.1 of the prompts, with all their pairs; there it was of the rows",
        "pref_ftx": (
            "loss_weights: [1.0, 0.5]; there each answer counts alike, here each token of a batch, so long answers "
            "count for more"
        ),
        "warmup_ratio": SHARE,
        "per_device_train_batch_size × gradient_accumulation_steps": batch("1 × 8: 8 pairs"),
    }
    assert left_out == {
        "lora_dropout: 0.1": NO_DROPOUT,
        "do_train: true": "a run trains, and measures before and after",
        "preprocessing_num_workers: 8": READ,
        "output_dir: saves/x": OUTPUT,
        "overwrite_output_dir: true": "an adapter folder is never overwritten, and holds safetensors",
        "plot_loss: true": "every run writes its curves and a report",
    }
    assert loud == {
        "max_samples: 500": "a file is read whole: cut data/mine.json",
        "columns of dataset_info.json": DIFFERENT_COLUMNS,
        "template: chatty": TEMPLATE,
        "deepspeed: examples/deepspeed/ds_z3_config.json": ONE_DEVICE,
    }


PAIR = {"ask": "Which sea is saltiest?", "yes": "The Dead Sea.", "no": "Rain."}
THEIR_COLUMNS = {
    "llama_factory": "stage: dpo\nmodel_name_or_path: m\ndataset: mine\n",
    "axolotl": "rl: dpo\nbase_model: m\ndatasets:\n  - {path: json, data_files: data/mine.json, type: "
    "{field_prompt: ask, field_chosen: 'yes', field_rejected: 'no'}}\n",
}


@pytest.mark.parametrize("tool", THEIR_COLUMNS)
def test_columns_that_they_name_are_the_columns_that_are_read(read, tool):
    Path("data").mkdir()
    Path("data/mine.json").write_text(json.dumps([PAIR]))
    columns = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    info = {"mine": {"file_name": "mine.json", "ranking": True, "columns": columns}}
    Path("data/dataset_info.json").write_text(json.dumps(info))
    made = read(THEIR_COLUMNS[tool])
    assert made.settings["data"] == {"train": "data/mine.json", "columns": columns}
    [pair], _ = read_pairs("data/mine.json", columns=made.settings["data"]["columns"])
    assert [pair.prompt[-1]["content"], pair.chosen[-1]["content"], pair.rejected[-1]["content"]] == list(PAIR.values())


def test_a_prompt_of_two_columns_is_not_read_from_one(read):
    Path("data").mkdir()
    columns = {"prompt": "ask", "query": "more", "chosen": "yes", "rejected": "no"}
    info = {"mine": {"file_name": "mine.json", "ranking": True, "columns": columns}}
    Path("data/dataset_info.json").write_text(json.dumps(info))
    made = read(THEIR_COLUMNS["llama_factory"])
    assert "columns" not in made.settings["data"]
    assert remarks(made)[2]["dataset: mine (query)"].startswith("columns are found by their own names")


def test_llama_factory_is_silent_about_what_it_has_defaults_for(read):
    made = read("stage: dpo\nmodel_name_or_path: m\ndataset: dpo_en_demo\npref_loss: ipo\nlora_target: q_proj,v_proj\n")
    assert made.settings == {
        "model": {"name": "m", "quantize": "none"},
        "data": {"train": "dpo_en_demo"},
        "trainer": {
            "beta": 0.1,
            "loss_type": ["ipo"],
            "num_train_epochs": 3.0,
            "warmup_steps": 0,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-5,
            "lr_scheduler_type": "linear",
            "max_length": 2048,
        },
        "lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
    }
    assert made.origins["trainer.lr_scheduler_type"] == "LLaMA-Factory's default"
    changed, left_out, loud = remarks(made)
    assert changed == {"per_device_train_batch_size × gradient_accumulation_steps": batch("8 × 1: 8 pairs")}
    assert left_out == {}
    assert loud == {
        "dataset: dpo_en_demo": (
            "it is a name of LLaMA-Factory's, and there is no data/dataset_info.json here: write the file or hub id "
            "into data.train"
        )
    }


def test_llama_factory_kto_full_weights_and_a_second_adapter(read):
    made = read(
        "stage: kto\nmodel_name_or_path: m\ndataset: x\nfinetuning_type: full\nlearning_rate: 1.0e-6\npref_beta: 0.3\n"
        "kto_chosen_weight: 1\nkto_rejected_weight: 0.5\nper_device_train_batch_size: 1\n"
        "gradient_accumulation_steps: 5\nadapter_name_or_path: saves/a\npref_ftx: 0.1\nuse_galore: true\n"
    )
    assert made.settings["method"] == "kto"
    trainer = made.settings["trainer"]
    assert (trainer["beta"], trainer["desirable_weight"], trainer["undesirable_weight"]) == (0.3, 1.0, 0.5)
    assert trainer["learning_rate"] == 5e-5
    assert (trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]) == (2, 3)
    changed, _, loud = remarks(made)
    assert changed == {
        "per_device_train_batch_size × gradient_accumulation_steps": (
            "2 × 3 in place of 1 × 5: KTO here estimates its KL term from the other answers of a batch, so it needs two"
        )
    }
    assert {name: loud[name] for name in loud if not name.startswith("dataset")} == {
        "finetuning_type: full": "all weights were trained there; here it is an adapter, and the base stays",
        "learning_rate: 1e-06": "it was meant for all weights, and an adapter needs more: the default is left as it is",
        "pref_ftx: 0.1": "KTO here has no SFT term",
        "adapter_name_or_path: saves/a": (
            "there training goes on from it and is held to the base; here reference: adapter:saves/a without a section "
            "lora goes on from it and is held to it"
        ),
        "use_galore: true": "AdamW and transformers' other optimizers are there (trainer.optim)",
    }


def test_llama_factory_on_a_command_line_with_a_file_and_changes(read):
    Path("dpo.yaml").write_text("stage: dpo\nmodel_name_or_path: m\ndataset: d\nlearning_rate: 1.0e-5\nlora_rank: 4\n")
    made = read("CUDA_VISIBLE_DEVICES=0 llamafactory-cli train dpo.yaml lora_rank=16 use_dora=true\n", "run.sh")
    assert made.settings["lora"] == {"rank": 16, "alpha": 32, "dora": True, "targets": "all-linear"}
    assert made.settings["trainer"]["learning_rate"] == 1e-5
    made = read(
        "llamafactory-cli train \\\n  --stage dpo \\\n  --model_name_or_path m --dataset d \\\n  --use_rslora True\n",
        "flags.sh",
    )
    assert made.settings["lora"]["rslora"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: ppo\nmodel_name_or_path: m\n", "stage is 'ppo': LLaMA-Factory trains by that, and there is no"),
        ("stage: dpo\npref_loss: simpo\nmodel_name_or_path: m\n", "pref_loss is 'simpo': LLaMA-Factory trains by that"),
        ("stage: dpo\nlora_rank: big\n", "lora_rank is 'big' in the settings: LLaMA-Factory takes a number there."),
        ("stage: dpo\nlora_rank: 8.5\n", "lora_rank is 8.5 in the settings: LLaMA-Factory takes a whole number there."),
        ("stage: dpo\npref_beta: .inf\n", "pref_beta is inf in the settings: LLaMA-Factory takes a number there."),
        ("model: m\npeft_config: {name: lora}\n", "theirs.yaml has the form of LLaMA-Factory's v1, which is not read."),
    ],
)
def test_what_of_llama_factory_has_no_recipe_is_refused(read, text, said):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(said)


def test_conservative_dpo_is_said_to_have_no_counterpart(read):
    _, _, loud = remarks(read("stage: dpo\nmodel_name_or_path: m\ndpo_label_smoothing: 0.1\npref_bco_weight: 0.2\n"))
    assert "loss_type: [robust]" in loud["dpo_label_smoothing: 0.1"]
    assert "no running mean" in loud["pref_bco_weight: 0.2"]


@pytest.mark.parametrize(("written", "wanted"), [("false", False), ("true", True), ("null", None)])
def test_llama_factory_says_whether_a_model_thinks(read, written, wanted):
    made = read(LLAMA_FACTORY + f"enable_thinking: {written}\n")
    assert made.settings["model"].get("template") == (None if wanted is None else {"enable_thinking": wanted})
    changed, left_out, loud = remarks(made)
    assert ("an empty thought was trained on" in changed.get("enable_thinking", "")) == (wanted is True)
    assert not [name for name in (*left_out, *loud) if name.startswith("enable_thinking")]


def test_llama_factory_says_what_is_no_switch(read):
    _, _, loud = remarks(read(LLAMA_FACTORY + "enable_thinking: often\n"))
    assert loud["enable_thinking: often"] == "it is on or off"


# --- Axolotl --------------------------------------------------------------------------------------

AXOLOTL = """
base_model: some/chat-model
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
chat_template: chatml
rl: dpo
rl_beta: 0.05
datasets:
  - path: owner/pairs
    split: train
    type: chatml.intel
  - path: json
    data_files: [mine.jsonl]
    ds_type: json
    type:
      field_prompt: question
      field_chosen: chosen
      prompt_format: "{prompt}"
dataset_prepared_path:
val_set_size: 40
output_dir: ./outputs
sequence_len: 2048
sample_packing: false
adapter: qlora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
attn_implementation: flash_attention_2
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
fsdp_config:
  offload_params: false
"""


def test_axolotl_dpo_with_qlora(read):
    made = read(AXOLOTL)
    assert made.tool == "Axolotl"
    assert made.settings == {
        "model": {"name": "some/chat-model", "quantize": "nf4"},
        "data": {"train": ["owner/pairs", "mine.jsonl"], "hold_out": 40},
        "trainer": {
            "beta": 0.05,
            "loss_type": ["sigmoid"],
            "save_steps": 0.25,
            "eval_strategy": "steps",
            "eval_steps": 0.0625,
            "num_train_epochs": 4,
            "warmup_steps": 0.1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "max_length": 2048,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "weight_decay": 0.0,
            "optim": "adamw_bnb_8bit",
        },
        "lora": {"rank": 32, "alpha": 16, "targets": "all-linear"},
    }
    assert made.origins["trainer.per_device_train_batch_size"] == "micro_batch_size"
    changed, left_out, loud = remarks(made)
    assert changed == {
        "bf16": DTYPE,
        "val_set_size": "data.hold_out: 40 prompts, with all their pairs; there it was of the rows",
        "saves_per_epoch": "trainer.save_steps: 0.25, a share of all steps",
        "evals_per_epoch": "trainer.eval_steps: 0.0625, a share of all steps",
        "sequence_len": "trainer.max_length: a longer pair is cut at its end; there it was left out",
        "warmup_ratio": SHARE,
        "micro_batch_size × gradient_accumulation_steps": batch("2 × 4: 8 pairs"),
    }
    assert left_out == {
        "lora_dropout: 0.05": NO_DROPOUT,
        "model_type: LlamaForCausalLM": "which class loads the base is decided by its own files",
        "output_dir: ./outputs": OUTPUT,
        "attn_implementation: flash_attention_2": "attention and kernels are chosen by the engine",
    }
    assert loud == {
        "chat_template: chatml": TEMPLATE,
        "datasets.type: chatml.intel": (
            "what a row means is found by its columns, and the chat template is the base's own"
        ),
        "datasets' field_ names": DIFFERENT_COLUMNS,
        "lora_modules_to_save: ['embed_tokens']": WHOLE,
        "fsdp_config: {'offload_params': False}": ONE_DEVICE,
    }


def test_axolotl_has_keywords_for_the_template(read):
    made = read(AXOLOTL + "chat_template_kwargs: {enable_thinking: false, reasoning_effort: low}\n")
    assert made.settings["model"]["template"] == {"enable_thinking": False, "reasoning_effort": "low"}
    assert not [name for name in remarks(made)[2] if name.startswith("chat_template_kwargs")]


@pytest.mark.parametrize(
    ("given", "said"),
    [("{messages: x}", "it is set by the conversation"), ("often", "are names with values"), ("{}", None)],
)
def test_axolotls_keywords_that_are_none_are_said(read, given, said):
    made = read(AXOLOTL + f"chat_template_kwargs: {given}\n")
    assert "template" not in made.settings["model"]
    found = [why for name, why in remarks(made)[2].items() if name.startswith("chat_template_kwargs")]
    assert [said in why for why in found] == ([] if said is None else [True])


@pytest.mark.parametrize(("key", "known"), [("thinking", True), ("cot", False)])
def test_axolotls_key_of_thoughts_is_one_that_is_read(read, key, known):
    made = read(AXOLOTL.replace("  - path: owner/pairs\n", f"  - path: owner/pairs\n    field_thinking: {key}\n"))
    assert ("datasets.field_thinking: cot" in remarks(made)[2]) != known


def test_axolotl_kto_without_an_adapter_and_ipo(read):
    made = read(
        "base_model: m\nrl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\nload_in_8bit: true\nlearning_rate: 1e-6\n"
        "datasets: [{path: owner/votes, name: en, split: test}]\nmicro_batch_size: 2\nmax_steps: 50\n"
        "excess_length_strategy: truncate\n"
    )
    assert made.settings == {
        "model": {"name": "m", "quantize": "nf4"},
        "method": "kto",
        "data": {"train": "owner/votes/en:test"},
        "trainer": {
            "learning_rate": 5e-5,
            "beta": 0.5,
            "max_steps": 50,
            "warmup_steps": 0.03,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "cosine",
            "max_length": 512,
            "desirable_weight": 0.2,
        },
    }
    changed, left_out, loud = remarks(made)
    assert changed == {"micro_batch_size × gradient_accumulation_steps": batch("2 × 1: 2 answers")}
    assert left_out == {}
    assert loud == {
        "load_in_8bit": "there are 4 bits (nf4), or the weights as stored with quantize: none; 4 were taken",
        "adapter: none": "all weights were trained there; here it is an adapter, and the base stays",
        "learning_rate: 1e-06": "it was meant for all weights, and an adapter needs more: the default is left as it is",
    }
    ipo = read(
        "base_model: m\nrl: ipo\nadapter: lora\ntrl: {beta: 0.4}\ndatasets: [{path: a.jsonl}]\nlearning_rate: 1e-5\n"
    )
    assert (ipo.settings["trainer"]["loss_type"], ipo.settings["trainer"]["beta"]) == (["ipo"], 0.4)
    old = read("base_model: m\nrl: dpo\nadapter: lora\ndpo_beta: 0.4\nrpo_alpha: 2\ndatasets: [{path: a.jsonl}]\n")
    assert old.settings["trainer"]["loss_weights"] == [1.0, 2.0]
    assert old.settings["trainer"]["loss_type"] == ["sigmoid", "sft"]
    assert old.settings["trainer"]["beta"] == 0.4


@pytest.mark.parametrize("method", ["orpo", "simpo", "grpo"])
def test_what_of_axolotl_needs_no_reference_is_refused(read, method):
    with pytest.raises(ConfigError, match=f"rl is '{method}': Axolotl trains by that, and there is no"):
        read(f"base_model: m\nrl: {method}\n")


def test_axolotl_on_a_command_line(read):
    Path("dpo.yml").write_text("base_model: m\nrl: dpo\nadapter: lora\nlora_r: 8\ndatasets: [{path: a.jsonl}]\n")
    made = read("axolotl train dpo.yml --learning-rate 1e-5 --lora-r=16\n", "run.txt")
    assert (made.settings["trainer"]["learning_rate"], made.settings["lora"]["rank"]) == (1e-5, 16)


# --- Unsloth --------------------------------------------------------------------------------------

SCRIPT = """
from unsloth import FastLanguageModel, is_bfloat16_supported
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
LENGTH = 1024
model, tokenizer = FastLanguageModel.from_pretrained("owner/chat", max_seq_length = LENGTH, load_in_4bit = True)
rows = load_dataset("json", data_files = "pairs.jsonl", split = "train")
model = FastLanguageModel.get_peft_model(
    model, r = 64, target_modules = ["q_proj", "v_proj"], lora_alpha = 32, lora_dropout = 0, bias = "none",
    use_gradient_checkpointing = "unsloth", random_state = 7, modules_to_save = ["lm_head"],
)
trainer = DPOTrainer(
    model = model,
    ref_model = None,
    args = DPOConfig(
        per_device_train_batch_size = 2, num_train_epochs = 1, learning_rate = 5e-6, warmup_ratio = 0.1,
        fp16 = not is_bfloat16_supported(), bf16 = is_bfloat16_supported(), output_dir = "out", seed = 42,
        save_steps = len(rows) // 4,
    ),
    beta = 0.3,
    train_dataset = rows,
    max_prompt_length = 512,
)
trainer.train()
"""
FROM_SCRIPT = {
    "model": {"name": "owner/chat", "quantize": "nf4"},
    "data": {"train": "pairs.jsonl"},
    "trainer": {
        "loss_type": ["sigmoid"],
        "beta": 0.3,
        "num_train_epochs": 1,
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "linear",
        "max_length": 1024,
        "weight_decay": 0.001,
        "optim": "adamw_8bit",
        "seed": 42,
    },
    "lora": {"rank": 64, "alpha": 32, "targets": ["q_proj", "v_proj"]},
}


def test_an_unsloth_script_is_read_and_not_run(read):
    made = read(SCRIPT, "train.py")
    assert made.tool == "Unsloth"
    assert made.settings == FROM_SCRIPT
    assert made.origins["trainer.gradient_accumulation_steps"] == "Unsloth's default"
    changed, left_out, loud = remarks(made)
    assert changed == {
        "max_seq_length": "trainer.max_length: only answers are cut",
        "warmup_ratio": SHARE,
        "per_device_train_batch_size × gradient_accumulation_steps": batch("2 × 2: 4 pairs"),
    }
    assert left_out == {
        "max_prompt_length: 512": "prompts are never cut: a pair that is too long is cut at its end",
        "output_dir: out": OUTPUT,
    }
    assert loud == {
        "modules_to_save: ['lm_head']": WHOLE,
        "save_steps": "the script computes it (len(rows) // 4): set it by hand",
    }


def test_a_notebook_is_its_code_without_commands_to_the_shell(read):
    cells = [
        {"cell_type": "markdown", "source": ["# DPOTrainer(beta = 9)"]},
        {"cell_type": "code", "source": ["%%capture\n", "if True:\n", "    !pip install unsloth\n"]},
        *({"cell_type": "code", "source": part.splitlines(keepends=True)} for part in SCRIPT.split("rows = ")[:1]),
        {"cell_type": "code", "source": ["rows = " + SCRIPT.split("rows = ")[1]]},
    ]
    assert read(json.dumps({"cells": cells}), "train.ipynb").settings == FROM_SCRIPT


def test_unsloth_s_own_yaml_trains_by_sft(read):
    made = read(
        "model: unsloth/chat-bnb-4bit\n"
        "data: {local_dataset: [a.jsonl, b.jsonl], format_type: chatml}\n"
        "training: {training_type: lora, max_seq_length: 1024, load_in_4bit: true, num_epochs: 2, max_steps: 0,"
        " save_steps: 0, random_seed: 1, gradient_checkpointing: none}\n"
        "lora: {lora_r: 32, lora_dropout: 0.1, use_rslora: true, use_loftq: true}\n"
        "logging: {enable_wandb: false, wandb_project: x}\n"
    )
    assert made.settings == {
        "model": {"name": "unsloth/chat-bnb-4bit", "quantize": "none"},
        "method": "sft",
        "data": {"train": ["a.jsonl", "b.jsonl"]},
        "trainer": {
            "gradient_checkpointing": False,
            "num_train_epochs": 2,
            "warmup_steps": 5,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "linear",
            "max_length": 1024,
            "weight_decay": 0.01,
            "seed": 1,
        },
        "lora": {
            "rank": 32,
            "alpha": 16,
            "rslora": True,
            "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "dropout": 0.1,
        },
    }
    changed, left_out, loud = remarks(made)
    assert changed == {
        "load_in_4bit": "unsloth/chat-bnb-4bit is stored in 4 bits: as stored, with quantize: none",
        "max_seq_length": "trainer.max_length: only answers are cut",
        "per_device_train_batch_size × gradient_accumulation_steps": batch("2 × 4: 8 answers"),
    }
    assert left_out == {
        "format_type: chatml": "what a row means is found by its columns",
        "wandb_project: x": "set trainer.report_to and the tracker's own variables",
    }
    assert loud == {
        "use_loftq: true": "the adapter starts at B = 0: any other start changes the base that it is held to"
    }


@pytest.mark.parametrize(
    "command",
    [
        "unsloth train --model m --dataset owner/rows --lora-r 8 --no-load-in-4bit --training-type lora",
        "python unsloth-cli.py --model_name m --dataset owner/rows --r 8 --max_steps 100",
    ],
)
def test_unsloth_s_command_lines(read, command):
    made = read(command, "run.sh")
    assert made.settings["model"] == {"name": "m", "quantize": "none"}
    assert made.settings["data"] == {"train": "owner/rows"}
    assert (made.settings["method"], made.settings["lora"]["rank"]) == ("sft", 8)


# --- TRL ------------------------------------------------------------------------------------------

COMMAND = """#!/bin/bash
export MODEL="owner/chat"   # the base
trl dpo --model_name_or_path $MODEL \\
    --dataset_name owner/pairs --dataset_train_split train_prefs --dataset_test_split test_prefs \\
    --learning_rate 5.0e-6 --per_device_train_batch_size 2 --max_steps 1000 --gradient_accumulation_steps 8 \\
    --eval_strategy steps --eval_steps 50 --no_remove_unused_columns --output_dir out \\
    --use_peft --lora-r 32 --lora_alpha 16 --lora_dropout 0.05 --load_in_4bit \\
    --beta 0.1 --loss_type sigmoid sft --loss_weights 1 0.5 --bf16 --attn_implementation=flash_attention_2
"""


def test_a_command_line_of_trl(read):
    made = read(COMMAND, "run.sh")
    assert made.tool == "TRL"
    assert made.settings == {
        "model": {"name": "owner/chat", "quantize": "nf4"},
        "data": {"train": "owner/pairs:train_prefs", "eval": "owner/pairs:test_prefs"},
        "trainer": {
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1, 0.5],
            "beta": 0.1,
            "max_steps": 1000,
            "warmup_steps": 0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8,
            "learning_rate": 5e-6,
            "lr_scheduler_type": "linear",
            "max_length": 1024,
            "eval_strategy": "steps",
            "eval_steps": 50,
        },
        "lora": {"rank": 32, "alpha": 16, "targets": ["q_proj", "v_proj"]},
    }
    changed, left_out, loud = remarks(made)
    assert changed == {
        "load_in_4bit": "with double quantisation, as use_bnb_nested_quant: the scales are in 8 bits, too",
        "lora_target_modules": "it is not set: these are what peft takes in Llama, Mistral, Qwen and Gemma",
        "per_device_train_batch_size × gradient_accumulation_steps": batch("2 × 8: 16 pairs"),
    }
    assert left_out == {
        "lora_dropout: 0.05": NO_DROPOUT,
        "bf16: true": "model.dtype says what is computed in",
        "attn_implementation: flash_attention_2": "attention and kernels are chosen by the engine",
        "output_dir: out": OUTPUT,
    }
    assert loud == {}


def test_trl_s_yaml_for_all_weights_with_a_mistyped_and_an_unusable_setting(read):
    made = read(
        "model_name_or_path: m\ndataset_name: owner/pairs\nlearning_rate: 5.0e-7\nloss_type: robust\n"
        "label_smoothing: 0.1\nbetta: 0.2\neval_strategy: 'no'\nld_alpha: 7\npush_to_hub: true\n"
        "bf16_full_eval: true\nsave_strategy: best\n"
    )
    assert made.settings == {
        "model": {"name": "m", "quantize": "none"},
        "data": {"train": "owner/pairs"},
        "trainer": {
            "learning_rate": 5e-5,
            "loss_type": ["robust"],
            "num_train_epochs": 3.0,
            "warmup_steps": 0,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "lr_scheduler_type": "linear",
            "max_length": 1024,
            "label_smoothing": 0.1,
            "eval_strategy": "no",
        },
        "lora": {"rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj"]},
    }
    _, left_out, loud = remarks(made)
    assert left_out == {
        "push_to_hub: true": "a run uploads nothing: lora-dpo adapters push",
        "bf16_full_eval: true": "set model.dtype instead",
    }
    assert loud.pop("save_strategy: best").startswith("trainer.save_strategy is 'best', which needs an evaluation")
    assert loud == {
        "use_peft: false": "all weights were trained there; here it is an adapter, and the base stays",
        "learning_rate: 5e-07": "it was meant for all weights, and an adapter needs more: the default is left as it is",
        "ld_alpha: 7": "trainer.ld_alpha is 7: allowed is a number from 0 to 1",
        "betta: 0.2": "it is not known here as a setting of TRL, and nothing was taken from it",
    }


def test_a_command_that_names_its_yaml_and_one_that_launches_the_script(read):
    Path("deep").mkdir()
    Path("deep/dpo.yaml").write_text("model_name_or_path: m\ndataset_name: owner/pairs\nbeta: 0.2\nuse_peft: true\n")
    made = read("trl kto --config dpo.yaml --beta 0.5\n", "deep/run.sh")
    assert (made.settings["method"], made.settings["trainer"]["beta"]) == ("kto", 0.5)
    made = read(
        "accelerate launch --num_processes 2 trl/scripts/dpo.py --model_name_or_path m --dataset_name a/b --use_peft\n",
        "launch.sh",
    )
    assert made.settings["data"] == {"train": "a/b"}


def test_trl_s_kto_and_sft_yaml_are_told_by_their_own_fields(read):
    common = "model_name_or_path: m\ndataset_name: a/b\nuse_peft: true\n"
    kto = read(common + "desirable_weight: 1.5\n")
    assert (kto.settings["method"], kto.settings["trainer"]["desirable_weight"]) == ("kto", 1.5)
    sft = read(common + "packing: true\nlora_dropout: 0.1\n")
    assert (sft.settings["method"], sft.settings["lora"]["dropout"]) == ("sft", 0.1)
    mixed = read(
        "model_name_or_path: m\nuse_peft: true\ntest_split_size: 0.1\n"
        "datasets: [{path: a/b, split: x, fraction: 0.7}, {path: csv, data_files: c.csv}]\n"
    )
    assert mixed.settings["data"] == {"train": ["a/b:x", "c.csv"], "hold_out": 0.1}
    assert "datasets.fraction: 0.7" in remarks(mixed)[2]


def test_a_script_of_trl(read):
    made = read(
        "from trl import DPOTrainer, DPOConfig\nfrom peft import LoraConfig\n"
        'model = AutoModelForCausalLM.from_pretrained("owner/chat", torch_dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("other/tokenizer")\n'
        'rows = load_dataset("owner/pairs", split="train")\n'
        'lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")\n'
        'DPOTrainer(model, args=DPOConfig("out", beta=0.2, max_length=512, disable_dropout=False), peft_config=lora)\n',
        "train.py",
    )
    assert made.settings["model"] == {"name": "owner/chat", "quantize": "none"}
    assert made.settings["lora"] == {"rank": 8, "alpha": 8, "targets": "all-linear"}
    assert (made.settings["trainer"]["beta"], made.settings["trainer"]["max_length"]) == (0.2, 512)
    assert made.settings["data"] == {"train": "owner/pairs"}


# --- files that are nobody's, or broken -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "learning: 3\n", "a.yaml is not known as settings of LLaMA-Factory (stage, finetuning_type), "),
        ("a.yaml", "model: {name: m}\ndata: {train: x}\n", "a.yaml is a recipe of lora-dpo already: lora-dpo train"),
        ("a.yaml", "a: [\n", "a.yaml, line 2: not valid YAML"),
        ("a.json", "{", "a.json: not valid JSON"),
        ("a.json", "[1]", "a.json holds no settings: expected one JSON object."),
        ("a.sh", "echo hello\n", "a.sh holds no command that is known: trl dpo, llamafactory-cli train, axolotl train"),
        ("a.sh", "trl grpo --model m\n", "a.sh holds no command that is known"),
        ("a.sh", "trl dpo --x 'y\n", "a.sh, command 1: No closing quotation"),
        ("a.sh", "trl dpo --config gone.yaml\n", "a.sh names the settings gone.yaml, which are not here."),
        ("a.py", "def (", "a.py is not read as Python"),
        ("a.py", "print(1)\n", "a.py makes no DPOTrainer, KTOTrainer or SFTTrainer"),
        ("a.py", "GRPOTrainer(model)\n", "a.py trains by GRPOTrainer, and there is no counterpart here."),
        ("a.ipynb", "{}", "a.ipynb is not read as a notebook."),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_translated_is_told(read, name, text, said):
    with pytest.raises(ConfigError) as caught:
        read(text, name)
    assert str(caught.value).startswith(said)


def test_a_missing_file_is_told():
    with pytest.raises(ConfigError, match=r"There is no file none\.yaml\. Name the settings of"):
        read_foreign(Path("none.yaml"))


def test_settings_without_base_or_data_have_a_place_to_write_them_into(read):
    made = read("stage: dpo\n")
    assert made.settings["model"]["name"] == "WRITE-THE-BASE-HERE"
    assert made.settings["data"]["train"] == "WRITE-THE-PAIRS-HERE.jsonl"
    assert {"the base", "the data"} <= remarks(made)[2].keys()


def test_words_of_a_command_line():
    text = "A=1\nB='two words'\n# a comment\nrun --x $A --y ${B} --zig-zag \\\n  --list a 'b c' --no_way --n=-3 $C\n"
    [words] = commands(text, where="x")
    assert flags(words, where="x") == (
        {"x": 1, "y": "two words", "zig_zag": True, "list": ["a", "b c"], "way": False, "n": [-3, "$C"]},
        ["run"],
    )


def test_every_input_here_gives_the_same_recipe_when_it_is_read_again(read):
    for text in (LLAMA_FACTORY, AXOLOTL):
        first, second = read(text), read(text)
        assert first.settings == second.settings
        assert list(map(astuple, first.missing)) == list(map(astuple, second.missing))


@pytest.mark.parametrize(
    ("text", "name"), [(LLAMA_FACTORY, "a.yaml"), (AXOLOTL, "a.yaml"), (SCRIPT, "a.py"), (COMMAND, "a.sh")]
)
def test_trl_and_the_optimizer_take_what_was_made(read, text, name, tmp_path):
    recipe = check_recipe(read(text, name).settings)
    config = trainer_config(trainer_settings(recipe), output_dir=tmp_path / "out", dtype="float32")
    check_optimizer(config)
    assert config.per_device_train_batch_size in (1, 2)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_the_settings_ends_in_a_recipe_or_a_sentence(data, tmp_path_factory):
    import yaml

    theirs = yaml.safe_load(data.draw(st.sampled_from([LLAMA_FACTORY, AXOLOTL])))
    for name in data.draw(st.lists(st.sampled_from(sorted(theirs)), min_size=1, max_size=4)):
        theirs[name] = data.draw(VALUES)
    path = tmp_path_factory.mktemp("fuzz") / "theirs.json"
    path.write_text(json.dumps(theirs))
    with ends_well():
        trainer_settings(check_recipe(read_foreign(path).settings))
