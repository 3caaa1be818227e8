import logging

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import CONFIGS, LORA, PAIRS, Stock, assert_close, build, columns, gradients_of, one_step, pair, tiny
from transformers import AutoTokenizer
from trl import DPOConfig

from lora_dpo import DPOTrainer
from lora_dpo.config.trl_dpo import LOSSES
from lora_dpo.data import Origin, PreferencePair, read_pairs, tokenize_pairs
from lora_dpo.engine import PairForward, lay_out, unsupported_reason
from lora_dpo.engine.attention import StreamPlan, pair_attention
from lora_dpo.engine.scoring import _padded_logps, _stream_logps, score_pairs


def rows_of(pairs):
    sequences = [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
    masks = [[False] * len(p.prompt) + [True] * len(a) for side in ("chosen", "rejected") for p in pairs
             for a in [getattr(p, side)]]  # fmt: skip
    return sequences, masks


def test_layout_of_the_worked_example():
    # prefix a b c = 1 2 3, chosen d e = 4 5, rejected f = 6; the prompt is a b c
    mask = [False] * 3
    layout = lay_out([[1, 2, 3, 4, 5], [1, 2, 3, 6]], [[*mask, True, True], [*mask, True]], width=5)
    assert layout.ids_S.tolist() == [1, 2, 3, 4, 3]
    assert layout.position_S.tolist() == [0, 1, 2, 3, 2]
    assert layout.label_L.tolist() == [4, 5, 6]
    assert layout.predictor_L.tolist() == [2, 3, 4]
    assert layout.source_RT.tolist() == [[3, 3, 0, 1], [3, 3, 2, 3]]
    assert [(s.start, s.prefix, s.chosen, s.end) for s in layout.spans] == [(0, 2, 4, 5)]


def test_layout_refuses_half_a_pair():
    with pytest.raises(ValueError, match="2n"):
        lay_out([[1, 2]], [[False, True]], width=2)


def visible(layout, at):
    """The ids that stream index `at` sees, itself included, in order of position."""
    span = next(span for span in layout.spans if span.start <= at < span.end)
    seen = (
        range(span.start, at + 1)
        if at < span.chosen
        else [*range(span.start, span.prefix), *range(span.chosen, at + 1)]
    )
    return layout.ids_S[list(seen)].tolist()


sequences = st.lists(st.integers(3, 6), min_size=1, max_size=7)


@given(st.lists(st.tuples(sequences, sequences, sequences), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_every_label_is_predicted_from_exactly_its_own_row(triples):
    rows, masks = rows_of([pair(*triple) for triple in triples])
    width = max(map(len, rows))
    layout = lay_out(rows, masks, width=width)
    for row, mask, source in zip(rows, masks, layout.source_RT.tolist(), strict=True):
        for column in range(1, width):
            index = source[column - 1]
            if column < len(row) and mask[column]:
                at = int(layout.predictor_L[index])
                assert int(layout.label_L[index]) == row[column]
                assert visible(layout, at) == row[:column]
                assert int(layout.position_S[at]) == column - 1
            else:
                assert index == len(layout.label_L)
    longest = sum(len(a) + len(b) for a, b in zip(rows[: len(triples)], rows[len(triples) :], strict=True))
    assert len(layout.ids_S) <= longest  # never more tokens than without sharing


def test_pair_attention_equals_one_dense_mask_over_the_stream():
    rows, masks = rows_of(PAIRS)
    layout = lay_out(rows, masks, width=max(map(len, rows)))
    size = len(layout.ids_S)
    torch.manual_seed(0)
    query, key, value = torch.randn(4, size, 8), torch.randn(2, size, 8), torch.randn(2, size, 8)
    sees = torch.zeros(size, size, dtype=torch.bool)
    for span in layout.spans:
        for at in range(span.start, span.end):
            begin = span.start if at < span.chosen else span.chosen
            sees[at, begin : at + 1] = True
            if at >= span.chosen:
                sees[at, span.start : span.prefix] = True
    dense = torch.nn.functional.scaled_dot_product_attention(
        query[None], key.repeat_interleave(2, 0)[None], value.repeat_interleave(2, 0)[None], attn_mask=sees, scale=0.3
    )[0]
    assert torch.allclose(
        pair_attention(query, key, value, StreamPlan(layout.spans), 0.3).transpose(0, 1), dense, atol=1e-6
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_equal_those_of_whole_padded_rows(kind):
    model = tiny(kind)
    own_attention = model.config._attn_implementation
    for ours, plain in zip(_stream_logps(model, PAIRS, 0), _padded_logps(model, PAIRS, 0), strict=True):
        assert ours == pytest.approx(plain, rel=1e-6)
    assert model.config._attn_implementation == own_attention


@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probabilities_of_every_sequence_are_stock_trls(kind, tiny_model_folder, tmp_path):
    stock = build(Stock, tiny(kind), tiny_model_folder, tmp_path)
    stock.model.eval()
    batch = stock._prepare_inputs(stock.data_collator(columns(PAIRS)))
    with torch.no_grad():
        stock.ref_model = stock.model  # a given one is scored as it is: the policy itself
        policy = stock.compute_ref_log_probs(stock.model, batch)
        stock.ref_model = None
        reference = stock.compute_ref_log_probs(stock.model, batch)
    for ours, theirs in zip(score_pairs(stock.model, PAIRS, pad_id=0), policy, strict=True):
        assert ours == pytest.approx(theirs.tolist(), rel=1e-6)
    with stock.model.disable_adapter():
        for ours, theirs in zip(score_pairs(stock.model, PAIRS, pad_id=0), reference, strict=True):
            assert ours == pytest.approx(theirs.tolist(), rel=1e-6)


def test_scores_do_not_depend_on_the_order_or_the_split():
    model = tiny("llama")
    together = _stream_logps(model, PAIRS, 0)[0]
    alone = [_stream_logps(model, [one], 0)[0][0] for one in reversed(PAIRS)][::-1]
    assert together == pytest.approx(alone, rel=1e-6)


def assert_same_as_stock(kind, folder, tmp_path, **options):
    ours, stock = (one_step(c, kind, folder, tmp_path, **options) for c in (DPOTrainer, Stock))
    assert ours[3].engine.forward.streams == 3  # policy, reference, and two pairs held against TRL's own pass
    assert ours[0] == pytest.approx(stock[0], rel=2e-6, abs=1e-7)
    assert ours[2] == pytest.approx(stock[2], rel=2e-5, abs=1e-6)
    assert ours[1].keys() == stock[1].keys()
    largest = max(gradient.abs().max() for gradient in stock[1].values())
    for name, gradient in stock[1].items():
        assert torch.allclose(ours[1][name], gradient, rtol=1e-5, atol=1e-5 * largest), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_gradients_and_metrics_equal_stock_trl(kind, tiny_model_folder, tmp_path):
    assert_same_as_stock(kind, tiny_model_folder, tmp_path)


def real_pairs(tokenizer):
    """Ragged rows of a file, in bytes, and text that is not ASCII."""
    read, _ = read_pairs("data/quickstart.jsonl")
    spoken = [({"role": "user", "content": "Où est Zürich ? 🙂"},), *[({"role": "assistant", "content": text},)
              for text in ("À côté du lac 🏔️.", "Je ne sais pas — désolé… 你好")]]  # fmt: skip
    foreign = PreferencePair(*spoken, Origin("unicode", 1))
    return tokenize_pairs(tokenizer, [*read[:5], foreign], max_length=120)[0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_real_ragged_pairs_have_stock_trls_log_probabilities_and_gradients(
    kind, tokenizer, tiny_model_folder, tmp_path
):
    pairs = real_pairs(tokenizer)
    assert len({len(p.chosen) for p in pairs}) > 3
    found = []
    for trainer_class in (DPOTrainer, Stock):
        trainer = build(trainer_class, tiny(kind), tiny_model_folder, tmp_path, pairs=pairs)
        batch = trainer._prepare_inputs(trainer.data_collator(columns(pairs)))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append((loss.item(), gradients_of(trainer), trainer))
    (ours, gradients, _), (theirs, their_gradients, stock) = found
    assert ours == pytest.approx(theirs, rel=1e-5)  # rounding: held to AVX2, 2.7e-6 of Gemma's
    assert_close(gradients, their_gradients)
    stock.model.eval()
    with torch.no_grad():
        reference = stock.compute_ref_log_probs(stock.model, stock.data_collator(columns(pairs)))
    with stock.model.disable_adapter():
        for mine, yours in zip(score_pairs(stock.model, pairs, pad_id=0), reference, strict=True):
            assert mine == pytest.approx(yours.tolist(), rel=1e-6)


@pytest.mark.parametrize("loss", [["sigmoid", "sft"], ["ipo"]])
def test_identical_answers_and_a_prompt_of_one_token_equal_stock_trl(loss, tiny_model_folder, tmp_path):
    same = [PAIRS[0], pair([1], [7, 8, 2], [7, 8, 2]), pair([1], [9], [11])]
    found = []
    for trainer_class in (DPOTrainer, Stock):
        trainer = build(trainer_class, tiny("llama"), tiny_model_folder, tmp_path, pairs=same, loss_type=loss)
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(columns(same)))).backward()
        found.append(gradients_of(trainer))
    assert_close(*found)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "discopop"])
def test_every_trl_loss_equals_stock_trl(loss, tiny_model_folder, tmp_path):
    smoothing = {"label_smoothing": 0.1} if loss in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
    assert_same_as_stock("llama", tiny_model_folder, tmp_path, loss_type=[loss], **smoothing)


def answer_logps64(model, side):
    """Log-probability of each answer by whole rows through the plain model, in float64."""
    sums = []
    for one in PAIRS:
        ids = torch.tensor([one.prompt + getattr(one, side)])
        logits = model.get_base_model()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
        sums.append(logps[len(one.prompt) - 1 :].sum())
    return torch.stack(sums)


def test_discopop_equals_its_formula_in_float64(tiny_model_folder, tmp_path):
    # Its temperature 0.05 turns float32 rounding of a log-ratio into 20 times as much: stock TRL's own gradients are
    # 1.5e-5 from the float64 ones (the formula of Lu et al. 2024, arXiv 2406.08414, eq. 5, written out here).
    loss, gradients, _, trainer = one_step(DPOTrainer, "llama", tiny_model_folder, tmp_path, loss_type=["discopop"])
    model = trainer.model
    trainer.close()
    model.double().zero_grad()
    chosen, rejected = (answer_logps64(model, side) for side in ("chosen", "rejected"))
    with torch.no_grad(), model.disable_adapter():
        ref_chosen, ref_rejected = (answer_logps64(model, side) for side in ("chosen", "rejected"))
    logits = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    weight = torch.sigmoid(logits / 0.05)
    exact = (-torch.nn.functional.logsigmoid(logits) * (1 - weight) + torch.exp(-logits) * weight).mean()
    exact.backward()
    assert loss == pytest.approx(exact.item(), rel=2e-6)
    parameters = dict(model.named_parameters())
    largest = max(parameters[name].grad.abs().max() for name in gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient.double(), parameters[name].grad, rtol=1e-5, atol=1e-5 * largest), name


@pytest.mark.parametrize(
    "options",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence"},
        {"ld_alpha": 0.4},
        {"use_weighting": True},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: next(iter(options)) + "-" + str(next(iter(options.values()))),
)
def test_every_trl_option_equals_stock_trl(options, tiny_model_folder, tmp_path):
    assert_same_as_stock("llama", tiny_model_folder, tmp_path, **options)


def test_rows_longer_than_a_sliding_window_share_their_prefix_too(tiny_model_folder, tmp_path):
    assert_same_as_stock("mistral", tiny_model_folder, tmp_path, model={"sliding_window": 4})


def test_scores_honour_a_sliding_window():
    model = tiny("mistral", sliding_window=4)
    unlimited = tiny("mistral", sliding_window=None)
    scores = score_pairs(model, PAIRS, pad_id=0)[0]
    assert scores == pytest.approx(_padded_logps(model, PAIRS, 0)[0], rel=1e-6)
    assert scores != pytest.approx(score_pairs(unlimited, PAIRS, pad_id=0)[0], rel=1e-3)


def test_two_trainers_on_one_model_leave_it_as_it_was():
    model = trl_patched(tiny("llama"))
    own = model.forward
    first = PairForward(model, ("log_probs",))
    model(**padded_call())
    second = PairForward(model, ("log_probs",))
    first.close()  # the second is still bound
    model(**padded_call())
    assert second.streams == 1
    second.close()
    assert model.config._attn_implementation == "sdpa"
    assert own is not None


def trl_patched(model):
    trl.trainer.utils.add_fused_lm_head(model)
    return model.requires_grad_(False)  # as peft leaves a base


def padded_call():
    ids = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 5, 6, 7, 9, 2]])
    labels = ids.masked_fill(torch.arange(6) < 4, -100)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)


