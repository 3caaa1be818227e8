"""The passport is enforced wherever an adapter is loaded, and `lora-dpo adapters` says what there is."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from bounded import ends_well, within
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_dpo.adapters.describe import describe, diff
from lora_dpo.adapters.folder import attach_adapter, put_beside, strictness
from lora_dpo.adapters.loading import attach_reference, load_policy
from lora_dpo.adapters.passport import read_passport, write_passport
from lora_dpo.adapters.store import find_adapter, list_adapters, record_verified, rename
from lora_dpo.cli.commands import main
from lora_dpo.errors import AdapterError, BaseDiffers, OutputError, PackageError
from lora_dpo.evaluation.verify_adapter import verify
from lora_dpo.files import sha256_of
from lora_dpo.model.base import load_base
from lora_dpo.model.identity import weight_fingerprint
from lora_dpo.release.merged_folder import merge
from lora_dpo.serving.chat import open_chat

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def place(tiny_model_folder, make_adapter, tmp_path, monkeypatch):
    """A user's folder: the tiny model under a public name, and an adapter of it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "models" / "smollm2-135m")
    make_adapter(tmp_path / "adapters" / "mine", model=Path("smollm2-135m"))
    return tmp_path


def scale_weights(folder, factor=1.02):
    path = folder / "model.safetensors"
    found = {name: tensor * factor if "up_proj" in name else tensor for name, tensor in load_file(path).items()}
    save_file(found, path, metadata={"format": "pt"})


def scale_adapter(adapter, factor=2):
    save_file({name: value * factor for name, value in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)


def loaders(adapter):
    """Every way onto a base that a user has, but training (in test_train)."""
    return {
        "chat": lambda: open_chat(adapter),
        "merge": lambda: merge(adapter, adapter.parent.parent / "merged", dtype="float32"),
        "verify": lambda: verify(adapter),
    }


def test_a_good_adapter_loads_without_a_word_also_in_strict(place):
    with warnings.catch_warnings(), strictness(True):
        warnings.simplefilter("error", BaseDiffers)
        for load in loaders(place / "adapters" / "mine").values():
            load()


@pytest.mark.parametrize("way", ["chat", "merge", "verify"])
def test_another_revision_warns_and_strict_refuses(way, place):
    scale_weights(place / "models" / "smollm2-135m")
    load = loaders(place / "adapters" / "mine")[way]
    with pytest.warns(BaseDiffers, match="another revision's"):
        load()
    shutil.rmtree(place / "merged", ignore_errors=True)
    with strictness(True), pytest.raises(BaseDiffers, match="another revision's"):
        load()
    assert not (place / "merged").exists()


@pytest.mark.parametrize("way", ["chat", "merge", "verify"])
def test_another_base_is_refused_with_both_names(way, place, tiny_model_folder):
    adapter = place / "adapters" / "mine"
    passport = read_passport(adapter)
    write_passport(adapter, replace(passport, base="someone/other", base_fingerprint="f" * 32))
    shutil.copytree(tiny_model_folder, place / "elsewhere")
    ways = {
        "chat": lambda: open_chat(adapter, model="elsewhere"),
        "merge": lambda: merge(adapter, place / "merged", model="./elsewhere"),
        "verify": lambda: verify(adapter, model="./elsewhere"),
    }
    if way == "chat":
        ways["chat"] = lambda: open_chat(adapter, model="./elsewhere")
    with pytest.raises(AdapterError, match="was made for") as error:
        ways[way]()
    assert "someone/other" in str(error.value)
    assert "elsewhere" in str(error.value)


def test_another_quantisation_tokenizer_or_template_warns_with_what_differs(place):
    adapter = place / "adapters" / "mine"
    with pytest.warns(BaseDiffers, match="quantised as none, here they are nf4"):
        open_chat(adapter, quantize="nf4")
    template = place / "models" / "smollm2-135m" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    with pytest.warns(BaseDiffers, match="chat template is another one"):
        open_chat(adapter)
    passport = read_passport(adapter)
    write_passport(adapter, replace(passport, tokenizer_sha256="0" * 64))
    with pytest.warns(BaseDiffers, match="another vocabulary; the chat template"):
        open_chat(adapter)


def test_the_command_line_warns_in_one_line_and_strict_exits_1(place, capsys):
    scale_weights(place / "models" / "smollm2-135m")
    command = ["chat", "adapters/mine", "--prompt", "Hi", "--max-new-tokens", "2"]
    assert main(command) == 0
    said = capsys.readouterr().err.strip()
    assert said.startswith("warning:")
    assert said.count("\n") == 0
    assert main([*command, "--strict"]) == 1
    assert capsys.readouterr().err.startswith("error:")


def test_continuing_training_checks_the_passport_too(place, recipe_dict):
    from lora_dpo.config.reading import check_recipe
    from lora_dpo.training.run import train

    scale_weights(place / "models" / "smollm2-135m")
    settings = recipe_dict(model={"name": "smollm2-135m"}, reference="adapter:adapters/mine")
    with strictness(True), pytest.raises(BaseDiffers, match="another revision's"):
        train(check_recipe(settings), name="second")


def test_plain_peft_folders_load_as_unverified_after_their_shapes_were_checked(place, capsys):
    adapter = place / "adapters" / "mine"
    (adapter / "passport.json").unlink()
    with pytest.warns(BaseDiffers, match="no passport, so it is unverified.*quantised as nf4, as they are held here"):
        open_chat(adapter, model="smollm2-135m")
    with pytest.warns(BaseDiffers, match="says that it was made for it.$"):
        open_chat(adapter, model="smollm2-135m", quantize="none")
    command = ["chat", "adapters/mine", "--model", "smollm2-135m", "--prompt", "Hi", "--max-new-tokens", "1"]
    assert main([*command, "--quantize", "none"]) == 0
    assert "quantised as nf4" not in capsys.readouterr().err
    assert main([*command, "--quantize", "int8"]) == 1
    with strictness(True), pytest.raises(BaseDiffers, match="unverified"):
        open_chat(adapter, model="smollm2-135m")
    tensors = load_file(adapter / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(4, 7)}, adapter / WEIGHTS)
    with pytest.raises(AdapterError, match=r"size mismatch in model\.layers\.0"):
        open_chat(adapter, model="smollm2-135m")


