import io
import json
import os
import pickle
import shutil
import threading
import time
import zipfile

import pytest
import torch
from conftest import COMMIT

from lora_dpo.config.recipe import LoraSection
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.model.base import load_base, load_skeleton, load_tokenizer
from lora_dpo.model.device import pick_dtype
from lora_dpo.model.identity import weight_fingerprint
from lora_dpo.model.lora import attach_lora, reference
from lora_dpo.release.merged_weights import plan_base

IDS = torch.tensor([[257, 5, 6, 7, 8, 9, 10, 11]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fill_b(model, value=0.05):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.fill_(value)


def test_a_fresh_adapter_changes_nothing(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    before = logits(base.model)
    assert torch.equal(logits(attach_lora(base.model, LoraSection(rank=4), seed=0)), before)


def test_layers_have_the_ranks_that_are_named(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    ranks = {"layers.0.mlp.down_proj": 6, "down_proj": 3}
    model = attach_lora(base.model, LoraSection(rank=4, alpha=8, rank_pattern=ranks), seed=0)
    found = {name: part for name, part in model.named_modules() if hasattr(part, "lora_A")}
    for name, part in found.items():
        rank = 6 if name.endswith("0.mlp.down_proj") else 3 if name.endswith("down_proj") else 4
        assert part.lora_A["default"].weight.shape[0] == rank
        assert part.scaling["default"] == pytest.approx(8 / rank)


@pytest.mark.parametrize("name", ["downproj", "proj", "layers.9.mlp.down_proj", "lm_head"])
def test_a_rank_for_no_layer_is_an_error(tiny_model_folder, name):
    base = load_base(str(tiny_model_folder), quantize="none")
    with pytest.raises(ConfigError, match=rf"lora.rank_pattern names '{name}'.*Adapted here: down_proj, gate_proj"):
        attach_lora(base.model, LoraSection(rank_pattern={name: 2}), seed=0)


def test_a_is_drawn_from_a_normal_distribution_where_that_is_asked(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    before = logits(base.model)
    model = attach_lora(base.model, LoraSection(rank=4, init="gaussian"), seed=0)
    drawn = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])
    assert drawn.std().item() == pytest.approx(1 / 4, rel=0.05)
    assert (drawn.abs() > 1 / 2).float().mean().item() == pytest.approx(0.0455, rel=0.3)  # beyond two deviations
    assert torch.equal(logits(model), before)


def test_reference_turns_the_adapter_off_and_on_again(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    plain = logits(base.model)
    model = attach_lora(base.model, LoraSection(rank=4), seed=0)
    fill_b(model)
    adapted = logits(model)
    with reference(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), adapted)
    assert not torch.allclose(adapted, plain)
    with pytest.raises(RuntimeError), reference(model):
        raise RuntimeError
    assert torch.equal(logits(model), adapted)


def test_reference_keeps_trainable_what_was_trainable(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    model = attach_lora(base.model, LoraSection(rank=4), seed=0)
    model.add_adapter("ref", model.peft_config["default"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    with reference(model):
        pass
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_packed_and_dequantised_nf4_are_the_same_function(tiny_model_folder):
    packed = load_base(str(tiny_model_folder), quantize="nf4", packed=True)
    held = load_base(str(tiny_model_folder), quantize="nf4", packed=False)
    plain = load_base(str(tiny_model_folder), quantize="none")
    assert torch.allclose(logits(packed.model), logits(held.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(held.model), logits(plain.model), rtol=1e-2, atol=1e-2)
    assert packed.packed
    assert not held.packed


def test_the_head_and_embeddings_are_not_quantised(tiny_model_folder):
    held = load_base(str(tiny_model_folder), quantize="nf4", packed=False)
    plain = load_base(str(tiny_model_folder), quantize="none")
    assert torch.equal(held.model.lm_head.weight, plain.model.lm_head.weight)
    assert torch.equal(held.model.model.embed_tokens.weight, plain.model.model.embed_tokens.weight)


def test_gradients_after_an_evaluation_equal_gradients_before_it(tiny_model_folder):
    # bitsandbytes repacks 4-bit weights in eval mode on AVX512-BF16 CPUs; gradients must survive that.
    base = load_base(str(tiny_model_folder), quantize="nf4", packed=True)
    model = attach_lora(base.model, LoraSection(rank=4), seed=0)
    fill_b(model)

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.eval()
    logits(model)
    with reference(model):
        logits(model)
    after = gradients()
    assert before.keys() == after.keys()
    assert len(before) == 2 * 2 * 7  # A and B of seven linear layers in two decoder layers
    for name, gradient in before.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(after[name], gradient, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize(("layers", "expected"), [("all", {0, 1}), ("top-1", {1}), ([0], {0})])
def test_lora_layers(tiny_model_folder, layers, expected):
    base = load_base(str(tiny_model_folder), quantize="none")
    model = attach_lora(base.model, LoraSection(rank=2, layers=layers), seed=0)
    found = {int(name.split(".layers.")[1].split(".")[0]) for name, p in model.named_parameters() if p.requires_grad}
    assert found == expected


def test_lora_variants_and_targets(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    model = attach_lora(base.model, LoraSection(rank=4, alpha=8, targets=["q_proj"], rslora=True, dora=True), seed=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("q_proj" in name for name in names)
    assert any("magnitude" in name for name in names)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(8 / 2)  # alpha / sqrt(rank)


def test_targets_that_match_nothing_name_the_layers_there_are(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    with pytest.raises(ConfigError, match="q_proj"):
        attach_lora(base.model, LoraSection(targets=["nothing"]), seed=0)


def test_layer_number_out_of_range(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        attach_lora(base.model, LoraSection(layers=[7]), seed=0)


def test_adapters_are_float32_whatever_the_base(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none", dtype="bfloat16")
    model = attach_lora(base.model, LoraSection(rank=2), seed=0)
    assert base.model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_fingerprint_knows_other_weights_and_ignores_the_storage_dtype(tiny_model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    model.float().save_pretrained(tmp_path / "fp32")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "other")
    prints = {name: weight_fingerprint(str(tmp_path / name)) for name in ("bf16", "fp32", "other")}
    assert prints["bf16"] == prints["fp32"] != prints["other"]
    assert prints["bf16"]


def test_model_errors_say_the_next_step(tmp_path):
    with pytest.raises(ModelError, match="no model folder"):
        load_base(str(tmp_path))
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base("nobody/has-this-model")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[]"),
        ("config.json", "7"),
        ("config.json", '{"model_type": [1]}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", '{"model_type": "llama", "vocab_size": null}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": [1]}'),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": 7}'),
    ],
)
def test_files_of_a_model_that_have_another_shape_are_one_sentence(tiny_model_folder, tmp_path, name, text):
    shutil.copytree(tiny_model_folder, tmp_path / "odd")
    (tmp_path / "odd" / name).write_text(text)
    if name == "model.safetensors.index.json":
        (tmp_path / "odd" / "model.safetensors").unlink()
    for read in (load_base, plan_base) if name != "tokenizer_config.json" else (load_base,):
        with pytest.raises(
            ModelError, match=r"(could not be loaded: .*lora-dpo models list|Download the model again\.)$"
        ):
            read(str(tmp_path / "odd"))


class Runs:
    """What makes a folder wherever it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def zipped(**files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"weights/{name}", content)
    return packed.getvalue()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Runs()), b"", b"garbage " * 9, zipped(other=b"x")],
    ids=["hostile", "empty", "garbage", "another-zip"],
)
def test_weights_that_are_none_are_one_sentence(name, content, tiny_model_folder, in_an_empty_folder):
    shutil.copytree(tiny_model_folder, "odd")
    os.unlink("odd/model.safetensors")
    (in_an_empty_folder / "odd" / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"could not be loaded: (its weights are damaged|transformers cannot).*list$"):
        load_base("./odd", quantize="none")
    assert not os.path.exists("it-ran")


def test_weights_in_a_pickle_of_tensors_alone_are_loaded(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    whole = load_base(str(tiny_model_folder), quantize="none").model
    torch.save(whole.state_dict(), tmp_path / "old/pytorch_model.bin")
    assert torch.equal(logits(load_base(str(tmp_path / "old"), quantize="none").model), logits(whole))


def test_auto_dtype_is_float32_on_a_cpu():
    assert pick_dtype("auto", torch.device("cpu")) == "float32"
    assert pick_dtype("bfloat16", torch.device("cpu")) == "bfloat16"


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_the_commit_of_a_hub_model_is_recorded_whatever_was_asked_for(hub_model, revision):
    assert load_base(hub_model, revision=revision, quantize="none").revision == COMMIT


def test_a_model_folder_has_no_commit(tiny_model_folder):
    assert load_base(str(tiny_model_folder), quantize="none").revision is None


def test_a_base_that_is_stored_in_4_bits_is_never_repacked(tiny_model_folder, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(tiny_model_folder, device_map={"": "cpu"}, quantization_config=how)
    stored.save_pretrained(tmp_path / "stored")
    load_tokenizer(str(tiny_model_folder)).save_pretrained(tmp_path / "stored")
    base = load_base(str(tmp_path / "stored"), packed=True)
    layers = [part for part in base.model.modules() if hasattr(part, "support_avx512bf16_for_cpu")]
    logits(base.model)
    assert len(layers) == 14
    assert not any(getattr(part.weight.quant_state, "packing_format_for_cpu", False) for part in layers)
    assert not any(part.support_avx512bf16_for_cpu for part in layers)


@pytest.mark.parametrize(("alpha", "written"), [(32, "32"), (32.0, "32"), (0.5, "0.5")])
def test_a_resumed_run_writes_the_same_alpha(alpha, written, tiny_model_folder, tmp_path):
    # the recipe's default is 32; read back from a run's own recipe.yaml it is 32.0
    model = attach_lora(load_base(str(tiny_model_folder), quantize="none").model, LoraSection(alpha=alpha), seed=0)
    model.save_pretrained(tmp_path)
    assert f'"lora_alpha": {written},' in (tmp_path / "adapter_config.json").read_text()


# --- torch's default dtype, which belongs to the whole process ------------------------------------


def test_a_skeleton_leaves_the_default_dtype_alone_while_it_is_built(tiny_model_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "bf16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    changed, really = [], torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (changed.append(dtype), really(dtype)))
    skeleton = load_skeleton(str(folder))
    assert set(changed) <= {torch.float32}
    assert {parameter.dtype for parameter in skeleton.parameters()} == {skeleton.config.dtype} == {torch.bfloat16}


def test_two_loads_at_once_leave_the_default_dtype_as_it_was(tiny_model_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    inside, seen, really = [], [], AutoModelForCausalLM.from_pretrained

    def slow(*given, **named):
        inside.append(1)
        seen.append(len(inside))
        time.sleep(0.1)
        model = really(*given, **named)
        inside.pop()
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    options = {"quantize": "none", "dtype": "bfloat16"}
    threads = [
        threading.Thread(target=load_base, args=(str(tiny_model_folder),), kwargs=options, daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [1, 1, 1]
    assert torch.get_default_dtype() is torch.float32


def test_a_fault_of_our_own_is_not_told_as_one_of_the_files(tiny_model_folder, monkeypatch):
    def faulty(*_, **__):
        raise AttributeError("ours")

    for name in ("decide_packed", "check_packed", "weight_fingerprint"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lora_dpo.model.base.{name}", faulty)
            with pytest.raises(AttributeError, match="ours"):
                load_base(str(tiny_model_folder), quantize="nf4")
