"""What is not supported says which part of it, and what works instead: no advice leads in a circle."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stored import marked
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.lora_config import CONFIG
from lora_dpo.adapters.passport import PASSPORT
from lora_dpo.errors import AdapterError, BaseDiffers, ModelError
from lora_dpo.model.base import load_base
from lora_dpo.release.exports.export_adapter import export
from lora_dpo.release.merged_folder import merge
from lora_dpo.serving.chat import open_chat
from lora_dpo.text import plain


def adapter_of(base, folder, *, rows=None, **settings):
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    get_peft_model(model, lora).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainable_token_indices": [1, 2]}, r"uses trainable_token_indices: only .* Use it with plain peft"),
        ({"bias": "lora_only"}, r"uses bias: lora_only: only .* Use it with plain peft"),
        ({"bias": "all"}, r"uses bias: all: only .* Use it with plain peft"),
        (
            {"modules_to_save": ["embed_tokens", "lm_head"], "rows": 262},
            r"(lm_head|embed_tokens).weight has 3 rows more than there \(259\), such as those of tokens that",
        ),
    ],
)
def test_an_adapter_that_does_more_says_what(tiny_model_folder, tmp_path, settings, said):
    folder = adapter_of(tiny_model_folder, tmp_path / "adapter", **settings)
    with pytest.raises(AdapterError, match=said):
        attach_adapter(load_base(str(tiny_model_folder), quantize="none"), folder)
    with pytest.raises(AdapterError, match=said):
        merge(folder, tmp_path / "out", model=str(tiny_model_folder))
    with pytest.raises(AdapterError, match=said):
        export(folder, tmp_path / "out.gguf", to="gguf-adapter", model=str(tiny_model_folder))


@pytest.mark.parametrize("init", ["eva", "mica", "orthogonal"])
def test_a_beginning_that_leaves_the_base_alone_is_plain_lora(tiny_model_folder, tmp_path, init):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    model = get_peft_model(model, lora)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["init_lora_weights"] == init
    ids = torch.tensor([[257, 5, 6, 7]])
    with pytest.warns(BaseDiffers, match="unverified"):
        live = attach_adapter(load_base(str(tiny_model_folder), quantize="none"), tmp_path / "adapter")
    with pytest.warns(BaseDiffers, match="unverified"):
        merged = merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert live.peft_config["default"].init_lora_weights is True  # no singular values of the base are looked for
    with torch.no_grad():
        theirs = model.eval()(ids).logits
        assert torch.allclose(live(ids).logits, theirs, atol=1e-5)
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, theirs, atol=1e-5)


def test_kasa_is_known_to_change_the_base(tiny_model_folder, tmp_path):
    folder = adapter_of(tiny_model_folder, tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "kasa_config": {"beta": 1e-4}}))
    with pytest.raises(AdapterError, match="says kasa_config: such an adapter belongs to a changed base"):
        attach_adapter(load_base(str(tiny_model_folder), quantize="none"), folder)


def test_a_base_that_is_stored_quantised_is_a_sentence_that_ends_somewhere(tiny_model_folder, make_adapter, tmp_path):
    base = marked(tiny_model_folder, {"quant_method": "gptq", "bits": 4}, tmp_path / "base")
    with pytest.raises(ModelError, match=r"stored quantised by gptq, which is loaded with .* Install it .*, or name"):
        load_base(str(base), quantize="nf4", packed=False)
    adapter = make_adapter(tmp_path / "adapter")
    path = adapter / PASSPORT
    path.write_text(path.read_text().replace(str(tiny_model_folder), str(base)))
    for use in (lambda: merge(adapter, tmp_path / "out"), lambda: export(adapter, tmp_path / "out.gguf", to="gguf")):
        with pytest.raises(
            ModelError, match=r"is stored quantised .*\. Use the adapter live, with lora-dpo chat or serve"
        ):
            use()
    with pytest.raises(ModelError, match=r"Name its 16-bit original instead"):
        export(base, tmp_path / "out.gguf", to="gguf")
    # without a passport nothing holds the adapter to the quantised base, and the advice is true
    path.unlink()
    with pytest.raises(ModelError, match=r"Name its 16-bit original with --model"):
        merge(adapter, tmp_path / "out", model=str(base))
    assert merge(adapter, tmp_path / "out", model=str(tiny_model_folder)).is_dir()


def test_a_class_that_renames_its_weights_is_used_live(tokenizer, tmp_path):
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    text = dict(small, vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=1, head_dim=16)
    vision = dict(small, num_hidden_layers=1, image_size=28, patch_size=14)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    base = tmp_path / "base"
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = adapter_of(base, tmp_path / "adapter")
    with pytest.raises(
        ModelError, match=r"under other names .* Use an adapter of it live, with lora-dpo chat or serve"
    ):
        merge(adapter, tmp_path / "out", model=str(base))
    assert open_chat(adapter, quantize="none")


def test_a_name_keeps_its_letters_and_nothing_that_paints():
    assert plain("Märchen/日本 1.safetensors") == "Märchen/日本 1.safetensors"
    assert plain("a\x1b[31m\u202eb\u0300\n") == "a\\x1b[31m\\u202eb\\u0300"