def test_targets_and_tensors_that_disagree_are_refused(place):
    """peft itself ignores tensors that its config does not name, and starts those that are missing at random."""
    adapter = place / "adapters" / "mine"
    (adapter / "passport.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    base = load_base("smollm2-135m", quantize="none")
    with pytest.warns(BaseDiffers), pytest.raises(AdapterError, match="is in the file and not on the model"):
        attach_adapter(base, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    kept = {name: value for name, value in load_file(adapter / WEIGHTS).items() if "q_proj" not in name}
    save_file(kept, adapter / WEIGHTS)
    base = load_base("smollm2-135m", quantize="none")
    with pytest.warns(BaseDiffers), pytest.raises(AdapterError, match="is missing in the file"):
        attach_adapter(base, adapter)


def test_weights_that_are_not_the_passports_are_refused(place):
    adapter = place / "adapters" / "mine"
    save_file({name: value * 2 for name, value in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    for load in loaders(adapter).values():
        with pytest.raises(AdapterError, match="not those of its passport"):
            load()


def test_the_passport_records_what_an_adapter_was_made_from(place):
    passport = read_passport(place / "adapters" / "mine")
    recorded = asdict(passport)
    assert passport.base == "smollm2-135m"
    for field in ("base_fingerprint", "tokenizer_sha256", "chat_template_sha256", "adapter_sha256", "versions", "data"):
        assert recorded[field], field


def test_the_passport_records_the_weights_of_a_reference_adapter(place, recipe_dict):
    from lora_dpo.config.reading import check_recipe
    from lora_dpo.training.run import train

    settings = recipe_dict(model={"name": "smollm2-135m"}, reference="adapter:adapters/mine")
    second = train(check_recipe(settings), name="second").folder
    assert read_passport(second).reference_sha256 == read_passport(place / "adapters" / "mine").adapter_sha256
    assert read_passport(place / "adapters" / "mine").reference_sha256 is None
    attach_reference(load_policy(adapter=second))
    one = place / "adapters" / "mine"
    save_file({name: value * 2 for name, value in load_file(one / WEIGHTS).items()}, one / WEIGHTS)
    with pytest.raises(AdapterError, match="not those of its passport"):
        attach_reference(load_policy(adapter=second))
    write_passport(one, read_passport(one))
    with pytest.warns(BaseDiffers, match="trained against other weights than adapters/mine holds now"):
        attach_reference(load_policy(adapter=second))


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


def test_the_usual_patterns_of_other_trainers_are_accepted(place):
    adapter = place / "adapters" / "mine"
    config = json.loads((adapter / "adapter_config.json").read_text())
    patterns = (
        {"target_modules": UNSLOTH},
        {"exclude_modules": r"^(?!.*layers).*vision.*"},
        {"layers_pattern": "layers", "layers_to_transform": [0, 1]},
    )
    for pattern in patterns:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **pattern}))
        open_chat(adapter)


def edited(adapter, **changes):
    """The adapter's config with other fields, and no passport that knows better."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (adapter / "passport.json").unlink(missing_ok=True)
    return adapter


LONG = {f"another.{number}": 4 for number in range(19_000)}


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {".*a.*a.*a.*a.*a.*a.*a.*Z": 2}},
        {"rank_pattern": {**LONG, "q_proj": 4}, "alpha_pattern": LONG},
        {"alpha_pattern": {**LONG, r"layers\.\d+\.mlp\..*": 8}},
        {"target_modules": [*LONG, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        {"target_modules": "all-linear", "layers_to_transform": None},
        {"target_modules": r".*(self_attn|mlp).*\.[a-z]+_proj"},
        {"modules_to_save": list(LONG)},
        {
            "exclude_modules": [*LONG, ".*a.*a.*a.*a.*Z"],
            "layers_pattern": list(LONG)[:9],
            "layers_to_transform": [0, 1],
        },
        {
            "rank_pattern": None,
            "alpha_pattern": None,
            "bias": None,
            "loftq_config": {},
            "peft_version": "9",
            "new": [1],
        },
    ],
)
def test_odd_configs_that_mean_the_same_adapter_load_as_it_in_time(place, fields):
    wanted = open_chat(place / "adapters" / "mine", quantize="none").model
    adapter = edited(place / "adapters" / "mine", **fields)
    if "layers_pattern" in fields:
        edited(adapter, layers_pattern=[*fields["layers_pattern"], "layers"])
    with within(4), pytest.warns(BaseDiffers, match="no passport"):
        chat = open_chat(adapter, quantize="none")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(chat.model(ids).logits, wanted(ids).logits)


def test_ranks_and_alphas_by_pattern_are_those_that_peft_gives(place, tiny_model_folder, tmp_path):
    """Also beside an adapter that is on the model already; plain peft reads the patterns itself."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up|down)_proj",
        rank_pattern={r"layers\.1\..*": 2, "q_proj": 3, "mlp.up_proj": 5},
        alpha_pattern={r".*\.0\.mlp.*": 3, "down_proj": 7.5},
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "patterns")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        base = load_base(str(tiny_model_folder), quantize="none")
        with pytest.warns(BaseDiffers):
            live = attach_adapter(base, tmp_path / "patterns")
        assert torch.equal(live(ids).logits, wanted)
        other = attach_adapter(load_base("smollm2-135m", quantize="none"), place / "adapters" / "mine")
        put_beside(other, tmp_path / "patterns", name="second", base="it")
        other.set_adapter("second")
        assert torch.equal(other(ids).logits, wanted)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layers_pattern": "layers", "layers_to_transform": [0], "target_modules": ".*q_proj"}, "beside a pattern"),
        ({"target_modules": "nothing"}, "does not fit"),
        ({"target_modules": None}, "does not fit"),
        ({"task_type": "POETRY"}, "does not fit"),
        ({"r": 3}, "rank 4, but its config says 3"),
        (
            {"alpha_pattern": {f"self_attn|m{n}": n / 7 for n in range(60)} | {"mlp": float("nan")}},
            "not a finite number",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_sentence(place, fields, reason):
    adapter = edited(place / "adapters" / "mine", **fields)
    with ends_well(4) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseDiffers)
        open_chat(adapter, quantize="none")
    assert reason in str(said[0])


