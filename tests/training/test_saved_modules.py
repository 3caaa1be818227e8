"""`lora.modules_to_save`: modules that are trained whole beside the adapter."""

import math

import pytest
import torch
from kinds import skeleton
from peft import LoraConfig, PeftModel
from run_logs import logged
from safetensors.torch import load_file
from tiny import LORA, Stock, assert_close, one_step
from transformers import AutoModelForCausalLM

from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.config.reading import check_recipe
from lora_dpo.config.recipe import LoraSection
from lora_dpo.engine.small_copy import small_copy
from lora_dpo.errors import AdapterError, ConfigError
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.events import Progress, Resolved, Stopped, StopSignal
from lora_dpo.model.base import load_base, load_skeleton
from lora_dpo.model.lora import attach_lora, detach, is_reference, reference
from lora_dpo.release import merge
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.training.dpo_trainer import DPOTrainer
from lora_dpo.training.planning.make_plan import plan
from lora_dpo.training.run import train

IDS = torch.arange(3, 60)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="session")
def tied_folder(tiny_model_folder, tokenizer, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder = tmp_path_factory.mktemp("tied") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request, tiny_model_folder, tied_folder):
    return tied_folder if request.param else tiny_model_folder


@pytest.fixture
def recipe(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(modules, *, folder=None, trainer=None, **changes):
        trainer = {"loss_type": "sigmoid", "learning_rate": 1e-3, **(trainer or {})}
        settings = recipe_dict(trainer=trainer, **changes)
        settings["model"]["name"] = str(folder or settings["model"]["name"])
        return check_recipe({**settings, "lora": {"rank": 4, "modules_to_save": modules}})

    return make


# --- the same as stock TRL -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["model.embed_tokens"], ["model.norm"], ["input_layernorm"],
                                     ["v_proj"], ["down_proj"]])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_stock_trl(modules, tied, checkpointing, tiny_model_folder, tmp_path):
    lora = LoraConfig(**{**LORA.to_dict(), "modules_to_save": modules, "ensure_weight_tying": tied})
    options = dict(model={"tie_word_embeddings": tied}, lora=lora, gradient_checkpointing=checkpointing)
    ours, theirs = (one_step(kind, "llama", tiny_model_folder, tmp_path, **options) for kind in (DPOTrainer, Stock))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert_close(ours[1], theirs[1], rtol=2e-5)
    assert any("modules_to_save" in name for name in ours[1])
    assert (ours[3].engine is None) == (modules == ["lm_head"] or (tied and modules == ["model.embed_tokens"]))


# --- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modules",
    [
        ["lm_head"],
        *(pytest.param(each, marks=pytest.mark.slow) for each in (["embed_tokens"], ["model.norm", "lm_head"])),
    ],
)
def test_a_run_trains_saves_verifies_and_merges_them(modules, folder, recipe, tmp_path):
    events = []
    base = load_base(str(folder), quantize="none", dtype="float32")
    before = logits(base.model)
    made = recipe(modules, folder=folder, trainer={"max_steps": 3})
    done = train(made, name="whole", base=base, on_event=events.append)
    assert logged(done.folder)[1] == pytest.approx(math.log(2), abs=1e-5)
    lines = next(event for event in events if isinstance(event, Resolved)).lines
    assert any(f"{', '.join(modules)} whole" in text for _, text in lines)
    stored = load_file(done.folder / "adapter_model.safetensors")
    whole = {name: value for name, value in stored.items() if "lora_" not in name}
    own = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters(remove_duplicate=False))
    assert whole
    assert all(not torch.equal(value, own[name.removeprefix("base_model.model.")]) for name, value in whole.items())
    if AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings:  # one matrix, and it stays one
        into, head = (whole[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
        assert torch.equal(into, head)
    after = logits(done.model)
    assert (after - before).abs().max() > 1e-3
    with reference(done.model):
        assert torch.equal(logits(done.model), before)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), done.folder)
    assert torch.allclose(logits(plain.eval()), after, atol=1e-5)
    ours = attach_adapter(load_base(str(folder), quantize="none", dtype="float32"), done.folder)
    assert torch.allclose(logits(ours), after, atol=1e-5)
    assert verify(done.folder, base=load_base(str(folder), quantize="none", dtype="float32")).adapter_drift < 1e-5
    merge(done.folder, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), after, atol=1e-4)
    assert torch.equal(logits(detach(done.model)), before)  # peft would leave the trained ones there


