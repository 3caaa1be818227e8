"""Mixing: exact where it claims to be, scored on each parent's pairs, refused where it would mislead."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_dpo.adapters.exchange import install
from lora_dpo.adapters.passport import read_passport
from lora_dpo.adapters.peft_files import read_adapter
from lora_dpo.adapters.stored_pairs import read_stored_pairs
from lora_dpo.cli.commands import main
from lora_dpo.errors import AdapterError, ConfigError, OutputError
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.release.mixture import METHODS, mix, parse_part


@pytest.fixture(scope="module")
def parents(make_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    return [
        make_adapter(folder / "brief", seed=1, rank=4, alpha=8),
        make_adapter(folder / "kind", seed=2, rank=2, alpha=8, rslora=True),
        make_adapter(folder / "third", seed=3, rank=4, alpha=4),
    ]


def updates(folder):
    """s·B·A of each layer."""
    config, tensors = read_adapter(folder)
    found = load_file(folder / "adapter_model.safetensors")
    return {
        module: config.scale_of(module, lora.rank) * found[lora.b.name] @ found[lora.a.name]
        for module, lora in tensors.lora.items()
    }


def test_cat_is_the_weighted_sum_of_the_updates(parents, tmp_path):
    done = mix([(parents[0], 0.6), (parents[1], 0.4)], tmp_path / "mixed", method="cat")
    assert done.rank == 6
    one, other, mixed = updates(parents[0]), updates(parents[1]), updates(done.folder)
    for module, update in mixed.items():
        assert torch.allclose(update, 0.6 * one[module] + 0.4 * other[module], atol=1e-5)


def test_svd_at_full_rank_is_the_same_sum_and_below_it_the_nearest(parents, tmp_path):
    parts = [(parents[0], 0.6), (parents[1], 0.4)]
    whole = updates(mix(parts, tmp_path / "whole", method="svd", rank=6).folder)
    low = updates(mix(parts, tmp_path / "low", method="svd", rank=2).folder)
    exact = updates(mix(parts, tmp_path / "exact", method="cat").folder)
    for module, update in exact.items():
        assert torch.allclose(whole[module], update, atol=1e-4)
        lost = torch.linalg.svdvals(update)[2:].square().sum().sqrt()  # Eckart and Young 1936
        assert torch.dist(low[module], update) == pytest.approx(float(lost), rel=1e-3)


def test_one_adapter_is_extracted_to_a_smaller_rank(parents, tmp_path):
    done = mix([(parents[0], 1.0)], tmp_path / "small", method="svd", rank=2)
    assert done.rank == 2
    whole, small = updates(parents[0]), updates(done.folder)
    for module, update in whole.items():
        lost = torch.linalg.svdvals(update)[2:].square().sum().sqrt()
        assert torch.dist(small[module], update) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
@pytest.mark.parametrize("parent", [0, 1], ids=["lora", "rslora"])
def test_one_adapter_is_scaled_by_its_weight(method, parent, parents, tmp_path):
    done = mix([(parents[parent], -0.5)], tmp_path / "mixed", method=method)
    whole, mixed = updates(parents[parent]), updates(done.folder)
    assert done.rank == read_adapter(parents[parent])[0].rank
    for module, update in whole.items():
        assert torch.allclose(mixed[module], -0.5 * update, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_an_adapter_that_plain_peft_loads(method, parents, tiny_model_folder, tmp_path):
    density = 0.5 if any(word in method for word in ("ties", "dare", "prune")) else None
    parts = [(parents[0], 0.5), (parents[2], 0.5)]
    done = mix(parts, tmp_path / "mixed", method=method, density=density)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), str(done.folder))
    assert verify(done.folder).ok  # the scores that it carries are those of what was written
    again = mix(parts, tmp_path / "again", method=method, density=density)
    one, other = (load_file(one.folder / "adapter_model.safetensors") for one in (done, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_is_scored_on_the_pairs_of_each_parent(parents, tmp_path):
    done = mix([(parents[0], 1.0), (parents[2], 0.0)], tmp_path / "mixed", method="cat", sweep=3)
    assert set(done.scores) == {"brief", "third"}
    for scores in done.scores.values():
        assert scores["mix"].margin == pytest.approx(scores["brief"].margin, abs=1e-4)  # the other has no weight
        assert scores["mix"].margin != pytest.approx(scores["third"].margin, abs=1e-2)
    assert list(done.sweep) == [0.0, 0.5, 1.0]
    for of, scores in done.scores.items():
        assert done.sweep[1.0][of].margin == pytest.approx(scores["brief"].margin, abs=1e-4)
        assert done.sweep[0.0][of].margin == pytest.approx(scores["third"].margin, abs=1e-4)
    assert (done.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert verify(done.folder).ok  # the sweep did not change what is written
    assert "| brief |" in (done.folder / "README.md").read_text()


def test_the_passport_names_parents_and_weights(parents, tmp_path):
    passport = read_passport(mix([(parents[0], 0.6), (parents[2], 0.4)], tmp_path / "mixed", method="linear").folder)
    assert [(part["adapter"], part["weight"]) for part in passport.recipe["mix"]["parts"]] == [
        ("brief", 0.6),
        ("third", 0.4),
    ]
    assert passport.recipe["mix"]["method"] == "linear"
    assert passport.base == read_passport(parents[0]).base


def test_what_does_not_go_together_is_refused(parents, make_adapter, tmp_path):
    two = [(parents[0], 0.5), (parents[1], 0.5)]
    dora, few = make_adapter(tmp_path / "dora", dora=True), make_adapter(tmp_path / "few", layers=[0])
    for error, reason, parts, options in (
        (ConfigError, "needs adapters of one rank", two, {"method": "linear"}),
        (ConfigError, "--rank has no effect", two, {"method": "cat", "rank": 4}),
        (ConfigError, "needs a --density", two, {"method": "ties_svd"}),
        (ConfigError, "--density has no effect", two, {"method": "svd", "density": 0.5}),
        (ConfigError, "Did you mean", two, {"method": "svdd"}),
        (ConfigError, "needs two adapters", two[:1], {"method": "cat", "sweep": 3}),
        (ConfigError, "needs two adapters or more", two[:1], {"method": "ties", "density": 0.5}),
        (ConfigError, "needs two adapters or more", two[:1], {"method": "magnitude_prune_svd", "density": 0.5}),
        (ConfigError, "A weight is nan", [(parents[0], float("nan"))], {"method": "cat"}),
        (ConfigError, "A weight is inf", [*two, (parents[2], float("inf"))], {"method": "cat"}),
        (ConfigError, "k_proj has at most 32. Give --rank 32", two, {"method": "svd", "rank": 33}),
        (AdapterError, "DoRA", [*two, (dora, 1.0)], {"method": "cat"}),
        (AdapterError, "different layers", [*two, (few, 1.0)], {"method": "cat"}),
    ):
        with pytest.raises(error, match=reason):
            mix(parts, tmp_path / "mixed", **options)
    assert not (tmp_path / "mixed").exists()
    with pytest.raises(OutputError, match="already exists"):
        mix(two, parents[0])


def test_adapters_of_different_bases_are_refused(parents, make_adapter, tiny_model_folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for path in tiny_model_folder.glob("*token*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other" / "chat_template.jinja").write_bytes((tiny_model_folder / "chat_template.jinja").read_bytes())
    stranger = make_adapter(tmp_path / "stranger", model=tmp_path / "other")
    with pytest.raises(AdapterError, match="was made for"):
        mix([(parents[0], 0.5), (stranger, 0.5)], tmp_path / "mixed")


def with_patterns(folder, base, **config):
    """An adapter by plain peft, with random values."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape) * 0.1
    model.save_pretrained(folder)
    return folder