def test_generation_keeps_the_models_own_attention_while_bound():
    model = trl_patched(tiny("llama"))
    ids = torch.tensor([[1, 5, 6]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    forward = PairForward(model, ("log_probs",))
    model(**padded_call())
    assert forward.streams == 1
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)


def test_closing_gives_the_model_its_own_forward_back():
    model = trl_patched(tiny("llama"))
    own = model.forward
    forward = PairForward(model, ("log_probs",))
    model(**padded_call())
    forward.close()
    assert model.forward == own
    assert model.config._attn_implementation == "sdpa"


def test_a_training_call_that_cannot_be_a_stream_is_passed_on_and_said_once(caplog):
    model = trl_patched(tiny("llama"))
    call = padded_call()
    plain = model(**call, position_ids=torch.arange(call["input_ids"].shape[1])[None])
    forward = PairForward(model, ("log_probs",))
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        for _ in range(2):
            passed = model(**call, position_ids=torch.arange(call["input_ids"].shape[1])[None])
            model(input_ids=call["input_ids"])  # not a training call: nothing to say
    assert torch.equal(passed.log_probs, plain.log_probs)
    assert forward.streams == 0
    assert [record.getMessage() for record in caplog.records] == [
        "This pass is TRL's own (slower, the same result): the model is called with position_ids."
    ]


def test_an_architecture_that_cannot_is_said_once_and_trains_with_trls_forward(tiny_model_folder, tmp_path, caplog):
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert "GPT2LMHeadModel keeps its decoder layers elsewhere" in unsupported_reason(model)
    args = DPOConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False)
    rows = columns(PAIRS)
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        trainer = DPOTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        )  # fmt: skip
    assert trainer.engine is None
    assert [record for record in caplog.records if "GPT2LMHeadModel" in record.message]
    assert trainer.check_reference() < 1e-5


def test_references_scored_ahead_where_trls_own_passes_run(tiny_model_folder, tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = build(DPOTrainer, model, tiny_model_folder, tmp_path, lora=lora, precompute_ref_log_probs=True)
    assert trainer.engine is None
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.eval_dataset.column_names)


@pytest.mark.parametrize(
    ("lora", "options", "reason"),
    [
        ({"bias": "lora_only"}, {}, "trains biases of the base"),
        ({}, {"optim": "lomo"}, "updates the weights within the backward pass"),
    ],
)
def test_what_the_engine_would_get_wrong_is_left_to_trl(lora, options, reason, tiny_model_folder, tmp_path, caplog):
    config = LoraConfig(**{**LORA.to_dict(), **lora})
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        trainer = build(DPOTrainer, tiny("qwen2"), tiny_model_folder, tmp_path, lora=config, **options)
    assert trainer.engine is None
    assert reason in caplog.text