def test_passports_of_before_are_read(place):
    adapter = place / "adapters" / "mine"
    old = json.loads((adapter / "passport.json").read_text())
    for field in ("adapter_sha256", "recipe", "base_licence", "reference_sha256"):
        del old[field]
    (adapter / "passport.json").write_text(json.dumps({**old, "format": 1}))
    assert read_passport(adapter).adapter_sha256 is None


# --- the fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_weights_not_of_their_files(tiny_model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[64, :8] *= 1e-5  # below what fp16 can hold exactly
    model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.float().save_pretrained(tmp_path / "float32")
    model.half().save_pretrained(tmp_path / "float16")
    prints = {path.name: weight_fingerprint(str(path)) for path in tmp_path.iterdir()}
    assert len(set(prints.values())) == 1, prints


def test_the_fingerprint_ignores_a_tied_head_that_is_stored(tiny_model_folder, tmp_path):
    for tied in (True, False):
        folder = tmp_path / str(tied)
        shutil.copytree(tiny_model_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        if tied:
            found = load_file(folder / "model.safetensors")
            del found["lm_head.weight"]
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    assert weight_fingerprint(str(tmp_path / "True")) == weight_fingerprint(str(tmp_path / "False"))


# --- verify ---------------------------------------------------------------------------------------


def test_verify_rescores_what_the_adapter_carries(place, capsys):
    found = verify(place / "adapters" / "mine")
    assert found.ok
    assert found.adapter_drift < 1e-5 < found.effect
    assert found.base_drift < 1e-5
    assert main(["adapters", "verify", "mine"]) == 0
    assert "verified" in capsys.readouterr().out
    [row] = list_adapters(place / "adapters")
    assert row.state.startswith("verified 20")


def test_an_adapter_that_was_trained_against_another_verifies_where_that_one_is_not(place, recipe_dict):
    from lora_dpo.config.reading import check_recipe
    from lora_dpo.training.run import train

    settings = recipe_dict(model={"name": "smollm2-135m"}, reference="adapter:adapters/mine")
    second = train(check_recipe(settings), name="second").folder
    shutil.rmtree(place / "adapters" / "mine")
    found = verify(second)
    assert found.ok
    assert found.base_drift < 1e-5
    assert found.accuracy == found.stored_accuracy


def test_verify_says_whether_base_or_adapter_changed(place, capsys):
    adapter = place / "adapters" / "mine"
    scale_weights(place / "models" / "smollm2-135m", 1.5)
    with pytest.warns(BaseDiffers):
        found = verify(adapter)
    assert not found.ok
    assert "The base alone already scores otherwise" in found.reason
    assert main(["adapters", "verify", "mine"]) == 1
    assert "not verified" in capsys.readouterr().err


def test_verify_notices_other_weights_under_a_passport_made_for_them(place):
    adapter = place / "adapters" / "mine"
    save_file({name: value * 1.3 for name, value in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    write_passport(adapter, read_passport(adapter))  # someone re-signs it
    found = verify(adapter)
    assert not found.ok
    assert "the adapter does not" in found.reason


def test_a_verified_adapter_that_changes_is_no_longer_verified(place):
    assert main(["adapters", "verify", "mine"]) == 0
    adapter = place / "adapters" / "mine"
    save_file({name: value * 2 for name, value in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    write_passport(adapter, read_passport(adapter))
    assert [row.state for row in list_adapters(place / "adapters")] == ["not yet verified"]


def test_without_stored_pairs_there_is_nothing_to_verify(place):
    (place / "adapters" / "mine" / "verify.json").unlink()
    with pytest.raises(AdapterError, match="stays unverified"):
        verify(place / "adapters" / "mine")


# --- list, show, diff -----------------------------------------------------------------------------


def test_list_shows_each_adapter_and_what_is_broken(place, capsys):
    shutil.copytree(place / "adapters" / "mine", place / "adapters" / "broken")
    (place / "adapters" / "broken" / "passport.json").write_text("{")
    rows = {row.name: row for row in list_adapters(place / "adapters")}
    assert (rows["mine"].rank, rows["mine"].accuracy, rows["mine"].created) == (4, 0.75, "2026-01-02")
    assert rows["broken"].state.startswith("broken:")
    assert main(["adapters", "list"]) == 0
    said = capsys.readouterr().out
    assert "smollm2-135m" in said
    assert "broken" in said


def test_an_adapter_with_the_name_of_the_model_alone_says_why_nobody_serves_it(place, capsys):
    shutil.copytree(place / "adapters" / "mine", place / "adapters" / "base")
    record_verified(place / "adapters" / "base", place / "adapters")
    [base, mine] = list_adapters(place / "adapters")
    assert base.state.startswith("not served: that is the name of the model without an adapter")
    assert mine.state == "not yet verified"
    assert main(["adapters", "list"]) == 0
    assert "Rename the folder" in " ".join(capsys.readouterr().out.split())


def test_weights_are_hashed_again_only_where_they_changed(place, monkeypatch):
    root = place / "adapters"
    record_verified(root / "mine", root)
    hashed = []
    monkeypatch.setattr("lora_dpo.adapters.adapter.sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    for _ in range(3):
        assert [row.state[:8] for row in list_adapters(root)] == ["verified"]
    assert len(hashed) == 1
    scale_adapter(root / "mine")
    for _ in range(2):
        assert [row.state[:6] for row in list_adapters(root)] == ["broken"]  # not the weights of its passport
    assert len(hashed) == 2


@pytest.mark.parametrize(
    "metrics",
    [
        {"after": {"pairs": []}},
        {"after": []},
        {"after": {"pairs": {"accuracy": 10**400}, "answers": "many"}},
        {"after": {"pairs": {"accuracy": float("nan")}}},
    ],
)
def test_odd_metrics_in_a_passport_stop_no_table(place, metrics):
    adapter = place / "adapters" / "mine"
    write_passport(adapter, replace(read_passport(adapter), metrics=metrics))
    [row] = list_adapters(place / "adapters")
    assert row.accuracy is None
    describe(adapter)
    diff(adapter, adapter)


def test_measured_numbers_are_told_in_words_with_what_they_were_before(place):
    adapter = place / "adapters" / "mine"
    numbers = {"pairs": 61, "accuracy": 0.9508, "margin": 1.198, "chosen_logratio": 2.64, "new": 0.12345678}
    answers = {"mean_tokens": 37.49, "finished": 0.9245, "questions": 0, "correct": None}
    before = {"pairs": {"pairs": 61, "accuracy": 0.5, "margin": 0.0}, "answers": {"mean_tokens": 109.28}}
    metrics = {"before": before, "after": {"pairs": numbers, "answers": answers}}
    write_passport(adapter, replace(read_passport(adapter), metrics=metrics))
    assert describe(adapter)[-7:] == [
        ("held-out pairs", "61"),
        ("held-out accuracy", "0.95 (before: 0.50)"),
        ("held-out reward margin", "1.20 (before: 0.00)"),
        ("log-ratio of the chosen answers", "+2.6 nats"),
        ("pairs.new, after training", "0.1235"),
        ("length of these answers", "37 tokens (before: 109 tokens)"),
        ("answers that end by themselves", "92%"),
    ]


def test_an_adapter_gets_another_name_and_stays_verified(place):
    root = place / "adapters"
    record_verified(root / "mine", root)
    assert rename("mine", "brief", root) == root / "brief"
    [row] = list_adapters(root)
    assert (row.name, row.state[:8]) == ("brief", "verified")


@pytest.mark.parametrize(
    ("name", "new", "error", "said"),
    [
        ("mine", "../mine", PackageError, "is no name for an adapter"),
        ("mine", "base", PackageError, "cannot be called base"),
        ("mine", "taken", OutputError, "already"),
        ("mine", "going", OutputError, "already"),
        ("none", "other", AdapterError, "There is no adapter none"),
        ("adapters/mine", "other", None, ""),
    ],
)
def test_a_name_that_is_taken_or_none_is_refused(place, name, new, error, said):
    root = place / "adapters"
    shutil.copytree(root / "mine", root / "taken")
    (root / "going.partial").mkdir()
    if error is None:
        assert rename(name, new, root).resolve() == root / "other"
        return
    with pytest.raises(error, match=said):
        rename(name, new, root)
    assert [row.name for row in list_adapters(root)] == ["mine", "taken"]


def test_an_empty_place_says_how_to_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["adapters", "list"]) == 0
    assert "lora-dpo train" in capsys.readouterr().out


def test_show_and_diff(place, make_adapter, capsys):
    make_adapter(place / "adapters" / "other", model=Path("smollm2-135m"), rank=2)
    rows = dict(describe(find_adapter("mine")))
    assert rows["base"] == "smollm2-135m"
    assert "rank 4, alpha 8, 14 layers" in rows["kind"]
    assert main(["adapters", "show", "mine"]) == 0
    assert "fingerprint" in capsys.readouterr().out
    assert ("rank", "4", "2") in diff(find_adapter("mine"), find_adapter("other"))
    assert main(["adapters", "diff", "mine", "mine"]) == 0
    assert "differ in no setting" in capsys.readouterr().out


def test_a_mistyped_name_gets_a_hint(place):
    with pytest.raises(AdapterError, match="Did you mean mine"):
        find_adapter("mone")
