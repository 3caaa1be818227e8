import json

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from trl import DPOConfig

from lora_dpo import DPOTrainer, plan
from lora_dpo.cli.commands import main
from lora_dpo.cli.plan import bar
from lora_dpo.config.reading import check_recipe, read_recipe
from lora_dpo.engine import PairForward, lay_out
from lora_dpo.engine.cost_model import PairShape, footprint, pair_shape
from lora_dpo.engine.layout import stream_length
from lora_dpo.errors import ConfigError
from lora_dpo.model.base import load_base, load_skeleton
from lora_dpo.model.held_size import NF4_BYTES
from lora_dpo.model.lora import attach_lora, base_of
from lora_dpo.training.planning.lines import verdict
from lora_dpo.training.planning.make_plan import bins, count, parse_size

SIZES = dict(
    vocab_size=300, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = {
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gemma2": transformers.Gemma2Config,
    "olmo2": transformers.Olmo2Config,
    "phi3": transformers.Phi3Config,
}
LENGTHS = [(61, 23, 46), (40, 90, 5), (3, 30, 120)]


def tiny(kind, dtype=torch.float32, targets="all-linear", layers=None):
    torch.manual_seed(0)
    extra = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]} if kind == "gemma3_text" else {}
    base = transformers.AutoModelForCausalLM.from_config(KINDS[kind](**SIZES, **extra)).to(dtype).eval()
    base.requires_grad_(False)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets, layers_to_transform=layers)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def token_ids(prompt, chosen, rejected):
    ids = torch.arange(prompt + chosen + rejected).remainder(290).add(3).tolist()
    return ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]


def batch_of(prompt, chosen, rejected):
    rows = [prompt + chosen, prompt + rejected]
    width = max(map(len, rows))
    labels = [[-100] * len(prompt) + answer for answer in (chosen, rejected)]
    return dict(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        labels=torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        use_cache=False,
        fused_lm_head=True,
    )


# --- one pair -------------------------------------------------------------------------------------


def test_the_worked_example_of_a_pair():
    # the stream of `shared_prefix.layout`: prefix a b | c d | c, labels d e and f
    shape = pair_shape([1, 2, 3], [4, 5], [6])
    assert (shape.first, shape.second, shape.shared) == (5, 4, 3)
    assert shape.spans == (2, 2, 1)
    assert (shape.stream, shape.labels) == (5, 3)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [([1, 2, 3], [4, 5], [6]), ([1, 20], [21, 22, 23, 2], [21, 22, 30]), ([1, 9], [10, 11], [10, 11, 12, 2])],
)
@pytest.mark.parametrize("length", [3, 4, 5, 100])
def test_shapes_are_those_of_the_layout(prompt, chosen, rejected, length):
    short = [answer[: length - len(prompt)] for answer in (chosen, rejected)]
    cut = pair_shape(prompt, chosen, rejected).cut(length)
    if short[0] == short[1]:
        assert cut is None  # tokenising drops it
        return
    if not all(short):
        return
    assert cut == pair_shape(prompt, *short)
    masks = [[False] * len(prompt) + [True] * len(answer) for answer in short]
    layout = lay_out([prompt + answer for answer in short], masks, width=100)
    assert cut.stream == len(layout.ids_S) == stream_length(prompt + short[0], prompt + short[1])
    assert cut.labels == len(layout.label_L)


# --- bytes and FLOPs against what really happens --------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_bytes_are_those_that_a_pass_keeps(kind, dtype):
    model = tiny(kind, dtype)
    costs = footprint(model, itemsize=dtype.itemsize, packed=False)
    forward = PairForward(base_of(model))
    forward.logged = False
    for lengths in LENGTHS:
        ids = token_ids(*lengths)
        with forward.count_kept() as kept, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = base_of(model)(**batch_of(*ids))
        # in bfloat16 the count itself is loose: it takes in sources that nothing keeps
        close = 0.05 if dtype == torch.float32 else 0.1
        assert costs.kept_bytes(pair_shape(*ids)) == pytest.approx(sum(kept.values()), rel=close), lengths
        del output


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "o_proj", "down_proj"]], ids=str)
def test_bytes_follow_what_is_adapted(targets):
    model = tiny("llama", targets=targets)
    forward = PairForward(base_of(model))
    ids = token_ids(*LENGTHS[0])
    with forward.count_kept() as kept:
        base_of(model)(**batch_of(*ids))
    costs = footprint(model, itemsize=4, packed=False)
    assert costs.kept_bytes(pair_shape(*ids)) == pytest.approx(sum(kept.values()), rel=0.15)


