import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_dpo.config.recipe import LoraSection
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.errors import ConfigError
from lora_dpo.model.decoding import (
    SHORTCUT,
    Sampling,
    decode,
    first_of,
    generate,
    held_back,
    pick,
    rows_that_fit,
    stream,
    stream_from,
)
from lora_dpo.model.lora import attach_lora

CHATS = [[{"role": "user", "content": text}] for text in ("hi", "tell me about the sea, please", "why?", "é ü")]


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()


def test_greedy_batch_equals_transformers_generate_one_by_one(model, tokenizer):
    answers = generate(model, tokenizer, CHATS, sampling=Sampling(max_new_tokens=24), batch_size=3)
    for chat, answer in zip(CHATS, answers, strict=True):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = out.tolist()
        finished = tokenizer.eos_token_id in expected
        if finished:
            expected = expected[: expected.index(tokenizer.eos_token_id)]
        assert answer.finished == finished
        assert answer.tokens == len(expected)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_rows_that_end_early_leave_the_others_unchanged(model, tokenizer):
    together = generate(model, tokenizer, CHATS * 3, sampling=Sampling(max_new_tokens=40), batch_size=12)
    alone = [generate(model, tokenizer, [chat], sampling=Sampling(max_new_tokens=40))[0] for chat in CHATS]
    assert together == alone * 3


def test_stream_pieces_join_to_the_answer(model, tokenizer):
    sampling = Sampling(max_new_tokens=30, temperature=0.9, top_p=0.9, seed=3)
    whole = generate(model, tokenizer, CHATS[:1], sampling=sampling)[0].text
    pieces = "".join(stream(model, tokenizer, CHATS[0], sampling=sampling))
    assert pieces.strip() == whole


def test_same_seed_same_answer_other_seed_another(model, tokenizer):
    texts = [
        generate(model, tokenizer, CHATS[:1], sampling=Sampling(max_new_tokens=30, temperature=1.0, seed=seed))[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_pick_is_argmax_at_temperature_zero():
    assert pick(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(), torch.Generator()).tolist() == [1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-20, 1e-6])
@pytest.mark.parametrize("top_p", [5e-324, 1e-320, 1e-45, 0.5, 1.0])
def test_a_tiny_temperature_draws_the_likeliest_token(temperature, top_p):
    logits = torch.tensor([[-30.0, 200.0, 199.0], [float("-inf"), -5.0, 3.0]])
    sampling = Sampling(temperature=temperature, top_p=top_p)
    assert pick(logits, sampling, torch.Generator().manual_seed(0)).tolist() == [1, 2]


@pytest.mark.parametrize("top_p", [5e-324, 1e-45, 1e-9])
def test_a_tiny_top_p_keeps_the_likeliest_token(top_p):
    logits = torch.tensor([[0.0, 1.0, 0.5]]).repeat(100, 1)
    assert set(pick(logits, Sampling(temperature=1.0, top_p=top_p), torch.Generator().manual_seed(0)).tolist()) == {1}


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"seed": 2**70},
    ],
)
def test_what_nothing_can_be_drawn_with_is_refused(odd):
    with pytest.raises(ConfigError, match=f"{next(iter(odd))} is "):
        Sampling(**odd)


def test_nucleus_never_leaves_the_smallest_set_that_reaches_top_p():
    # probabilities 0.5, 0.3, 0.15, 0.05: top_p 0.7 keeps the first two, in the ratio 5 : 3
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    drawn = pick(logits, Sampling(temperature=1.0, top_p=0.7), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}
    assert (drawn == 0).float().mean().item() == pytest.approx(5 / 8, abs=0.03)


def test_nucleus_on_a_flat_distribution_wider_than_the_shortcut():
    # 3,000 equal tokens: the likeliest 1,024 hold a third, so all must be sorted to reach top_p
    drawn = pick(torch.zeros(2000, 3000), Sampling(temperature=1.0, top_p=0.9), torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) > 1100


def test_sampling_follows_the_temperature():
    logits = torch.tensor([2.0, 0.0]).repeat(4000, 1)
    hot = pick(logits, Sampling(temperature=2.0), torch.Generator().manual_seed(0)).float().mean().item()
    assert hot == pytest.approx(torch.sigmoid(torch.tensor(-1.0)).item(), abs=0.03)


