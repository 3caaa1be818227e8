"""What the reference said is found again whatever the policy does, and never taken for another reference's."""

import logging
import sqlite3
import threading

import pytest
import torch
from peft import LoraConfig
from tiny import LORA, PAIRS, build, columns, pair, tiny

from lora_dpo import DPOTrainer, EngineSection
from lora_dpo.config.recipe import LoraSection
from lora_dpo.engine.engine import answer_sums
from lora_dpo.engine.reference_cache import FORMAT, PairLogps, ReferenceCache, pair_key, reference_name
from lora_dpo.model.base import load_base
from lora_dpo.model.lora import attach_lora

LOGPS = PairLogps(-1.5, -0.25, -3.0, 0.0)


@pytest.fixture
def run(tiny_model_folder, tmp_path):
    """Score pairs with a new trainer; returns (found, scored)."""

    def once(model=None, pairs=PAIRS, **options):
        trainer = build(
            DPOTrainer,
            model if model is not None else tiny("llama"),
            tiny_model_folder,
            tmp_path,
            pairs=pairs,
            **options,
        )
        engine = trainer.engine
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(columns(pairs))))
        trainer.close()
        return engine.references.hits, engine.references.misses

    return once


def test_another_run_finds_what_was_scored_whatever_the_policy(run):
    assert run() == (0, 4)
    other_rank = LoraConfig(**{**LORA.to_dict(), "r": 2, "lora_alpha": 1})
    assert run(lora=other_rank) == (4, 0)
    assert run(seed=7, beta=0.9, learning_rate=1e-2, loss_type=["ipo"]) == (4, 0)
    assert run(ld_alpha=0.3) == (4, 0)
    assert run(pairs=[*PAIRS[1:], pair([1, 50], [51], [52])]) == (3, 1)  # edited data: only the new row


def test_another_base_is_another_reference(run):
    assert run() == (0, 4)
    changed = tiny("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert run(model=changed) == (0, 4)
    assert run(model=tiny("llama", rope_theta=5000.0)) == (0, 4)
    assert run(model=tiny("llama").to(torch.bfloat16)) == (0, 4)
    assert run() == (4, 0)


def test_other_token_ids_are_another_pair():
    # another template, another truncation, or a collator that masks something (an end token, a tool's result)
    masks = [0, 0, 1, 1], [0, 0, 1]
    known = pair_key(([1, 2, 3, 4], [1, 2, 5]), masks)
    assert pair_key(([1, 2, 3], [1, 2, 5]), ([0, 0, 1], [0, 0, 1])) != known
    assert pair_key(([1, 2, 3, 4], [1, 2, 5]), ([0, 0, 0, 1], [0, 0, 1])) != known
    assert pair_key(([1, 2, 3, 4], [1, 2, 5]), ([0, 0, 1, 0], [0, 0, 1])) != known  # its end is not scored
    assert pair_key(([1, 2, 5], [1, 2, 3, 4]), masks[::-1]) != known
    assert pair_key(([1, 2, 3, 4], [1, 2, 5]), masks) == known


def test_quantisation_is_another_reference(tiny_model_folder):
    names = set()
    for quantize, packed in (("none", "auto"), ("nf4", False), ("nf4", True)):
        base = load_base(str(tiny_model_folder), quantize=quantize, packed=packed)
        model = attach_lora(base.model, LoraSection(rank=2), seed=0)
        names.add(reference_name(model, torch.float32))
        names.add(reference_name(model, torch.bfloat16))
    assert len(names) == 6


def test_what_another_format_stored_is_not_found(tiny_model_folder, monkeypatch):
    model = attach_lora(load_base(str(tiny_model_folder), quantize="none").model, LoraSection(rank=2), seed=0)
    name = reference_name(model, torch.float32)
    monkeypatch.setattr("lora_dpo.engine.reference_cache.FORMAT", FORMAT - 1)
    assert reference_name(model, torch.float32) != name


def test_the_policy_plays_no_part_in_the_name_but_a_reference_adapter_does(tiny_model_folder, tmp_path):
    model = attach_lora(load_base(str(tiny_model_folder), quantize="none").model, LoraSection(rank=2), seed=0)
    name = reference_name(model, torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    assert reference_name(model, torch.float32) == name
    model.add_adapter("ref", model.peft_config["default"])
    with_reference = reference_name(model, torch.float32)
    assert with_reference != name
    for key, parameter in model.named_parameters():
        if ".ref." in key:
            parameter.data.add_(1.0)
            break
    assert reference_name(model, torch.float32) != with_reference


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"modules_to_save": ["norm"]},
        {"use_dora": True, "r": 2},
    ],
)
def test_what_the_policy_adapts_plays_no_part_in_the_name(run, lora):
    assert run() == (0, 4)
    assert run(lora=LoraConfig(**{**LORA.to_dict(), **lora})) == (4, 0)


