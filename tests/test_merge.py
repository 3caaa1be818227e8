import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_dpo import merge
from lora_dpo.adapters import attach_adapter
from lora_dpo.cli import main
from lora_dpo.config import check_recipe
from lora_dpo.errors import AdapterError, BaseDiffers, ModelError, OutputError
from lora_dpo.fidelity import Fidelity, fidelity, recommend
from lora_dpo.merge import shard_files
from lora_dpo.merging import merge_weight, plan_merge, predict_bytes
from lora_dpo.model import load_base
from lora_dpo.train import train

IDS = torch.tensor([[257, 5, 6, 7, 8, 9]])


@pytest.fixture(
    params=[{}, {"rslora": True}, {"dora": True, "targets": ["q_proj", "down_proj"]}], ids=["lora", "rslora", "dora"]
)
def adapter(request, recipe_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = recipe_dict(health={"action": "none"})  # at this rate a tiny model goes bad, which is no matter here
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


# --- what a weight can hold -----------------------------------------------------------------------


@pytest.fixture
def foreign(tiny_model_folder, tmp_path):
    """An adapter made with plain peft, on the tiny model with or without tied embeddings."""

    def make(*, tied="untied", **config):
        base = tmp_path / f"base-{tied}"
        if not base.exists():
            shutil.copytree(tiny_model_folder, base)
            settings = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": tied != "untied"}))
            if tied == "tied":  # as "stored", but without the head: transformers ties only what is not in the file
                found = load_file(base / "model.safetensors")
                del found["lm_head.weight"]
                save_file(found, base / "model.safetensors", metadata={"format": "pt"})
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM", **config)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape) * 0.1
        model.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)
        return tmp_path / "foreign", base, logits(model)

    return make


@pytest.mark.parametrize("tied", ["untied", "tied", "stored"])
@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["q_proj"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["norm"]),
        dict(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.*q_proj": 32}),
        dict(target_modules=r".*\.(q|v)_proj", use_rslora=True, lora_alpha=3),
        dict(target_modules="all-linear", use_dora=True),
    ],
    ids=["q", "embeddings", "head", "saved head", "saved norm", "patterns", "regex", "dora"],
)
def test_what_peft_computes_live_is_what_is_merged(config, tied, foreign, tmp_path):
    adapter, base, live = foreign(tied=tied, **config)
    merged = merge(adapter, tmp_path / "merged", dtype="float32", model=str(base), shard=50_000)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), live, atol=2e-4)


def test_tied_embeddings_stay_tied_unless_the_adapter_changes_one(foreign, tmp_path):
    adapter, base, _ = foreign(tied="tied", target_modules=["q_proj"])
    merged = merge(adapter, tmp_path / "one", model=str(base))
    assert AutoConfig.from_pretrained(merged).tie_word_embeddings
    shutil.rmtree(adapter)
    adapter, base, _ = foreign(tied="tied", target_modules=["lm_head"])
    merged = merge(adapter, tmp_path / "two", model=str(base))
    assert not AutoConfig.from_pretrained(merged).tie_word_embeddings


def test_a_merged_weight_by_hand():
    weight, a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]])
    assert merge_weight(weight.clone(), a, b, scale=0.5).tolist() == [[2.0, 2.0], [3.0, 4.0]]
    dora = merge_weight(weight.clone(), a, b, scale=0.5, magnitude=torch.tensor([8.0**0.5, 10.0]))
    assert torch.allclose(dora, torch.tensor([[2.0, 2.0], [6.0, 8.0]]))
    assert merge_weight(weight.T.clone(), a, b, scale=0.5, transposed=True).tolist() == [[2.0, 3.0], [2.0, 4.0]]


def test_what_no_weight_can_hold_is_refused(foreign, tmp_path):
    adapter, base, _ = foreign(target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [1]}))
    with pytest.raises(AdapterError, match="trainable_token_indices"):
        merge(adapter, tmp_path / "merged", model=str(base))