def test_every_ended_answer_counts_as_done_at_once(model, tokenizer):
    done = []
    answers = generate(
        model,
        tokenizer,
        CHATS,
        sampling=Sampling(max_new_tokens=24, temperature=2.0),
        batch_size=2,
        on_answer=done.append,
    )
    assert done == sorted(done)
    assert done[-1] == len(CHATS)
    assert len(done) >= sum(answer.finished for answer in answers)


def test_rows_that_fit_take_a_quarter_of_the_free_memory(model, monkeypatch):
    generate_module = sys.modules["lora_dpo.model.decoding"]
    config = model.config
    # keys and values of 100 tokens, float32: 2 tensors a layer
    size = config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * size * 4 * 100
    monkeypatch.setattr(generate_module, "free_bytes", lambda device: 4 * row * 7 + 3)
    assert rows_that_fit(model, 100) == 7
    assert rows_that_fit(model, 1000) == 1
    monkeypatch.setattr(generate_module, "free_bytes", lambda device: 0)
    assert rows_that_fit(model, 100) == 1
    monkeypatch.setattr(generate_module, "free_bytes", lambda device: 10**12)
    assert rows_that_fit(model, 100) == 128


def test_rows_that_fit_are_as_many_beside_embeddings_that_are_trained_whole(tiny_model_folder, monkeypatch):
    """Their copy is float32, keys and values stay in the base's 16 bits."""
    monkeypatch.setattr(sys.modules["lora_dpo.model.decoding"], "free_bytes", lambda device: 1 << 20)

    def rows(**lora):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
        model = attach_lora(base, LoraSection(rank=2, **lora), seed=0)
        with torch.no_grad():
            kept = model(torch.ones(1, 100, dtype=torch.long), use_cache=True).past_key_values
        row = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
        return rows_that_fit(model, 100), (1 << 20) // 4 // row

    assert rows(modules_to_save=["embed_tokens"]) == rows() == (10, 10)


def answer_of(pieces):
    """The pieces that a generator yields, and what it returns."""
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def test_a_stream_returns_the_answer_that_generate_gives(model, tokenizer):
    sampling = Sampling(max_new_tokens=30, temperature=0.9, seed=3)
    pieces, answer = answer_of(stream(model, tokenizer, CHATS[0], sampling=sampling))
    whole = generate(model, tokenizer, CHATS[:1], sampling=sampling)[0]
    assert "".join(pieces) == answer.text
    assert (answer.text.strip(), answer.tokens, answer.finished) == (whole.text, whole.tokens, whole.finished)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_an_answer_ends_before_the_stop_text_and_shows_nothing_of_it(model, tokenizer, length):
    sampling = Sampling(max_new_tokens=60, temperature=0.9, seed=3)
    prompt = prompt_ids(tokenizer, CHATS[0])
    whole = answer_of(stream_from(model, tokenizer, prompt, sampling=sampling))[1].text
    start = next(at for at in range(10, len(whole)) if "\ufffd" not in whole[at : at + length])
    word = whole[start : start + length]
    pieces, answer = answer_of(stream_from(model, tokenizer, prompt, sampling=sampling, stop=("never", word)))
    assert answer.text == whole[: whole.index(word)] == "".join(pieces)
    assert answer.finished
    assert answer.tokens < 60


def test_text_that_only_begins_like_a_stop_text_is_shown_after_all(model, tokenizer):
    sampling = Sampling(max_new_tokens=40, temperature=0.9, seed=3)
    prompt = prompt_ids(tokenizer, CHATS[0])
    whole = answer_of(stream_from(model, tokenizer, prompt, sampling=sampling))[1]
    stop = [whole.text[at : at + 2] + "\x00" for at in range(len(whole.text))]
    pieces, answer = answer_of(stream_from(model, tokenizer, prompt, sampling=sampling, stop=stop))
    assert answer == whole
    assert "".join(pieces) == whole.text


def test_how_much_may_be_the_beginning_of_a_stop_text():
    assert held_back("one two", ["two three"]) == 3
    assert held_back("one two", ["twice", "o!"]) == 1
    assert held_back("one two", ["zwei"]) == 0
    assert held_back("one two", ["wo"]) == 0  # it is there whole: nothing to wait for
    assert held_back("aa", ["aaab"]) == 2
    assert held_back("", ["a"]) == 0
    assert held_back("text", []) == 0
    assert first_of("one two", ["two", "e t"]) == 2
    assert first_of("one two", ["three"]) is None


