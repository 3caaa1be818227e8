"""Adapters on the top layers: the layers below run once, and the numbers stay stock TRL's."""

import pytest
import torch
from elsewhere import as_windows
from peft import LoraConfig
from tiny import PAIRS, Stock, assert_close, build, columns, gradients_of, tiny

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.engine.pair_batch import model_inputs
from lora_dpo.engine.trunk_cache import TrunkCache, lowest_adapted_layer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR, layers_to_transform=[3])
DEEP = {"num_hidden_layers": 4}


def gradients(kind, folder, tmp_path, architecture="llama", steps=1, **options):
    extra = {"layer_types": ["sliding_attention", "full_attention"] * 2} if architecture == "gemma3_text" else {}
    trainer = build(kind, tiny(architecture, **DEEP, **extra), folder, tmp_path, lora=TOP, **options)
    for _ in range(steps):
        trainer.model.zero_grad()
        batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
        trainer.compute_loss(trainer.model, batch).backward()
    return gradients_of(trainer), trainer


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "granite"])
def test_gradients_equal_stock_trls(architecture, tiny_model_folder, tmp_path):
    ours, trainer = gradients(DPOTrainer, tiny_model_folder, tmp_path, architecture)
    stock, _ = gradients(Stock, tiny_model_folder, tmp_path, architecture)
    assert trainer.engine.forward.depth == 3
    assert_close(ours, stock)


@pytest.mark.parametrize("where", ["memory", "disk", "off"])
def test_the_layers_below_run_once_a_pair(where, tiny_model_folder, tmp_path):
    ran = []

    def watch(trainer):
        layers = trainer.model.get_base_model().model.layers
        for number in (0, 3):
            layers[number].register_forward_hook(lambda *_, number=number: ran.append(number))

    trainer = build(DPOTrainer, tiny("llama", **DEEP), tiny_model_folder, tmp_path, lora=TOP,
                    engine=EngineSection(trunk_cache=where))  # fmt: skip
    if where == "disk":
        trainer.engine.forward.trunk.memory_left = 0
    watch(trainer)
    found = []
    for _ in range(3):
        trainer.model.zero_grad()
        batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
        trainer.compute_loss(trainer.model, batch).backward()
        found.append(gradients_of(trainer))
    top, bottom = ran.count(3), ran.count(0)
    assert top == 6  # three policies and one reference, and the two passes that are compared before the first
    # TRL's own pass, the stream of two pairs that is held against it, and the stream of all pairs
    assert bottom == (6 if where == "off" else 3)
    assert_close(found[2], found[0], rtol=1e-6)
    if where == "disk":
        assert len(list((tmp_path / "trunk").glob("*.safetensors"))) == 4
        trainer.close()
        assert not (tmp_path / "trunk").exists()


@pytest.mark.parametrize("where", ["memory", "off"])
def test_the_layers_below_keep_nothing_for_a_backward_pass(where, tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama", **DEEP), tiny_model_folder, tmp_path, lora=TOP,
                    engine=EngineSection(trunk_cache=where), gradient_checkpointing=True)  # fmt: skip
    trainer.model.enable_input_require_grads()  # as trainers do for checkpointing: then every layer has a gradient
    layers, seen = trainer.model.get_base_model().model.layers, {0: [], 3: []}
    batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
    trainer.engine.with_reference(batch)
    for number, found in seen.items():
        layers[number].register_forward_hook(
            lambda layer, inputs, output, found=found: found.append(output.requires_grad)
        )
    with trainer.engine.forward.log(False):
        trainer.model(**model_inputs(batch)).log_probs.sum().backward()
    assert seen[0].count(True) == 0
    assert seen[3].count(True) == 1


def test_a_part_of_known_and_new_pairs_is_right(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama", **DEEP), tiny_model_folder, tmp_path, lora=TOP)
    half = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS[:2])))
    trainer.compute_loss(trainer.model, half)
    batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
    trainer.compute_loss(trainer.model, batch).backward()
    assert_close(gradients_of(trainer), gradients(Stock, tiny_model_folder, tmp_path)[0])


def test_the_model_is_whole_again_after_every_pass(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama", **DEEP), tiny_model_folder, tmp_path, lora=TOP)
    base = trainer.model.get_base_model()
    layers = base.model.layers
    names = [name for name, _ in trainer.model.named_parameters()]
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(columns(PAIRS))))
    assert base.model.layers is layers
    assert [name for name, _ in trainer.model.named_parameters()] == names


def test_which_layers_are_below(tiny_model_folder, tmp_path):
    def depth(**config):
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": LINEAR, **config})
        model = build(DPOTrainer, tiny("llama", **DEEP), tiny_model_folder, tmp_path, lora=lora).model
        return lowest_adapted_layer(model.get_base_model())

    assert depth(layers_to_transform=[2, 3]) == 2
    assert depth() == 0
    assert depth(layers_to_transform=[3], modules_to_save=["embed_tokens"]) == 0


def test_the_cache_keeps_to_its_limits(tmp_path):
    cache = TrunkCache(memory_bytes=48, folder=tmp_path / "trunk", disk_bytes=60)
    part = torch.ones(3, 4)  # 48 bytes
    for key in (b"a", b"b", b"c"):
        cache.put(key, part)
    assert torch.equal(cache.get(b"a"), part)
    assert torch.equal(cache.get(b"b"), part)
    assert cache.get(b"c") is None
    assert len(list((tmp_path / "trunk").iterdir())) == 1


@pytest.mark.linux
def test_what_was_read_from_the_disk_does_not_keep_its_file(tmp_path, monkeypatch):
    cache = TrunkCache(memory_bytes=0, folder=tmp_path / "trunk", disk_bytes=100)
    cache.put(b"pair", torch.arange(4.0).reshape(2, 2))
    hidden_SE = cache.get(b"pair")
    as_windows(monkeypatch)  # a mapped file cannot be removed there
    cache.close()
    assert not (tmp_path / "trunk").exists()
    assert hidden_SE.tolist() == [[0, 1], [2, 3]]
