"""Bases as they come: what a checkpoint is stored as is read, said, loaded, trained on, and known again."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import BITSANDBYTES, bfloat16, bitsandbytes, copies_of, marked

from lora_dpo.config.recipe import LoraSection, ModelSection
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.model.base import held_by, load_base
from lora_dpo.model.lora import attach_lora
from lora_dpo.model.origin import from_text, is_another_form, origin_sample, same_origin, to_text
from lora_dpo.model.quantised import kept_share, quantised_layers, stored_value
from lora_dpo.model.stored_form import check_library, form_of, held_as, held_text
from lora_dpo.model.tensor_file import open_tensors

IDS = torch.tensor([[257, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="session")
def original(tiny_model_folder, tmp_path_factory):
    """The tiny model in bfloat16."""
    return bfloat16(tiny_model_folder, tmp_path_factory.mktemp("stored") / "original")


@pytest.fixture(scope="session")
def stored(original):
    """Copies of it by kind, each made once."""

    return copies_of(original)


def logits(model):
    model.train()  # bitsandbytes has another kernel in eval mode
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    model.eval()
    return found


HELD = [
    ("nf4", "nf4, stored"), ("nf4-double", "nf4, stored"), ("nf4-bf16", "nf4, stored"), ("nf4-kept", "nf4, stored"),
    ("fp4", "fp4, stored"), ("int8", "int8, stored"), ("fp8", "fp8, stored"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "held"), HELD)
@pytest.mark.parametrize("quantize", ["auto", "none"])
def test_a_stored_base_is_loaded_by_default_and_called_what_it_is(stored, original, kind, held, quantize):
    base = load_base(str(stored(kind)), quantize=quantize)
    assert (base.quantize, base.packed, base.dtype) == (held, False, "float32")
    assert {weight.dtype for weight in base.model.parameters()} == {torch.float32}
    assert not hasattr(base.model.config, "quantization_config")
    there = load_base(str(original), quantize="none").model
    layers = dict(base.model.named_modules())
    for name, part in quantised_layers(there).items():
        apart = (layers[name].weight - part.weight).norm() / part.weight.norm()
        kept = kind == "nf4-kept" and name.endswith("down_proj")
        rounding = {"int8": 0.01, "fp8": 0.03, "fp4": 0.15}.get(kind, 0.1)
        assert apart == 0 if kept else rounding / 3 < apart < rounding, name
    assert torch.equal(base.model.lm_head.weight, there.lm_head.weight)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "nf4-bf16", "fp4"])
def test_packed_weights_and_their_values_are_one_function_with_one_gradient(stored, kind):
    found = []
    for packed in (True, False):
        base = load_base(str(stored(kind)), packed=packed)
        assert base.packed is packed
        model = attach_lora(base.model, LoraSection(rank=2), seed=0)
        logits(model)
        model.eval()(input_ids=IDS)  # where bitsandbytes would repack, and lose the gradient
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.1)
        scores = model.train()(input_ids=IDS, labels=IDS)
        scores.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        found.append((scores.logits.detach(), gradients))
    (one, ours), (other, theirs) = found
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert len(ours) == len(theirs) == 2 * 14
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-4 * largest), name


def test_nf4_that_is_stored_is_the_nf4_that_is_made(stored, original):
    made, found = load_base(str(original), quantize="nf4").model, load_base(str(stored("nf4-double"))).model
    for name, part in quantised_layers(made).items():
        assert torch.equal(found.get_parameter(f"{name}.weight"), part.weight), name


def test_what_was_asked_for_is_given_or_refused(stored):
    assert load_base(str(stored("nf4")), quantize="nf4").quantize == "nf4, stored"
    with pytest.raises(
        ModelError, match=r"stored quantised \(FP4\), so quantize: nf4 cannot be made of it\. Set .*auto"
    ):
        load_base(str(stored("fp4")), quantize="nf4")
    with pytest.raises(ConfigError, match="stored as FP8 are always dequantised"):
        load_base(str(stored("fp8")), packed=True)
    assert held_by(ModelSection(name=str(stored("int8")))) == ("int8, stored", held_by(_section(stored("int8")))[1])


def _section(folder):
    return ModelSection(name=str(folder), quantize="none")


@pytest.mark.parametrize(
    ("how", "kind", "double"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4", True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4", False),  # its own default
        ({"quant_method": "BITSANDBYTES", "_load_in_8bit": True}, "int8", False),
        ({"quant_method": "gptq", "bits": 4}, "gptq", False),
        ({"quant_method": "mxfp4"}, "mxfp4", False),
    ],
)
def test_a_form_is_read_of_its_config(how, kind, double):
    for config in ({"quantization_config": how}, {"text_config": {"quantization_config": how}}):
        form = form_of(config, "m")
        assert (form.kind, form.double) == (kind, double)
        assert held_as(form, "none", "m") == f"{kind}, stored"  # a 4-bit base is never none
    assert form_of({"quantization_config": None}, "m") is None
    with pytest.raises(ModelError, match="quantization_config that is 4, no settings"):
        form_of({"quantization_config": 4}, "m")


@pytest.mark.parametrize(
    ("method", "packages"),
    [("gptq", "gptqmodel and optimum"), ("awq", "gptqmodel"), ("hqq", "hqq"), ("compressed-tensors", None)],
)
def test_a_library_that_is_missing_is_named_before_any_weight_is_read(original, tmp_path, loads, method, packages):
    base = marked(original, {"quant_method": method, "bits": 4}, tmp_path / "base")
    said = rf"stored quantised by {method}, which is loaded with {packages or method}: not installed"
    with pytest.raises(ModelError, match=said):
        load_base(str(base))
    assert loads == []


@pytest.fixture
def optimum(tmp_path, monkeypatch):
    """A package of that name without quanto in it."""
    folder = tmp_path / "optimum"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    sys.modules.pop("optimum", None)


def test_optimum_alone_does_not_load_quanto(optimum):
    form = form_of({"quantization_config": {"quant_method": "quanto"}}, "m")
    with pytest.raises(ModelError, match=r"is loaded with optimum-quanto: not installed here"):
        check_library(form, "m")
    (optimum / "quanto").mkdir()
    (optimum / "quanto" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    check_library(form, "m")


def test_without_optimum_there_is_no_quanto():
    with pytest.raises(ModelError, match=r"is loaded with optimum-quanto: not installed here"):
        check_library(form_of({"quantization_config": {"quant_method": "quanto"}}, "m"), "m")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("nf4", "NF4 with double quantisation"),
        ("int4-of-2027", "int4-of-2027"),
        ("int4-of-2027, stored", "INT4-OF-2027 as stored"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
    ],
)
def test_weights_are_called_what_a_passport_says(held, said):
    assert held_text(held) == said


def test_a_library_that_is_there_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_library(form_of({"quantization_config": {"quant_method": "awq"}}, "m"), "m")


def test_mxfp4_experts_are_held_as_values(tokenizer, tmp_path):
    from safetensors.torch import save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    for name in [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = found.pop(name).shape
        found[f"{name}_blocks"] = torch.full((experts, out, into // 32, 16), 0x21, dtype=torch.uint8)  # 0.5, then 1
        found[f"{name}_scales"] = torch.full((experts, out, into // 32), 126, dtype=torch.uint8)  # 2^(126 - 127)
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    base = load_base(str(marked(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})))
    experts = base.model.model.layers[0].mlp.experts.gate_up_proj
    assert base.quantize == "mxfp4, stored"
    assert experts.dtype == torch.float32
    assert experts[0, :4, 0].tolist() == [0.25, 0.5, 0.25, 0.5]


# --- what 4-bit loading leaves as it is -----------------------------------------------------------


def small(config, tokenizer, folder):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(tokenizer, tmp_path):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return small(config, tokenizer, tmp_path / "mixture")


@pytest.fixture
def conv1d(tokenizer, tmp_path):
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=4, n_positions=64, attn_pdrop=0, embd_pdrop=0,
        resid_pdrop=0,
    )  # fmt: skip
    return small(config, tokenizer, tmp_path / "gpt2")


@pytest.mark.parametrize("which", ["mixture", "conv1d", "tiny_model_folder"])
def test_dequantised_nf4_quantises_what_bitsandbytes_does(request, which):
    folder = str(request.getfixturevalue(which))
    packed, held = (load_base(folder, quantize="nf4", packed=on) for on in (True, False))
    assert torch.allclose(logits(packed.model), logits(held.model), rtol=1e-3, atol=1e-4)
    assert packed.kept_share == held.kept_share


def test_what_stays_unquantised_is_counted_and_said(mixture, conv1d, tiny_model_folder, stored):
    base = load_base(str(mixture), quantize="nf4")
    attention, experts, router = 64 * 64 * 2 + 32 * 64 * 2, 4 * 3 * 64 * 128, 4 * 64
    norms = 2 * 64 + 2 * 16
    kept = (2 * (experts + router + norms) + 64) / (2 * (attention + experts + router + norms) + 64)
    assert base.kept_share == pytest.approx(kept)
    assert held_text(base.quantize, base.kept_share) == (
        "NF4 with double quantisation; 89% of the layers' weights stay unquantised"
    )
    assert load_base(str(conv1d), quantize="nf4").kept_share < 0.2  # its positions, norms and biases
    assert held_text("nf4", load_base(str(tiny_model_folder), quantize="nf4").kept_share).endswith("quantisation")
    assert load_base(str(tiny_model_folder), quantize="none").kept_share == 0
    down = 2 * 64 * 128 / (2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128))
    assert load_base(str(stored("nf4-kept"))).kept_share == pytest.approx(down, abs=0.01)
    assert load_base(str(stored("nf4-kept")), packed=True).kept_share == pytest.approx(down, abs=0.01)
    assert held_text("fp4, stored") == "FP4 as stored"
    assert held_text("none") == "as stored"


def test_an_adapter_on_the_model_is_not_counted(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="nf4")
    model = attach_lora(base.model, LoraSection(rank=4), seed=0)
    assert kept_share(model.get_base_model()) == pytest.approx(base.kept_share)


# --- one model in two forms -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "nf4-bf16", "nf4-kept", "fp4", "int8", "fp8"])
def test_a_base_is_known_again_in_another_form(stored, original, kind):
    whole, part = origin_sample(str(original)), origin_sample(str(stored(kind)), most=6)
    assert len(whole) == 15
    assert len(part) == 6
    assert same_origin(whole, part)
    assert same_origin(from_text(json.loads(json.dumps(to_text(part)))), whole)


def changed(by, only=""):
    draws = torch.Generator().manual_seed(3)

    def change(name, weight):
        if name.endswith("_proj.weight") and only in name:
            noise = torch.randn(weight.shape, generator=draws) * weight.float().std() * by
            weight.add_(noise.to(weight.dtype))

    return change


@pytest.mark.parametrize(
    ("by", "only"),
    [(0.003, ""), (0.01, ""), (0.01, "attn"), (1.0, "layers.1.mlp.up_proj"), (10.0, "")],
    ids=["a fine-tune", "a longer one", "of attention alone", "one matrix", "another"],
)
def test_another_model_of_the_same_shapes_is_not(stored, original, tmp_path, by, only):
    sample = origin_sample(str(bfloat16(original, tmp_path / "other", changed(by, only))))
    for kind in ("nf4", "nf4-double", "fp4", "int8", "fp8"):
        assert not same_origin(origin_sample(str(stored(kind))), sample), kind
        assert not same_origin(from_text(to_text(sample)), origin_sample(str(stored(kind)))), kind


def test_a_fine_tune_that_was_quantised_is_not_the_untuned_model(stored, original, tmp_path):
    other = bfloat16(original, tmp_path / "other", changed(0.003))
    for kind in ("nf4", "int8"):
        theirs = origin_sample(str(bitsandbytes(other, tmp_path / kind, kind)))
        assert same_origin(origin_sample(str(other)), theirs), kind
        assert not same_origin(origin_sample(str(original)), theirs), kind
    assert not same_origin(origin_sample(str(stored("nf4-double"))), origin_sample(str(tmp_path / "nf4")))
    assert same_origin(origin_sample(str(stored("nf4-double"))), origin_sample(str(stored("nf4"))))


def test_scales_that_were_rounded_are_no_other_model(stored, original, tmp_path):
    folder = shutil.copytree(stored("fp8"), tmp_path / "rounded")
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: one.to(torch.bfloat16) if name.endswith("_scale_inv") else one for name, one in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    assert same_origin(origin_sample(str(folder)), origin_sample(str(original)))
    tuned = bfloat16(original, tmp_path / "tuned", changed(0.01))
    assert not same_origin(origin_sample(str(folder)), origin_sample(str(tuned)))


class Watched:
    """An open safetensors file that counts the numbers which are read of its weights."""

    def __init__(self, file, numbers):
        self.file, self.numbers = file, numbers

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        self.numbers[name] = self.numbers.get(name, 0) + tensor.numel()
        return tensor

    def get_slice(self, name):
        return WatchedSlice(self.file.get_slice(name), name, self.numbers)


class WatchedSlice:
    def __init__(self, part, name, numbers):
        self.part, self.name, self.numbers = part, name, numbers

    def __getattr__(self, name):
        return getattr(self.part, name)

    def __getitem__(self, at):
        found = self.part[at]
        self.numbers[self.name] = self.numbers.get(self.name, 0) + found.numel()
        return found


@pytest.mark.parametrize("kind", ["original", "nf4", "int8", "fp8"])
def test_a_window_is_all_that_is_read_of_a_weight_and_once(stored, original, tmp_path, monkeypatch, kind):
    folder = shutil.copytree(original if kind == "original" else stored(kind), tmp_path / "copy")
    numbers, opened = {}, []

    def watched(path):
        opened.append(path)
        return Watched(open_tensors(path), numbers)

    monkeypatch.setattr("lora_dpo.model.origin.open_tensors", watched)
    sample = origin_sample(str(folder))
    assert len(sample) == 15
    assert max(numbers.get(name, 0) for name in sample) <= 128  # a window, or the one row it is in
    for _ in range(3):
        assert origin_sample(str(folder)).keys() == sample.keys()
        assert is_another_form(str(folder), sample) is False or kind != "original"
    assert len(opened) <= 2  # all its weights, and those of the sample
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    origin_sample(str(folder))
    assert len(opened) == 3  # the file is another one now


def test_one_matrix_of_many_that_differs_is_another_model(stored, original):
    plain, four_bits = origin_sample(str(original)), origin_sample(str(stored("nf4")))
    many = [{f"{name} {n}": one for name, one in sample.items() for n in range(20)} for sample in (plain, four_bits)]
    assert same_origin(*many)
    one = "model.layers.0.mlp.up_proj.weight"
    other = {**many[0], f"{one} 7": plain["model.layers.1.mlp.up_proj.weight"]}
    assert not same_origin(other, many[1])


def test_two_plain_checkpoints_are_told_by_their_fingerprints_alone(original):
    sample = origin_sample(str(original))
    assert not same_origin(sample, sample)


def test_what_cannot_be_known_is_not_claimed(stored, original):
    four_bits = origin_sample(str(stored("nf4")))
    assert not same_origin(four_bits, origin_sample(str(stored("fp4"))))  # neither tells what the other was made of
    assert not same_origin(dict(list(four_bits.items())[:3]), origin_sample(str(original)))
    assert from_text({"a": "nf4:AAAA", "b": "nf4:%", "c": "xyz:" + "A" * 172, "d": ""}) == {}


def test_every_kind_of_bitsandbytes_is_tried(stored):
    assert {kind for kind, _ in HELD} == {*BITSANDBYTES, "fp8"}


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "nf4-bf16", "fp4", "int8", "fp8"])
def test_a_weights_value_in_the_files_is_that_in_memory(stored, kind):
    tensors = load_file(stored(kind) / "model.safetensors")
    base = load_base(str(stored(kind))).model
    for name in quantised_layers(base):
        value = stored_value(tensors.__getitem__, f"{name}.weight", tensors.keys())
        assert torch.allclose(value.float(), base.get_parameter(f"{name}.weight"), rtol=1e-6, atol=1e-7), name
