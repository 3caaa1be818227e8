"""Mixing: exact where it claims to be, scored on each parent's pairs, refused where it would mislead."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_dpo.adapters import read_passport
from lora_dpo.cli import main
from lora_dpo.errors import AdapterError, ConfigError, OutputError
from lora_dpo.lora_files import read_adapter
from lora_dpo.mix import METHODS, mix, parse_part
from lora_dpo.verify import verify


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