def test_layers_below_the_lowest_adapter_keep_nothing():
    whole, top = (
        footprint(tiny("llama", targets=["q_proj", "up_proj"], layers=layers), itemsize=4, packed=False)
        for layers in (None, [2])
    )
    shape = PairShape(61, 84, 107, 61)
    assert (whole.depth, top.depth) == (0, 2)
    assert top.kept_bytes(shape) < 0.4 * whole.kept_bytes(shape)


def test_checkpointed_layers_keep_their_input():
    costs = footprint(tiny("llama"), itemsize=4, packed=False)
    shape = PairShape(61, 84, 107, 61)
    layer = costs.layer_bytes(costs.layers[0], shape)
    saved = costs.kept_bytes(shape) - costs.kept_bytes(shape, checkpointed=3)
    assert saved == 2 * layer - 3 * 128 * 4 * shape.stream  # one of the three is run again at a time


def test_predicted_flops_are_those_that_are_counted():
    model = tiny("llama")
    bound = PairForward(base_of(model))
    bound.logged = False
    ids = token_ids(*LENGTHS[0])
    shape = pair_shape(*ids)
    costs = footprint(model, itemsize=4, packed=False)
    attention = sum(costs.attention_flops(layer, shape) for layer in costs.layers)
    with FlopCounterMode(display=False) as counter:
        loss = -base_of(model)(**batch_of(*ids)).log_probs.sum()
        loss.backward()
    counted = {str(name): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    kernels = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in kernels.items() if "attention" not in op)
    # The lowest layer's input needs no gradient: the count is a little below the formula.
    assert costs.policy_flops(shape) - 2.5 * attention == pytest.approx(products, rel=0.1), counted


def test_held_bytes_of_a_packed_model():
    model = tiny("llama")
    base = base_of(model)
    linear = sum(layer.weights for layer in footprint(model, itemsize=2, packed=True).layers)
    rest = sum(p.numel() for p in base.parameters() if not p.requires_grad) - linear
    assert footprint(model, itemsize=2, packed=True).weight_bytes == pytest.approx(linear * NF4_BYTES + rest * 2, abs=1)
    assert footprint(model, itemsize=2, packed=False).weight_bytes == (linear + rest) * 2


def test_a_skeleton_costs_what_the_model_costs(tiny_model_folder):
    recipe = check_recipe({"model": {"name": str(tiny_model_folder)}, "data": {"train": "none"}})
    skeleton = attach_lora(load_skeleton(str(tiny_model_folder)), recipe.lora, seed=0)
    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
    assert footprint(skeleton, itemsize=4, packed=False) == footprint(
        attach_lora(base.model, recipe.lora, seed=0), itemsize=4, packed=False
    )


# --- a plan ---------------------------------------------------------------------------------------


