import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_dpo import merge
from lora_dpo.adapters import attach_adapter
from lora_dpo.config import check_recipe
from lora_dpo.errors import AdapterError, OutputError
from lora_dpo.model import load_base
from lora_dpo.train import train

IDS = torch.tensor([[257, 5, 6, 7, 8, 9]])


@pytest.fixture(
    params=[{}, {"rslora": True}, {"dora": True, "targets": ["q_proj", "down_proj"]}], ids=["lora", "rslora", "dora"]
)
def adapter(request, recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = recipe_dict()
    settings["lora"] = {"rank": 4, **request.param}
    settings["model"]["quantize"] = "nf4"
    settings["trainer"] |= {"learning_rate": 5e-2}
    return train(check_recipe(settings), name="tiny").folder


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("into", ["base16", "trained-base"])
def test_merging_then_scoring_equals_scoring_with_the_adapter_live(adapter, into, tiny_model_folder, tmp_path):
    merged = merge(adapter, tmp_path / "merged", into=into, dtype="float32")
    base = load_base(str(tiny_model_folder), quantize="nf4" if into == "trained-base" else "none", packed=False)
    plain = logits(base.model)
    live = logits(attach_adapter(base, adapter))
    loaded = logits(AutoModelForCausalLM.from_pretrained(merged))  # plain transformers
    assert torch.allclose(loaded, live, atol=2e-5)
    assert not torch.allclose(live, plain, atol=1e-2)


def test_the_two_bases_give_different_models(adapter, tmp_path):
    folders = [merge(adapter, tmp_path / into, into=into, dtype="float32") for into in ("base16", "trained-base")]
    one, other = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders)
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_merged_folder_is_stored_in_the_asked_dtype_with_its_tokenizer(adapter, tmp_path):
    from transformers import AutoTokenizer

    folder = merge(adapter, tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_merge_never_overwrites(adapter, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        merge(adapter, tmp_path / "there")


def test_trained_base_makes_no_sense_without_quantisation(recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = train(check_recipe(recipe_dict()), name="tiny").folder
    with pytest.raises(AdapterError, match="base16"):
        merge(folder, tmp_path / "merged", into="trained-base")


def test_an_adapter_without_passport_merges_too(adapter, tmp_path, tiny_model_folder):
    (adapter / "passport.json").unlink()
    folder = merge(adapter, tmp_path / "merged", dtype="float32")
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), str(adapter))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(live), atol=2e-5)
