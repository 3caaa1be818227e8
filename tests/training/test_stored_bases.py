"""A base that came quantised, from training to merge: what was trained on it can be used, on it and on its original."""

import json

import pytest
import torch
from stored import bfloat16, bitsandbytes, copies_of
from transformers import AutoModelForCausalLM

from lora_dpo import merge
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.loading import load_base_of
from lora_dpo.adapters.passport import PASSPORT, read_passport
from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import AdapterError, BaseDiffers, ModelError
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.model.base import load_base
from lora_dpo.release.merge_base import trained_into
from lora_dpo.serving.chat import open_chat
from lora_dpo.serving.host import open_host
from lora_dpo.training.planning.make_plan import plan
from lora_dpo.training.run import train

IDS = torch.tensor([[257, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def original(tiny_model_folder, tmp_path_factory):
    return bfloat16(tiny_model_folder, tmp_path_factory.mktemp("bases") / "original")


@pytest.fixture(scope="module")
def base_of_kind(original):
    return copies_of(original)


@pytest.fixture
def trained(base_of_kind, recipe_dict, tmp_path, monkeypatch):
    """Train on a base of a kind for two steps, with settings of the model's section."""
    monkeypatch.chdir(tmp_path)

    def make(kind, **model):
        settings = recipe_dict(health={"action": "none"}, trainer={"learning_rate": 5e-2})
        settings["model"] = {"name": str(base_of_kind(kind)), **model}
        recipe = check_recipe(settings)
        return recipe, train(recipe, name=f"on-{kind}").folder

    return make


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "kind", ["nf4-double", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp4", "int8", "fp8"))]
)
def test_what_is_trained_on_a_stored_base_chats_verifies_and_merges(trained, original, tmp_path, kind):
    recipe, adapter = trained(kind)
    held = f"{kind.removesuffix('-double')}, stored"
    passport = read_passport(adapter)
    assert (passport.quantize, passport.packed) == (held, False)
    assert f"{held.split(',')[0].upper()} as stored" in (adapter / "README.md").read_text()
    if kind != "fp8":
        assert plan(recipe).held == f"{held.split(',')[0].upper()} as stored, held dequantised"
    assert verify(adapter).adapter_drift < 1e-5
    assert open_chat(adapter).base.quantize == held

    assert trained_into(adapter) == "trained-base"
    live = logits(attach_adapter(load_base_of(adapter), adapter))
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "merged", dtype="float32"))
    assert not hasattr(merged.config, "quantization_config")
    assert torch.allclose(logits(merged), live, atol=2e-5)

    # the 16-bit original, with a word
    base = load_base(str(original), quantize="none")
    assert not torch.allclose(live, logits(base.model), atol=1e-2)
    with pytest.warns(BaseDiffers) as said:
        there = logits(attach_adapter(base, adapter))
    texts = " ".join(str(one.message) for one in said)
    assert f"its weights are those of {original.parent / kind} in another form" in texts
    assert f"trained on weights quantised as {held}, here they are none" in texts
    with pytest.warns(BaseDiffers, match="in another form"):
        path = merge(adapter, tmp_path / "there", into="base16", dtype="float32", model=str(original))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(path)), there, atol=2e-5)


def test_an_adapter_of_the_original_fits_the_stored_base(make_adapter, original, base_of_kind, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model=original, quantize="nf4")
    stored = str(base_of_kind("nf4-double"))
    with pytest.warns(BaseDiffers, match="in another form"):
        live = logits(attach_adapter(load_base_of(adapter, model=stored), adapter))
    assert torch.allclose(live, logits(attach_adapter(load_base_of(adapter), adapter)), atol=1e-5)
    with pytest.warns(BaseDiffers, match="in another form"):
        merged = merge(adapter, tmp_path / "merged", model=stored, dtype="float32")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), live, atol=2e-5)


def test_another_base_is_refused_all_the_same(make_adapter, original, base_of_kind, tmp_path):
    def tune(name, weight):
        if name.endswith("up_proj.weight"):
            weight.mul_(1.1).add_(0.02)

    adapter = make_adapter(tmp_path / "adapter", model=base_of_kind("nf4-double"), quantize="auto")
    other = bfloat16(original, tmp_path / "other", tune)
    for base in (other, bitsandbytes(other, tmp_path / "other4", "nf4")):
        with pytest.raises(AdapterError, match=r"was made for .* Load it on its own base"):
            attach_adapter(load_base(str(base)), adapter)
        with pytest.raises(AdapterError, match="was made for"):
            merge(adapter, tmp_path / "out", model=str(base))


def test_a_passport_of_an_earlier_version_is_no_dead_end(make_adapter, original, base_of_kind, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model=base_of_kind("nf4-double"), quantize="auto")
    passport = {**json.loads((adapter / PASSPORT).read_text()), "quantize": "none", "base_sample": {}}
    (adapter / PASSPORT).write_text(json.dumps(passport))  # as they were written of a base stored in 4 bits
    assert merge(adapter, tmp_path / "own").is_dir()
    with pytest.warns(BaseDiffers, match="in another form"):
        assert merge(adapter, tmp_path / "original", model=str(original)).is_dir()


def test_what_a_merge_cannot_be_made_into_says_the_way_out(make_adapter, original, base_of_kind, tmp_path):
    on_fp4 = make_adapter(tmp_path / "on-fp4", model=base_of_kind("fp4"), quantize="auto")
    with pytest.raises(ModelError, match=r"has no 16-bit weights to merge into\. Name its 16-bit original"):
        merge(on_fp4, tmp_path / "out", into="base16")
    with pytest.raises(AdapterError, match=r"on weights in FP4 as stored, which are not made of .*: use --into base16"):
        merge(on_fp4, tmp_path / "out", into="trained-base", model=str(original))
    assert trained_into(on_fp4, str(original)) == "base16"
    plain = make_adapter(tmp_path / "plain", model=original, quantize="none")
    with pytest.raises(ModelError, match=r"stored quantised \(FP4\), and .* was trained on weights as stored"):
        merge(plain, tmp_path / "out", model=str(base_of_kind("fp4")))


def test_a_stored_base_is_hosted_and_trained_on_again(base_of_kind, tmp_path):
    with open_host(str(base_of_kind("nf4-double")), tmp_path) as host:
        section = host.model_section()
        assert (section.quantize, section.packed) == ("auto", False)
        assert (host.base.quantize, host.base.asked) == ("nf4, stored", "auto")


@pytest.mark.slow
def test_packed_training_gives_the_losses_of_the_values(trained):
    losses = []
    for packed in (True, False):
        _, adapter = trained("nf4", packed=packed, dtype="float32")
        rows = map(json.loads, (adapter / "metrics.jsonl").read_text().splitlines())
        losses.append([number for row in rows if "grad_norm" in row for number in (row["loss"], row["grad_norm"])])
        assert read_passport(adapter).packed is packed
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