def test_a_run_resumes_with_the_same_losses(recipe):
    settings = dict(trainer={"max_steps": 4, "learning_rate": 1e-2})
    whole = train(recipe(["lm_head", "model.norm"], **settings), name="whole")
    stop = StopSignal()

    def stop_at_two(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 2:
            stop.requested = True

    with pytest.raises(Stopped):
        train(recipe(["lm_head", "model.norm"], **settings), name="cut", on_event=stop_at_two, stop=stop)
    resumed = train(recipe(["lm_head", "model.norm"], **settings), name="cut", resume=True)
    assert logged(resumed.folder) == pytest.approx(logged(whole.folder), rel=1e-6)
    assert torch.allclose(logits(resumed.model), logits(whole.model), atol=1e-5)


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_other_methods_train_them_too(method, recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = recipe_dict(method=method, lora={"rank": 2, "modules_to_save": ["lm_head", "embed_tokens"]})
    done = train(check_recipe(made), name="whole")
    assert not is_reference(done.model)


@pytest.mark.parametrize(
    "modules",
    [
        ["model.norm", "input_layernorm"],
        *(pytest.param(each, marks=pytest.mark.slow) for each in (["lm_head"], ["embed_tokens"])),
    ],
)
def test_in_16_bits_copies_are_float32_and_compute_as_the_base(modules, folder, recipe):
    changes = dict(folder=folder, model={"dtype": "bfloat16"}, trainer={"max_steps": 3})
    done = train(recipe(modules, **changes), name="whole")
    assert logged(done.folder)[1] == pytest.approx(math.log(2), abs=2e-2)
    copies = {n: p for n, p in done.model.named_parameters() if "modules_to_save.default" in n}
    assert copies
    assert all(p.dtype == torch.float32 and p.requires_grad for p in copies.values())
    # learning rates of 1e-3 are below what bfloat16 can tell at many values: all of them moved by less than a step
    stored = load_file(done.folder / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in stored.values())
    fresh = attach_lora(
        load_base(str(folder), quantize="none", dtype="bfloat16").model,
        LoraSection(rank=2, modules_to_save=modules), seed=0,
    )  # fmt: skip
    policy = logits(fresh)
    with reference(fresh):
        assert (logits(fresh) - policy).abs().max() <= policy.abs().max() * 2**-7
    with pytest.raises(ConfigError, match=r"whole modules in 16 bits.*model\.dtype: float32"):
        train(recipe(modules, reference=f"adapter:{done.folder}", **changes)
              .model_copy(update={"lora": LoraSection()}), name="on")  # fmt: skip


def test_beside_a_base_in_4_bits(recipe, tiny_model_folder):
    changes = dict(model={"quantize": "nf4", "packed": True}, trainer={"max_steps": 2})
    done = train(recipe(["lm_head", "model.norm"], **changes), name="whole")
    assert logged(done.folder)[1] == pytest.approx(math.log(2), abs=2e-2)
    assert not is_reference(done.model)
    ours = attach_adapter(load_base(str(tiny_model_folder), quantize="nf4", packed=True), done.folder)
    assert torch.allclose(logits(ours), logits(done.model), atol=1e-3)


def test_a_run_goes_on_from_such_an_adapter(recipe, recipe_dict):
    first = train(recipe(["lm_head"], trainer={"learning_rate": 1e-2}), name="first")
    settings = recipe_dict(reference=f"adapter:{first.folder}", trainer={"loss_type": "sigmoid", "max_steps": 3})
    second = train(check_recipe(settings), name="second")
    assert logged(second.folder)[1] == pytest.approx(math.log(2), abs=1e-5)
    one, two = (load_file(done.folder / "adapter_model.safetensors") for done in (first, second))
    assert not torch.equal(one["base_model.model.lm_head.weight"], two["base_model.model.lm_head.weight"])


# --- what is said and refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["head"], r"names 'head', which no module with weights is called\. There is down_proj, embed_tokens"),
        (["rotary_emb"], r"names 'rotary_emb', which no module with weights is called"),
        (["layers.0"], r"names 'layers\.0', which is made of others\. Name those that hold weights"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_before_weights_are_loaded(modules, said, recipe, loads):
    with pytest.raises(ConfigError, match=said):
        train(recipe(modules), name="whole")
    assert not loads


def test_a_quantised_module_is_refused(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="nf4", packed=True)
    lora = LoraSection(targets=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(
        ConfigError, match=r"names 'down_proj', whose weights are held quantised.*model\.quantize: none"
    ):
        attach_lora(base.model, lora, seed=0)


def test_a_name_means_whole_parts_of_names(tiny_model_folder):
    model = attach_lora(load_skeleton(str(tiny_model_folder)), LoraSection(rank=2, modules_to_save=["norm"]), seed=0)
    whole = [name for name, p in model.named_parameters() if "modules_to_save" in name]
    assert whole == ["base_model.model.model.norm.modules_to_save.default.weight"]  # and no input_layernorm


def test_a_layer_is_trained_whole_or_has_an_adapter(tiny_model_folder):
    model = attach_lora(load_skeleton(str(tiny_model_folder)), LoraSection(rank=2, modules_to_save=["v_proj"]), seed=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".v_proj." in name]
    assert len(names) == 2
    assert all(name.endswith("v_proj.modules_to_save.default.weight") for name in names)


def test_the_plan_counts_the_copies_and_says_why_trls_passes_run(recipe):
    found = {
        name: plan(recipe(modules)) for name, modules in (("none", []), ("head", ["lm_head"]), ("norm", ["model.norm"]))
    }
    head = 259 * 64
    # weight, gradient, two moments
    assert found["head"].memory.adapter - found["none"].memory.adapter == head * 16
    assert found["norm"].memory.adapter - found["none"].memory.adapter == 64 * 16
    done = train(recipe(["lm_head"]), name="whole")
    held = [p for name, p in done.model.named_parameters() if "lm_head" in name]
    assert sum(p.numel() for p in held) == 2 * head  # the base's and the policy's, and no frozen copy
    assert found["head"].memory.weights == found["none"].memory.weights
    assert "its output head is trained" in str(found["head"])
    assert "its output head is trained" not in str(found["norm"])


def test_without_fallback_a_trained_head_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"engine\.fallback is false, but its output head is trained"):
        train(recipe(["lm_head"], engine={"fallback": False}), name="whole")


def test_adapter_files_for_llama_cpp_cannot_hold_them(recipe, tmp_path):
    done = train(recipe(["lm_head"]), name="whole")
    with pytest.raises(AdapterError, match="whole saved modules"):
        export(done.folder, tmp_path / "a.gguf", to="gguf-adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_that_returns_several_tensors_is_trained_whole(dtype):
    model = attach_lora(
        small_copy(skeleton("qwen3_moe")).to(dtype), LoraSection(rank=2, modules_to_save=["mlp.gate"]), seed=0
    )
    found = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert found.dtype == dtype
    assert bool(found.isfinite().all())


def test_a_target_that_is_trained_whole_is_said():
    lora = LoraSection(rank=2, targets=["q_proj", "v_proj"], modules_to_save=["q_proj"])
    with pytest.raises(ConfigError, match=r"targets names 'q_proj', of which lora\.modules_to_save leaves nothing"):
        attach_lora(small_copy(skeleton("llama")), lora, seed=0)