def test_a_plan_reads_what_training_reads_and_writes_nothing(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = check_recipe(recipe_dict())
    before = sorted(tmp_path.rglob("*"))
    planned = plan(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    assert (planned.data["train"].pairs, planned.data["train"].dropped) == (12, {})
    assert (planned.steps.steps, planned.steps.pairs, planned.steps.parts) == (2, 2, 1)
    assert planned.memory.fits
    assert planned.time.seconds > 0
    assert planned.tokens.stream < planned.tokens.unpadded <= planned.tokens.padded
    assert all(sum(counts) == 12 for counts in planned.tokens.histogram.values())


def test_predicted_tokens_are_those_that_the_engine_computes(recipe_dict, tokenizer, tmp_path):
    from lora_dpo.data import read_pairs, tokenize_pairs

    recipe = check_recipe(recipe_dict(trainer={"max_steps": -1, "num_train_epochs": 2}))
    pairs, _ = tokenize_pairs(tokenizer, read_pairs(recipe.data.train)[0], max_length=1024)
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    model = attach_lora(load_base(recipe.model.name, quantize="none", dtype="float32").model, recipe.lora, seed=0)
    args = DPOConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.reference_guard = False
    probes = []
    engine = trainer.engine

    def counted(measure):
        def probe(inputs):
            before = engine.forward.tokens
            value = measure(inputs)
            probes.append(engine.forward.tokens - before)
            return value

        return probe

    engine.kept_bytes, engine.difference = counted(engine.kept_bytes), counted(engine.difference)
    trainer.train()
    planned = plan(recipe)
    policy = planned.tokens.stream
    reference = policy // 2  # two epochs, and the reference once a pair
    assert engine.forward.tokens - sum(probes) == policy + reference
    shapes = [pair_shape(p.prompt, p.chosen, p.rejected) for p in pairs]
    costs = footprint(trainer.model, itemsize=4, packed=False)
    rates = [costs.kept_bytes(shape) / shape.stream for shape in shapes]
    assert min(rates) * 0.9 < engine.whole_step.budget.token_bytes < max(rates) * 1.1
    trainer.close()


def test_the_budget_parts_a_step(recipe_dict):
    recipe = check_recipe(recipe_dict(trainer={"per_device_train_batch_size": 6}, engine={"tokens": 150}))
    planned = plan(recipe)
    assert planned.steps.parts > 1
    assert planned.memory.part_tokens <= max(150, planned.tokens.longest["pair"])


def test_checkpointing_is_planned_as_training_does_it(recipe_dict):
    from lora_dpo.config.trl_dpo import trainer_config, trainer_settings

    settings = recipe_dict()
    settings["trainer"].pop("gradient_checkpointing", None)
    given = check_recipe(settings)
    args = trainer_config(trainer_settings(given), output_dir="nowhere", dtype="float32")
    named = {**settings, "trainer": {**settings["trainer"], "gradient_checkpointing": args.gradient_checkpointing}}
    whole = plan(given).memory
    held = whole.libraries + whole.weights + whole.adapter
    checkpointed = set()
    for share in (2.0, 0.5, 0.25):
        small = f"{(held + share * (whole.total - held)) / (1 << 20)}MB"
        planned = plan(given, memory=small).memory
        assert planned == plan(check_recipe(named), memory=small).memory
        checkpointed.add(planned.checkpointed)
    assert len(checkpointed) > 1


def test_what_does_not_fit_gets_settings_that_fit(recipe_dict):
    changes = dict(lora={"rank": 64}, trainer={"gradient_checkpointing": False, "per_device_train_batch_size": 6})
    recipe = check_recipe(recipe_dict(**changes))
    whole = plan(recipe, card="40GB").memory
    held = whole.libraries + whole.desktop + whole.weights + whole.adapter
    seen = set()
    for share in (0.9, 0.7, 0.5, 0.35, 0.25, 0.2):
        planned = plan(recipe, card=f"{(held + share * (whole.total - held)) / (1 << 20)}MB")
        if planned.memory.fits or planned.fix is None:
            continue
        assert planned.fix.overrides
        seen.add(planned.fix.overrides)
        overrides = dict(text.split("=") for text in planned.fix.overrides)
        trainer = {
            "gradient_checkpointing": "trainer.gradient_checkpointing" in overrides,
            "per_device_train_batch_size": 6,
        }
        if "trainer.max_length" in overrides:
            trainer["max_length"] = int(overrides["trainer.max_length"])
        engine = {"split_pairs": "engine.split_pairs" in overrides}
        model = {"quantize": overrides.get("model.quantize", "none")}
        fixed = check_recipe(recipe_dict(**{**changes, "trainer": trainer, "engine": engine, "model": model}))
        again = plan(fixed, card=f"{planned.machine.memory / (1 << 20)}MB")
        assert again.memory.fits, planned.fix
    assert seen


def test_a_hopeless_card_is_said_to_be_one(recipe_dict):
    planned = plan(check_recipe(recipe_dict()), card="100MB")
    assert planned.memory.fits is False
    assert planned.fix is None
    assert "no setting tried here makes it fit" in verdict(planned)


def test_another_card_has_no_time_and_its_own_dtype(recipe_dict):
    planned = plan(check_recipe(recipe_dict(model={"dtype": "auto"})), card="12GB")
    assert (planned.machine.kind, planned.machine.dtype, planned.machine.memory) == ("cuda", "bfloat16", 12 << 30)
    assert planned.time.seconds is None
    assert planned.time.flops > 0


@pytest.mark.parametrize("options", [{"memory": "8GB"}, {"measure": True}], ids=str)
def test_another_card_is_not_this_machine(recipe_dict, options):
    with pytest.raises(ConfigError, match="another machine"):
        plan(check_recipe(recipe_dict()), card="12GB", **options)


def test_trls_own_passes_are_said_to_be_unknown(recipe_dict, tiny_model_folder, tmp_path):
    import shutil

    folder = tmp_path / "gpt"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    planned = plan(check_recipe(recipe_dict(model={"name": str(folder), "quantize": "none", "dtype": "float32"})))
    assert planned.memory.activations is None
    assert planned.memory.fits is None
    assert "dropout" in planned.notes[-1]
    assert planned.time.seconds > 0


def test_two_real_steps_leave_nothing_behind(recipe_dict, tmp_path, monkeypatch, own_cache):
    monkeypatch.chdir(tmp_path)
    recipe = check_recipe(recipe_dict())
    before = sorted(tmp_path.rglob("*"))
    dry_run = plan(recipe, measure=True).dry_run
    assert sorted(tmp_path.rglob("*")) == before
    assert not [left for left in own_cache.rglob("*") if "proofs" not in left.parts]
    assert dry_run.pairs == 2
    assert dry_run.peak > 0
    assert dry_run.run_seconds > 0
    planned = plan(recipe)
    assert dry_run.tokens <= 2 * planned.tokens.longest["pair"]  # references of the second step are known


# --- small parts ----------------------------------------------------------------------------------


def test_sizes():
    assert parse_size("12GB") == parse_size("12 GiB") == parse_size("12") == 12 << 30
    assert parse_size("512MB") == 512 << 20
    assert parse_size("1.5g") == 3 << 29
    assert [parse_size(text) for text in ("twelve", "0GB", "-1", "12TB", "")] == [None] * 5


@pytest.mark.parametrize("longest", [1, 7, 64, 99, 100, 1024, 2047, 100_000])
def test_bins_hold_everything(longest):
    edges = bins(longest)
    assert edges[0] == 0
    assert edges[-1] > longest >= edges[-2]
    assert len(edges) - 1 <= 10 + 1
    assert sum(count(range(longest + 1), edges)) == longest + 1


def test_bars():
    assert bar(10, 10) == "█" * 10
    assert bar(5, 10) == "█" * 5
    assert bar(1, 1000) == "▏"


# --- the command ----------------------------------------------------------------------------------


def write(tmp_path, settings):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


def test_the_command_says_what_will_happen(recipe_dict, tmp_path, capsys):
    assert main(["plan", write(tmp_path, recipe_dict()), "trainer.max_steps=3"]) == 0
    said = capsys.readouterr().out
    assert "3 of 2 pairs" in said
    assert "12 pairs read, 0 dropped" in said
    assert "It fits:" in said
    assert "█" in said


def test_json_is_for_scripts(recipe_dict, tmp_path, capsys):
    assert main(["plan", write(tmp_path, recipe_dict()), "--json", "--card", "1GB"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"]["steps"] == 2
    assert told["machine"]["memory"] == 1 << 30


def test_a_size_that_is_none_is_said(recipe_dict, tmp_path, capsys):
    assert main(["plan", write(tmp_path, recipe_dict()), "--memory", "big"]) == 1
    assert "--memory is 'big': write a size such as 12GB or 512MB." in capsys.readouterr().err


# --- the real model -------------------------------------------------------------------------------


@pytest.mark.slow
def test_predicted_bytes_of_the_quickstart_are_those_that_training_measures():
    planned = plan(read_recipe("configs/quickstart.yaml"), measure=True)
    recipe = read_recipe("configs/quickstart.yaml")
    costs = footprint(attach_lora(load_skeleton(recipe.model.name), recipe.lora, seed=0), itemsize=4, packed=False)
    shape = PairShape(37, 62, 150, 37)  # a pair of median lengths
    assert costs.kept_bytes(shape) / shape.stream == pytest.approx(planned.dry_run.kept_token_bytes, rel=0.15)
    longest = planned.dry_run.tokens  # of the step on the longest pairs: its references are known
    assert planned.memory.part_tokens <= longest <= 4 * planned.tokens.longest["pair"]