# --- nucleus sampling against its definition ------------------------------------------------------


def nucleus_of(logits, temperature, top_p):
    """The tokens of one row's nucleus with their probabilities, in float64: Holtzman et al. 2020, equation 2."""
    probs = torch.softmax(logits.double() / temperature, dim=-1).tolist()
    kept, held = {}, 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if kept and held >= top_p:
            break
        kept[token] = probs[token]
        held += probs[token]
    return {token: prob / held for token, prob in kept.items()}


def mixed_rows(vocabulary=3000):
    """Rows whose nucleus is within the shortcut, beside flat ones that need the whole vocabulary, in turn."""
    draws = torch.Generator().manual_seed(7)
    sharp = torch.randn(2, vocabulary, generator=draws) * 4
    flat = torch.randn(2, vocabulary, generator=draws) * 0.3
    return torch.stack([sharp[0], flat[0], sharp[1], flat[1]])


def test_rows_that_need_the_whole_vocabulary_are_drawn_beside_rows_that_do_not():
    logits, sampling, times = mixed_rows(), Sampling(temperature=0.8, top_p=0.9), 4000
    draws = torch.Generator().manual_seed(0)
    drawn = torch.stack([pick(logits, sampling, draws) for _ in range(times)])
    for row in range(4):
        wanted = nucleus_of(logits[row], 0.8, 0.9)
        assert (len(wanted) > SHORTCUT) == (row % 2 == 1)
        counts = torch.bincount(drawn[:, row], minlength=3000)
        assert set(counts.nonzero().flatten().tolist()) <= set(wanted)
        # the likelier half of the nucleus, as one event: 5 standard deviations of a fair draw at most
        halves, held = [], 0.0
        for token, prob in wanted.items():
            if held + prob > 0.5:
                break
            halves.append(token)
            held += prob
        if halves:
            assert counts[halves].sum().item() / times == pytest.approx(held, abs=5 * (0.25 / times) ** 0.5)
        if row % 2:  # also tokens that the shortcut does not know
            assert len(set(drawn[:, row].tolist()) - set(logits[row].topk(SHORTCUT).indices.tolist())) > 100


@pytest.mark.parametrize("top_p", [0.2, 0.9])
def test_a_row_within_the_shortcut_draws_as_a_sort_of_the_whole_row_does(top_p):
    logits = mixed_rows()[[0, 2]]
    for seed in range(200):
        found = pick(logits, Sampling(temperature=0.8, top_p=top_p), torch.Generator().manual_seed(seed))
        probs = torch.softmax(logits / 0.8, dim=-1)
        top, order = probs.topk(SHORTCUT, dim=-1)
        kept = top.masked_fill((top.cumsum(-1) - top >= top_p).index_fill(1, torch.tensor([0]), False), 0.0)
        drawn = torch.multinomial(kept, 1, generator=torch.Generator().manual_seed(seed))
        assert found.tolist() == order.gather(1, drawn).squeeze(1).tolist()


def test_a_wide_row_changes_no_draw_of_the_others():
    logits, sampling = mixed_rows(), Sampling(temperature=0.8, top_p=0.9)
    for seed in range(100):
        together = pick(logits, sampling, torch.Generator().manual_seed(seed))
        narrow = logits.clone()
        narrow[1], narrow[3] = logits[0], logits[2]
        alone = pick(narrow, sampling, torch.Generator().manual_seed(seed))
        assert together[[0, 2]].tolist() == alone[[0, 2]].tolist()


def test_tokens_are_drawn_where_the_logits_are():
    logits = torch.empty(3, 2000, device="meta")
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        assert pick(logits, sampling, None).device.type == "meta"


@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-6])
def test_logits_never_leave_their_device_to_be_drawn_from(top_p, model, monkeypatch):
    generators, made = [], torch.Generator

    def generator(device=None):
        generators.append(device)
        return made(device)

    def moved(tensor, *nothing, **more):
        raise AssertionError(f"{tuple(tensor.shape)} moved to the CPU")

    monkeypatch.setattr(torch, "Generator", generator)
    monkeypatch.setattr(torch.Tensor, "cpu", moved)
    sampling = Sampling(max_new_tokens=3, temperature=1.0, top_p=top_p)
    assert len(list(decode(model, [[5, 6], [7]], frozenset(), sampling))) == 6
    assert generators == [model.get_input_embeddings().weight.device]