def test_ranks_by_layer_are_mixed_where_that_is_right_and_refused_where_it_is_not(tiny_model_folder, tmp_path):
    config = dict(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    ranks = with_patterns(tmp_path / "ranks", tiny_model_folder, **config)
    model = {"model": str(tiny_model_folder)}
    parts = [(ranks, 0.5), (ranks, 0.25)]
    whole = updates(ranks)
    for method in ("cat", "svd"):
        mixed = updates(mix(parts, tmp_path / method, method=method, **model).folder)
        assert all(torch.allclose(mixed[module], 0.75 * update, atol=1e-4) for module, update in whole.items())
    for some, method in ((parts, "linear"), (parts[:1], "cat")):
        with pytest.raises(ConfigError, match="adapters of one rank, here are 2, 4"):
            mix(some, tmp_path / "mixed", method=method, **model)


def test_targets_by_name_and_by_pattern_are_mixed(tiny_model_folder, tmp_path):
    """A pattern means the modules that it matches."""
    names = with_patterns(tmp_path / "names", tiny_model_folder, r=4, target_modules=["q_proj"])
    pattern = with_patterns(tmp_path / "pattern", tiny_model_folder, r=4, target_modules=r".*\.q_proj")
    model = {"model": str(tiny_model_folder)}
    mixed = updates(mix([(names, 0.5), (pattern, 0.25)], tmp_path / "mixed", **model).folder)
    one, other = updates(names), updates(pattern)
    assert mixed.keys() == one.keys()
    assert all(torch.allclose(mixed[module], 0.5 * one[module] + 0.25 * other[module], atol=1e-5) for module in mixed)


def test_lora_on_the_head_is_mixed(tiny_model_folder, tmp_path):
    """peft stores a copy of the base's head beside it."""
    head = with_patterns(tmp_path / "head", tiny_model_folder, r=4, target_modules=["q_proj", "lm_head"])
    mixed = updates(mix([(head, 0.5), (head, 0.25)], tmp_path / "mixed", model=str(tiny_model_folder)).folder)
    for module, update in updates(head).items():
        assert torch.allclose(mixed[module], 0.75 * update, atol=1e-5)


def test_what_comes_out_is_what_install_takes(parents, tmp_path, monkeypatch):
    """Pairs of many parents are thinned to what a reader takes; what no reader takes is not written."""
    done = mix([(parents[0], 0.1)] * 9, tmp_path / "nine", method="cat")
    assert len(read_stored_pairs(done.folder).pairs) == 64
    install(done.folder, name="nine", root=tmp_path / "adapters")
    monkeypatch.setattr("lora_dpo.adapters.lora_config.MAX_RANK", 7)
    with pytest.raises(AdapterError, match="rank 8: allowed is 1 to 7") as error:
        mix([(parents[0], 0.5), (parents[2], 0.5)], tmp_path / "mixed", method="cat")
    assert "/." not in str(error.value)
    assert not list(tmp_path.glob("*mixed*"))


def test_parts_as_they_are_typed():
    assert parse_part("brief:0.6") == ("brief", 0.6)
    assert parse_part("brief") == ("brief", 1.0)
    assert parse_part("brief:-0.5") == ("brief", -0.5)
    with pytest.raises(ConfigError, match="not a number"):
        parse_part("brief:much")


def test_the_command_prints_tables(parents, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["adapters", "mix", f"{parents[0]}:0.5", f"{parents[2]}:0.5", "--sweep", "2", "--output", "both"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "on the held-out pairs of brief" in said
    assert "sweep.png" in said
    assert json.loads((tmp_path / "adapters" / "both" / "adapter_config.json").read_text())["r"] == 8
