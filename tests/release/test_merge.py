import dataclasses
import errno
import fnmatch
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_dpo import merge
from lora_dpo.adapters.folder import attach_adapter, strictness
from lora_dpo.adapters.passport import read_passport, write_passport
from lora_dpo.adapters.stored_pairs import read_stored_pairs
from lora_dpo.cli.commands import main
from lora_dpo.config.reading import check_recipe
from lora_dpo.data.pairs import evenly_spaced
from lora_dpo.errors import AdapterError, BaseDiffers, ModelError, OutputError
from lora_dpo.model.base import load_base
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.merge_base import trained_into
from lora_dpo.release.merge_fidelity import Fidelity, fidelity, recommend, thinned
from lora_dpo.release.merged_folder import shard_files
from lora_dpo.release.merged_weights import merge_weight, plan_merge, predict_bytes
from lora_dpo.training.run import train

IDS = torch.tensor([[257, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def trained():
    """Folders of adapters, by their kind."""
    return {}


@pytest.fixture(
    params=[{}, {"rslora": True}, {"dora": True, "targets": ["q_proj", "down_proj"]}], ids=["lora", "rslora", "dora"]
)
def adapter(request, recipe_dict, tmp_path, monkeypatch, trained, tmp_path_factory):
    """An adapter of each kind in `adapters/tiny`: trained once, and copied for each test."""
    monkeypatch.chdir(tmp_path)
    kind = json.dumps(request.param)
    if kind not in trained:
        made = _trained(recipe_dict, request.param)
        trained[kind] = shutil.copytree(made, tmp_path_factory.mktemp("trained") / made.name)
    folder = Path("adapters/tiny")
    if not folder.exists():
        shutil.copytree(trained[kind], folder)
    return folder


def _trained(recipe_dict, lora):
    settings = recipe_dict(health={"action": "none"})  # at this rate a tiny model goes bad, which is no matter here
    settings["lora"] = {"rank": 4, **lora}
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


def test_without_a_word_it_is_merged_into_what_it_was_trained_on(adapter, tiny_model_folder, tmp_path):
    merged = logits(AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "merged", dtype="float32")))
    base = load_base(str(tiny_model_folder), quantize="nf4", packed=False)  # as in training
    assert torch.allclose(merged, logits(attach_adapter(base, adapter)), atol=2e-5)


def test_it_is_said_what_it_was_merged_into_and_why(adapter, tmp_path, capsys):
    def said(*more):
        name = f"merged-{len(list(tmp_path.glob('merged-*')))}"
        assert main(["merge", str(adapter), "--output", str(tmp_path / name), "--no-report", *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    passport = read_passport(adapter)
    assert "into trained-base, which it was trained on: the NF4 values that 4-bit training" in said()
    assert said("--into", "base16").endswith("into base16: the weights as they are stored")
    write_passport(adapter, dataclasses.replace(passport, quantize="none"))
    assert said().endswith("into base16, which it was trained on: the weights as they are stored")
    (adapter / "passport.json").unlink()
    assert said("--model", passport.base).endswith("stored; nothing says what it was trained on")


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


@pytest.fixture(params=["auto", False], ids=["as peft saves", "without copies"])
def foreign(request, tiny_model_folder, tmp_path):
    """An adapter made with plain peft, on the tiny model with or without tied embeddings.

    By default peft stores the base's embedding and head as well, if LoRA is on them.
    """

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
        model.save_pretrained(tmp_path / "foreign", save_embedding_layers=request.param)
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


def test_a_changed_copy_of_the_head_counts_in_the_merge_as_it_does_live(tiny_model_folder, tmp_path):
    """peft puts the copies that an adapter carries in the base's place."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    model.save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "adapter_model.safetensors"
    found = load_file(path)
    found["base_model.model.lm_head.base_layer.weight"] *= 1.5
    save_file(found, path)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), str(tmp_path / "foreign"))
    merged = merge(tmp_path / "foreign", tmp_path / "merged", dtype="float32", model=str(tiny_model_folder))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(live), atol=2e-4)
    found["base_model.model.lm_head.base_layer.weight"] = found["base_model.model.lm_head.base_layer.weight"][
        :-1
    ].clone()
    save_file(found, path)
    with pytest.raises(AdapterError, match=r"the copy of lm_head\.weight is"):
        merge(tmp_path / "foreign", tmp_path / "second", model=str(tiny_model_folder))


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
    with pytest.raises(ModelError, match=r"stored quantised \(FP4\), and .* was trained on weights NF4"):
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


# --- where the base comes from -----------------------------------------------------------------


@pytest.fixture
def hub(tiny_model_folder, tmp_path, monkeypatch):
    """A hub that has the tiny model as `me/base`, and copies into a cache what it is asked for."""
    there, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(tiny_model_folder, there)

    def snapshot_download(repo, *, revision, allow_patterns, library_name):
        if repo != "me/base":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository, or no network")
        cache.mkdir(exist_ok=True)
        for path in there.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, cache / path.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return there


def test_a_hub_base_is_downloaded_with_its_weights_and_tokenizer(adapter, hub, tmp_path):
    (hub / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (hub / "pytorch_model.bin").write_bytes(b"a pickle")
    merged = merge(adapter, tmp_path / "merged", model="me/base", dtype="float32")
    local = merge(adapter, tmp_path / "local", dtype="float32")
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (merged, local)))
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & {
        path.name for path in (tmp_path / "cache").iterdir()
    }
    with pytest.raises(ModelError, match="did not serve me/nothing"):
        merge(adapter, tmp_path / "other", model="me/nothing")


def test_a_base_that_is_not_whole_is_said(adapter, hub, tiny_model_folder, tmp_path):
    (hub / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors files"):
        merge(adapter, tmp_path / "merged", model="me/base")
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    last = sorted((tmp_path / "shards").glob("*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-10])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        merge(adapter, tmp_path / "merged", model=str(tmp_path / "shards"))
    last.unlink()
    with pytest.raises(ModelError, match=f"files of weights are missing .{last.name}"):
        merge(adapter, tmp_path / "merged", model=str(tmp_path / "shards"))
    assert not (tmp_path / "merged").exists()


def test_another_quantisation_tokenizer_or_template_warns_and_strict_refuses(adapter, tiny_model_folder, tmp_path):
    with pytest.warns(BaseDiffers, match="quantised as nf4, here they are none"):
        merge(adapter, tmp_path / "stored", into="base16")
    with strictness(True):
        merge(adapter, tmp_path / "both", into="both")  # to compare is what was asked
        with pytest.raises(BaseDiffers, match="quantised as nf4"):
            merge(adapter, tmp_path / "merged", into="base16")
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    with pytest.warns(BaseDiffers, match="chat template is another one"):
        merge(adapter, tmp_path / "templates", into="trained-base", model=str(other))
    passport = read_passport(adapter)
    write_passport(adapter, dataclasses.replace(passport, tokenizer_sha256="0" * 64))
    with strictness(True), pytest.raises(BaseDiffers, match="another vocabulary"):
        merge(adapter, tmp_path / "merged", into="trained-base")
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
    def one(into, accuracy, delta, top1=1.0, **more):
        return Fidelity(into, "bfloat16", 8, 100, delta, delta, 0.0, top1, 0.9, accuracy, 3, 3, **more)

    exact = one("trained-base", 0.9, 0.001)
    assert recommend([one("base16", 0.9, 0.1), exact]).startswith("Use base16")
    assert recommend([one("base16", 0.8, 0.1), exact]).startswith("Use trained-base")
    # eight pairs ranked as before are not the same model
    assert "same next token at 70%" in recommend([one("base16", 1.0, 0.05, 0.7), exact])
    assert recommend([one("base16", 1.0, 0.59), exact]).startswith("Use trained-base")
    assert "is not quite the live adapter" in recommend([one("base16", 0.8, 0.1)])
    assert "--into both" in recommend([exact])
    assert "--into both" not in recommend([one("base16", 0.9, 0.02, quantize="none")])  # there is no other base


def test_pairs_are_read_before_the_merge(adapter, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    command = ["merge", str(adapter), "--output", str(tmp_path / "merged"), "--pairs", str(tmp_path / "bad.jsonl")]
    assert main(command) == 1
    assert "bad.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_pairs_that_would_fill_the_disk_are_thinned_evenly(adapter, tmp_path, monkeypatch):
    pairs = read_stored_pairs(adapter).pairs
    assert thinned(pairs, 259) == pairs
    size = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) * 259 * 4
    monkeypatch.setattr(sys.modules["lora_dpo.release.merge_fidelity"], "MAX_STORED", size // 2)
    assert thinned(pairs, 259) == [pairs[index] for index in evenly_spaced(len(pairs), len(pairs) // 2)]
    [found] = fidelity(adapter, {"base16": merge(adapter, tmp_path / "merged", into="base16")})
    assert (found.pairs, found.given) == (len(pairs) // 2, len(pairs))


def test_a_full_disk_under_the_report_is_said(adapter, tmp_path, monkeypatch):
    folder = merge(adapter, tmp_path / "merged", into="base16")

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        fidelity(adapter, {"base16": folder})


def test_what_the_report_stores_waits_beside_the_merged_model(adapter, tmp_path, monkeypatch):
    folder = merge(adapter, tmp_path / "deep" / "merged", into="base16")
    places, real = [], Path.write_bytes

    def noted(self, content):
        places.append(self.parent)
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", noted)
    fidelity(adapter, {"base16": folder})
    # the system's place for temporary files is memory on many machines
    assert {place.parent for place in places} == {folder.parent}
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]


def test_an_adapter_without_pairs_needs_some_for_a_report(adapter, tmp_path):
    (adapter / "verify.json").unlink()
    folder = merge(adapter, tmp_path / "merged", into="base16")
    with pytest.raises(AdapterError, match="--pairs"):
        fidelity(adapter, {"base16": folder})


def test_a_plan_reads_no_weight_and_says_what_is_adapted(adapter):
    plan = plan_merge(adapter)
    assert plan.adapted("model.layers.0.mlp.down_proj.weight")
    assert not plan.adapted("model.norm.weight")


@pytest.mark.parametrize("text", ["{", "[1]", '{"quantization_config": 4}'])
def test_a_bad_config_of_a_base_is_one_sentence(tiny_adapter, tiny_model_folder, tmp_path, text):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    (base / "config.json").write_text(text)
    for work in (
        lambda: trained_into(tiny_adapter, str(base)),
        lambda: merge(tiny_adapter, tmp_path / "out", model=str(base)),
        lambda: export(tiny_adapter, tmp_path / "out.gguf", to="gguf", model=str(base)),
    ):
        with pytest.raises(ModelError, match=r"config\.json"):
            work()


def test_a_fault_of_our_own_is_not_told_as_one_of_the_files(tiny_adapter, tmp_path, monkeypatch):
    def faulty(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr("lora_dpo.release.merged_weights.orientations", faulty)
    with pytest.raises(KeyError, match="ours"):
        merge(tiny_adapter, tmp_path / "out")