def test_another_precision_of_products_is_another_reference(run):
    assert run() == (0, 4)
    torch.set_float32_matmul_precision("high")
    try:
        assert run() == (0, 4)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_a_large_weight_is_summed_in_pieces(dtype, monkeypatch):
    weight = torch.nn.Module()
    weight.peft_config = {}
    weight.get_base_model = lambda: tiny("llama")
    weight.table = torch.nn.Parameter(torch.arange(1000).to(dtype), requires_grad=False)
    widened, plain = [], torch.Tensor.sum

    def watched(self, *args, **kwargs):
        widened.append(self.numel())
        return plain(self, *args, **kwargs)

    names = [reference_name(weight, torch.float32)]
    monkeypatch.setattr("lora_dpo.engine.reference_cache.PIECE", 64)
    monkeypatch.setattr(torch.Tensor, "sum", watched)
    names.append(reference_name(weight, torch.float32))
    assert max(widened) == 64  # the sum makes 8 bytes of each of them first
    weight.table[500] += 7
    names.append(reference_name(weight, torch.float32))
    assert names[0] == names[1] != names[2]


def test_with_a_full_cache_the_adapters_are_never_switched(run, monkeypatch):
    run()

    def never(model):
        raise AssertionError("the reference was switched to")

    monkeypatch.setattr("lora_dpo.engine.engine.reference", never)
    assert run() == (4, 0)


def test_cached_values_are_what_trl_computes(tiny_model_folder, tmp_path):
    trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path)
    batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    ours = trainer.engine.with_reference(batch)
    assert ours["ref_chosen_logps"].tolist() == pytest.approx(chosen.tolist(), rel=1e-6)
    assert ours["ref_rejected_logps"].tolist() == pytest.approx(rejected.tolist(), rel=1e-6)


def test_answer_sums_worked_example():
    # answers of 3 and of 1 tokens after 1 prompt token: the head is one token
    log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    assert answer_sums(log_probs, mask) == [PairLogps(-1.0, -6.0, -8.0, 0.0)]
    assert PairLogps(-1.0, -6.0, -8.0, 0.0).sums(None) == (-7.0, -8.0)
    assert PairLogps(-1.0, -6.0, -8.0, 0.0).sums(0.5) == (-4.0, -8.0)


# --- the file --------------------------------------------------------------------------------------


def test_values_survive_the_process(tmp_path):
    ReferenceCache(tmp_path, "r").put({b"a": LOGPS})
    again = ReferenceCache(tmp_path, "r")
    assert again.get([b"a", b"b"]) == {b"a": LOGPS}
    assert (again.hits, again.misses) == (1, 1)
    assert ReferenceCache(tmp_path, "other").get([b"a"]) == {}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = ReferenceCache(None, "r")
    cache.put({b"a": LOGPS})
    assert cache.get([b"a"]) == {b"a": LOGPS}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("column", ["row", "crc", "pair"])
def test_a_flipped_byte_is_noticed(tmp_path, column, caplog):
    ReferenceCache(tmp_path, "r").put({b"aaaa": LOGPS, b"bbbb": LOGPS})
    database = sqlite3.connect(tmp_path / "r.sqlite")
    value = database.execute(f"SELECT {column} FROM logps WHERE pair = ?", [b"aaaa"]).fetchone()[0]
    flipped = value ^ 1 if column == "crc" else bytes([value[0] ^ 1]) + value[1:]
    database.execute(f"UPDATE logps SET {column} = ? WHERE pair = ?", [flipped, b"aaaa"])
    database.commit()
    database.close()
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        asked = [b"`aaa", b"aaaa", b"bbbb"]  # ` is a with its lowest bit flipped
        assert ReferenceCache(tmp_path, "r").get(asked) == {b"bbbb": LOGPS}
    assert "damaged" in caplog.text


def test_a_file_that_is_no_cache_is_replaced_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "r.sqlite").write_bytes(b"not a database at all" * 100)
    cache = ReferenceCache(tmp_path, "r")
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        assert cache.get([b"a"]) == {}
    cache.put({b"a": LOGPS})
    assert cache.get([b"a"]) == {b"a": LOGPS}
    assert "cannot be used" in caplog.text
    ReferenceCache(tmp_path, "r").put({b"a": LOGPS})
    assert ReferenceCache(tmp_path, "r").get([b"a"]) == {b"a": LOGPS}


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ReferenceCache(tmp_path / "file", "r")
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        cache.put({b"a": LOGPS})
    assert cache.get([b"a"]) == {b"a": LOGPS}
    assert "cannot be used" in caplog.text


def test_several_runs_write_at_once(tmp_path):
    def write(number):
        cache = ReferenceCache(tmp_path, "r")
        for index in range(30):
            cache.put({f"{number}-{index}".encode(): PairLogps(number, index, 0, 0)})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = ReferenceCache(tmp_path, "r").get([f"{n}-{i}".encode() for n in range(4) for i in range(30)])
    assert len(found) == 120
    assert found[b"3-7"] == PairLogps(3, 7, 0, 0)


def test_where_the_cache_is(tmp_path, run, own_cache):
    run()
    assert len(list((own_cache / "references").glob("*.sqlite"))) == 1
    run(engine=EngineSection(reference_cache=str(tmp_path / "here")), model=tiny("qwen2"))
    assert len(list((tmp_path / "here").glob("*.sqlite"))) == 1


def test_a_file_that_was_only_begun_is_an_empty_cache(tmp_path, caplog):
    (tmp_path / "base.sqlite").touch()
    cache = ReferenceCache(tmp_path, "base")
    assert cache.get([b"a"]) == {}
    cache.put({b"a": LOGPS})
    assert ReferenceCache(tmp_path, "base").get([b"a"]) == {b"a": LOGPS}
    assert caplog.text == ""