def test_packed_4_bit_weights_are_never_merged_into(adapter, tiny_model_folder, tmp_path):
    packed = tmp_path / "packed"
    shutil.copytree(tiny_model_folder, packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored quantised \\(bitsandbytes\\)"):
        merge(adapter, tmp_path / "merged", model=str(packed))
    assert not (tmp_path / "merged").exists()


def test_a_value_that_float16_cannot_hold_is_refused(adapter, tiny_model_folder, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(tiny_model_folder, large)
    found = load_file(large / "model.safetensors")
    found["model.norm.weight"][0] = 1e6
    save_file(found, large / "model.safetensors", metadata={"format": "pt"})
    (adapter / "passport.json").unlink()
    with pytest.warns(BaseDiffers, match="unverified"), pytest.raises(AdapterError, match="does not fit into float16"):
        merge(adapter, tmp_path / "merged", model=str(large), dtype="float16")
    assert not (tmp_path / "merged").exists()


# --- shards and memory ----------------------------------------------------------------------------


def test_shards_are_filled_in_order():
    assert list(shard_files({"a": 4, "b": 4}, 8).values()) == [["a", "b"]]
    assert list(shard_files({"a": 4, "b": 5, "c": 20, "d": 1}, 8).values()) == [["a"], ["b"], ["c"], ["d"]]
    assert list(shard_files({"a": 9, "b": 1}, 8)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_shards_hold_the_same_weights(adapter, tmp_path):
    one = merge(adapter, tmp_path / "one")
    many = merge(adapter, tmp_path / "many", shard=40_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (one, many)))


def test_the_prediction_for_an_8b_model_fits_16_gb():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) > 8e9
    linear = {name for name in shapes if "_proj" in name}
    assert predict_bytes(shapes, linear, itemsize=2, shard=1 << 30) < 5e9
    assert predict_bytes(shapes, set(shapes), itemsize=2, shard=1 << 30) < 10e9  # head and embeddings adapted too


# --- the report -----------------------------------------------------------------------------------


def test_the_report_finds_no_difference_where_there_is_none(adapter, tmp_path):
    folder = merge(adapter, tmp_path / "both", into="both", dtype="float32")
    found = fidelity(adapter, {into: folder / into for into in ("base16", "trained-base")})
    stored, exact = found
    assert exact.mean_delta < 1e-5 < 1e-3 < stored.mean_delta
    assert exact.max_delta >= exact.mean_delta
    assert exact.kl < 1e-7 < stored.kl  # float32 rounding: 1e-8, by the number of threads
    assert exact.top1 == 1.0 >= stored.top1
    assert exact.same_answers == exact.answers > 0
    assert exact.accuracy == exact.live_accuracy
    assert json.loads((folder / "base16" / "fidelity.json").read_text())[0]["mean_delta"] == stored.mean_delta


def test_the_report_is_printed_with_one_sentence(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), "--output", str(tmp_path / "both"), "--into", "both"]) == 0
    said = capsys.readouterr().out
    assert "top-1 agreement" in said
    assert "Use " in said
    assert main(["merge", str(adapter), "--output", str(tmp_path / "quiet"), "--no-report"]) == 0
    assert "top-1" not in capsys.readouterr().out


def test_the_recommendation_follows_the_numbers():
    def one(into, accuracy, delta):
        return Fidelity(into, "bfloat16", 8, 100, delta, delta, 0.0, 1.0, 0.9, accuracy, 3, 3)

    exact = one("trained-base", 0.9, 0.001)
    assert recommend([one("base16", 0.9, 0.1), exact]).startswith("Use base16")
    assert recommend([one("base16", 0.8, 0.1), exact]).startswith("Use trained-base")
    assert "is not quite the live adapter" in recommend([one("base16", 0.8, 0.1)])


def test_an_adapter_without_pairs_needs_some_for_a_report(adapter, tmp_path):
    (adapter / "verify.json").unlink()
    folder = merge(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError, match="--pairs"):
        fidelity(adapter, {"base16": folder})


def test_a_plan_reads_no_weight_and_says_what_is_adapted(adapter):
    plan = plan_merge(adapter)
    assert plan.adapted("model.layers.0.mlp.down_proj.weight")
    assert not plan.adapted("model.norm.weight")
