"""Mixtures of experts: what is trained on one can be used, and what of it is not reached is said."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import PAIRS, build
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

import lora_dpo
from lora_dpo import merge
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.lora_config import CONFIG, read_config
from lora_dpo.adapters.parameter_lora import targets_of
from lora_dpo.config.reading import check_recipe
from lora_dpo.config.recipe import LoraSection
from lora_dpo.engine.cost_model import PairShape, footprint
from lora_dpo.errors import AdapterError, ConfigError
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.events import Resolved
from lora_dpo.model.base import load_base, load_skeleton
from lora_dpo.model.experts import active_parameters, expert_weights
from lora_dpo.model.lora import attach_lora, lora_config, unreached
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.mixture import mix
from lora_dpo.serving.chat import open_chat
from lora_dpo.training.engine_fallback import no_engine_because
from lora_dpo.training.run import train

IDS = torch.tensor([[257, 5, 6, 7, 8, 9]])
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
    initializer_range=0.2,
)  # fmt: skip
CONFIGS = {
    "qwen3_moe": lambda size: Qwen3MoeConfig(
        vocab_size=size, moe_intermediate_size=64, head_dim=16, num_experts=4, intermediate_size=64, **SIZES
    ),
    "mixtral": lambda size: MixtralConfig(vocab_size=size, intermediate_size=64, num_local_experts=4, **SIZES),
    "gpt_oss": lambda size: GptOssConfig(
        vocab_size=size, intermediate_size=64, num_local_experts=4, head_dim=16, sliding_window=16, **SIZES
    ),
}


@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp("mixtures") / kind
            AutoModelForCausalLM.from_config(CONFIGS[kind](len(tokenizer))).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return make


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("qwen3_moe", "experts"), ("mixtral", ["mlp.experts.gate_up_proj"]), ("gpt_oss", "experts"), ("mixtral", [])],
)
def test_an_adapter_of_experts_is_read_verified_and_merged(mixture, make_adapter, tmp_path, kind, parameters):
    folder = mixture(kind)
    adapter = make_adapter(tmp_path / "adapter", model=folder, rank=2, parameters=parameters)
    base = load_base(str(folder), quantize="none")
    before = logits(base.model)
    live = logits(attach_adapter(base, adapter))
    assert not torch.allclose(live, before, atol=1e-2)
    assert torch.allclose(live, logits(PeftModel.from_pretrained(plain(folder), adapter)), atol=1e-5)
    assert verify(adapter).adapter_drift < 1e-5
    merged = plain(merge(adapter, tmp_path / "merged", dtype="float32"))
    assert torch.allclose(logits(merged), live, atol=2e-5)


def test_each_expert_has_its_own_update(mixture, make_adapter, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model=mixture("qwen3_moe"), rank=2, parameters="experts")
    live = attach_adapter(load_base(str(mixture("qwen3_moe")), quantize="none"), adapter)
    merged = live.merge_and_unload().state_dict()  # peft's own
    ours = plain(merge(adapter, tmp_path / "merged", dtype="float32")).state_dict()
    base = plain(mixture("qwen3_moe")).state_dict()
    for name in ours:
        assert torch.allclose(ours[name], merged[name], atol=1e-5), name
        if "experts" in name:
            assert ((ours[name] - base[name]).flatten(1).norm(dim=1) > 0.1).all()


def test_what_peft_makes_of_all_linear_is_read(mixture, tmp_path):
    # experts and router by bare names, the fused matrix at twice the rank
    model = get_peft_model(
        plain(mixture("mixtral")), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert set(read_config(tmp_path / "adapter").parameters) == {"gate_up_proj", "down_proj", "gate.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no passport
        live = attach_adapter(load_base(str(mixture("mixtral")), quantize="none"), tmp_path / "adapter")
        merged = plain(merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32"))
    assert torch.allclose(logits(live), logits(model), atol=1e-5)
    assert torch.allclose(logits(merged), logits(model), atol=2e-5)
    stacked = targets_of(read_config(tmp_path / "adapter"), model.get_base_model())
    ranks = {target.name: target.rank for target in stacked.values()}
    assert ranks["model.layers.0.mlp.experts.gate_up_proj"] == 8
    assert ranks["model.layers.0.mlp.experts.down_proj"] == ranks["model.layers.0.mlp.gate.weight"] == 4


def test_an_adapter_of_another_number_of_experts_does_not_fit(mixture, make_adapter, tokenizer, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model=mixture("qwen3_moe"), rank=2, parameters="experts")
    (adapter / "passport.json").unlink()
    config = CONFIGS["qwen3_moe"](len(tokenizer))
    config.num_experts = 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "eight")
    tokenizer.save_pretrained(tmp_path / "eight")
    with pytest.raises(AdapterError, match=r"size mismatch in .*experts.*, \[8, 32\] .* here, \[16, 32\]"):
        attach_adapter(load_base(str(tmp_path / "eight"), quantize="none"), adapter)
    wrong = {**json.loads((adapter / CONFIG).read_text()), "r": 1}
    (adapter / CONFIG).write_text(json.dumps(wrong))
    with pytest.raises(AdapterError, match=r"size mismatch|has rank 2, but its config says 1"):
        attach_adapter(load_base(str(mixture("qwen3_moe")), quantize="none"), adapter)


def test_what_holds_no_experts_says_so(mixture, make_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(tmp_path / "adapters" / "one", model=mixture("qwen3_moe"), rank=2, parameters="experts")
    with pytest.raises(AdapterError, match="uses stacked weights of experts, which a GGUF adapter cannot hold"):
        export(adapter, tmp_path / "out.gguf", to="gguf-adapter")
    with pytest.raises(AdapterError, match="uses stacked weights of experts, which cannot be mixed"):
        mix([(str(adapter), 1.0)], tmp_path / "mixed")


def test_all_linear_leaves_experts_and_router_alone_and_says_so(mixture):
    skeleton = load_skeleton(str(mixture("qwen3_moe")))
    model = attach_lora(skeleton, LoraSection(rank=2), seed=0)
    assert not model.peft_config["default"].target_parameters
    share, names = unreached(model)
    experts, attention, router = 4 * 3 * 32 * 64, 2 * 64 * 32 + 2 * 32 * 32, 4 * 32
    assert share == pytest.approx((experts + router) / (experts + router + attention))
    assert names == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    reached = attach_lora(load_skeleton(str(mixture("qwen3_moe"))), LoraSection(rank=2, parameters="experts"), seed=0)
    assert unreached(reached)[1] == ["mlp.gate.weight"]


def test_layers_choose_experts_too(mixture):
    skeleton = load_skeleton(str(mixture("qwen3_moe")))
    found = lora_config(skeleton, LoraSection(layers="top-1", parameters=["mlp.experts.down_proj"]))
    assert found.target_parameters == ["model.layers.1.mlp.experts.down_proj"]
    trained = [name for name, p in attach_lora(skeleton, LoraSection(layers="top-1", parameters="experts"), seed=0)
               .named_parameters() if p.requires_grad]  # fmt: skip
    assert trained
    assert all(".layers.1." in name for name in trained)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"targets": ["q_proj", "gate_proj", "up_proj"]}, "gate_proj, up_proj, which peft takes for the experts"),
        ({"parameters": ["mlp.experts.nothing"]}, "no stacked weights of experts. Such weights here: mlp.experts.down"),
        ({"parameters": "experts", "dropout": 0.1}, "lora.dropout is not possible with lora.parameters"),
        ({"parameters": "experts", "dora": True}, "lora.dora is not possible with lora.parameters"),
    ],
)
def test_what_peft_would_take_otherwise_is_refused(mixture, lora, said):
    with pytest.raises(ConfigError, match=said):
        attach_lora(load_skeleton(str(mixture("qwen3_moe"))), LoraSection(**lora), seed=0)


def test_a_model_without_experts_has_none_to_adapt(tiny_model_folder):
    skeleton = load_skeleton(str(tiny_model_folder))
    assert expert_weights(skeleton) == {}
    assert active_parameters(skeleton) == sum(weight.numel() for weight in skeleton.parameters())
    with pytest.raises(ConfigError, match=r"no stacked weights of experts\. This model has none"):
        attach_lora(skeleton, LoraSection(parameters="experts"), seed=0)


def test_the_plan_counts_the_experts_that_a_token_uses(mixture):
    skeleton = load_skeleton(str(mixture("qwen3_moe")))
    unused = 2 * 2 * 3 * 32 * 64  # two layers, two of four experts, three matrices
    total = sum(weight.numel() for weight in skeleton.parameters())
    assert active_parameters(skeleton) == total - unused
    costs = footprint(attach_lora(skeleton, LoraSection(rank=2), seed=0), itemsize=4, packed=False)
    assert costs.layers[0].weights == 2 * 64 * 32 + 2 * 32 * 32 + 4 * 32 + 2 * 3 * 32 * 64
    assert costs.weight_bytes == total * 4  # all of them are in memory


def test_a_branch_run_on_its_own_has_its_own_answers_labels():
    pair = PairShape(prompt=37, first=41, second=44, common=38)
    assert [branch.labels for branch in pair.branches()] == [4, 7]
    assert pair.labels == 4 + 7 - 1


@pytest.mark.parametrize(("coefficient", "said"), [(None, True), (0.0, False)])
def test_the_routers_loss_is_left_to_trl(mixture, tmp_path, coefficient, said):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    options = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    model = plain(mixture("qwen3_moe"))
    trainer = build(lora_dpo.DPOTrainer, model, mixture("qwen3_moe"), tmp_path, PAIRS, lora, **options)
    reason = no_engine_because(trainer, lora_dpo.DPOTrainer) or ""
    assert ("the router's auxiliary loss counts (router_aux_loss_coef 0.001)" in reason) is said


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [[], "experts"])
def test_what_is_trained_on_a_mixture_chats(mixture, recipe_dict, tmp_path, monkeypatch, parameters):
    monkeypatch.chdir(tmp_path)
    settings = recipe_dict(health={"action": "none"}, trainer={"learning_rate": 5e-2})
    settings["model"] = {"name": str(mixture("qwen3_moe"))}
    settings["lora"] = {"rank": 2, "parameters": parameters}
    events = []
    adapter = train(check_recipe(settings), name="mixture", on_event=events.append).folder
    lines = dict(next(event for event in events if isinstance(event, Resolved)).lines)
    assert ("of the layers' weights are not reached (mlp.experts" in lines["adapter"]) is (parameters == [])
    assert "M of them for a token" in lines["model"]
    assert "of the layers' weights stay unquantised" in lines["weights"]
    assert open_chat(adapter)
    assert verify(adapter).adapter_drift < 1e-5
    assert merge(adapter, tmp_path / "merged").is_dir()
