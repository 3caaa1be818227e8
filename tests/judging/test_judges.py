"""Judges: the rules by worked examples, the grammar, the protocol's checks, reward models, the implicit reward."""

import re

import pytest
import torch

from lora_dpo.config.recipe import LoraSection
from lora_dpo.data import Origin, PreferencePair
from lora_dpo.data.prompts import Prompt
from lora_dpo.data.tokenize import tokenize_pair
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.errors import ConfigError, JudgeError
from lora_dpo.judging import Means, open_judge
from lora_dpo.judging.judge import Judge
from lora_dpo.judging.rules import last_number
from lora_dpo.judging.specs import check_specs, is_implicit, is_rule
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Answer
from lora_dpo.model.lora import attach_lora, reference


def prompt(*accepted, text="What is 6 times 7?"):
    return Prompt(({"role": "user", "content": text},), "prompts.jsonl", 3, accepted)


def answers(*texts, finished=True):
    return [Answer(text, len(text.split()), finished) for text in texts]


def scores(spec, *texts, accepted=(), finished=True):
    return open_judge([spec]).score(prompt(*accepted), answers(*texts, finished=finished))


# --- rules ----------------------------------------------------------------------------------------


def test_length_counts_words_and_falls_to_zero_at_twice_the_limit():
    four, five, six, eight, nine = ("w " * count for count in (4, 5, 6, 8, 9))
    assert scores("rules:length<=4", four, five, six, eight, nine) == [1, 0.75, 0.5, 0, 0]
    assert scores("rules:length>=4", "a b", four, nine) == [0.5, 1, 1]


@pytest.mark.parametrize(
    ("rule", "text", "score"),
    [
        ("sentences<=1", "One. And no more here", 0),
        ("sentences<=2", "One. And no more here", 1),
        ("sentences<=1", "Version 3.5 is out.", 1),
        ("chars<=4", "abcde", 0.75),
        ("tokens>=4", "two words", 0.5),
        ("regex=^(Yes|No)", "No.", 1),
        ("regex=^(Yes|No)", "Oh. No.", 0),
        ("regex=a=b", "a=b", 1),
        ("no-regex=as an AI", "I, as an AI,", 0),
        ("no-regex=as an AI", "I think", 1),
        ("keywords=please,thank you", "Thank you!", 0.5),
        ("keywords=art", "a start", 0),
        ("no-keywords=sorry,cannot", "Sorry, no.", 0),
        ("no-keywords=sorry,cannot", "Fine.", 1),
        ("json", '{"a": [1, 2]}', 1),
        ("json", 'Here it is: {"a": 1}', 0),
        ("json", "[" * 100_000, 0),
        ("no-repeat", "the cat sat on the mat", 1),
        ("no-repeat", "a b c a b c", 0.75),
        ("finished", "Yes.", 1),
    ],
)
def test_a_rule_scores_as_its_name_says(rule, text, score):
    assert scores(f"rules:{rule}", text) == [score]


def test_an_answer_that_was_cut_off_is_not_finished():
    assert scores("rules:finished", "Yes", finished=False) == [0]


@pytest.mark.parametrize("rule", ["length<=4", "no-regex=x", "no-keywords=x", "no-repeat", "finished"])
def test_an_empty_answer_keeps_no_rule(rule):
    assert scores(f"rules:{rule}", " ") == [0]


def test_known_answers():
    assert scores("rules:exact", " forty-two.", "It is forty-two", accepted=["Forty-two"]) == [1, 0]
    assert scores("rules:contains", "It is forty-two!", "fort", accepted=["42", "forty-two"]) == [1, 0]
    assert scores("rules:numeric", "6 * 7 = 42.0", "42 or 43", "none", accepted=["42"]) == [1, 0, 0]
    assert scores("rules:numeric", "1,234.5 apples", accepted=["1234.5"]) == [1]


@pytest.mark.parametrize("rule", ["exact", "contains", "numeric"])
def test_a_prompt_without_known_answers_is_not_judged_by_them(rule):
    assert scores(f"rules:{rule}", "42") == [None]
    assert open_judge([f"rules:{rule}"]).needs_accepted


@pytest.mark.parametrize(
    ("text", "number"), [("-3 then -4.5", -4.5), ("in 1,000.", 1000), (".5", 0.5), ("no", None), ("a,b", None)]
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("rules:lenght<=3", "Did you mean length?"),
        ("rules:length=3", "rules:length<=40"),
        ("rules:length<=0", "allows no answer"),
        ("rules:length<=" + "9" * 5000, "is not written as it must be"),
        ("9" * 5000 + "*rules:json", "is no judge"),
        ("rules:regex=(", "no regular expression"),
        ("rules:regex", "'rules:regex="),
        ("rules:keywords=,", "'rules:keywords=please,thanks'"),
        ("rules:no-keywords= , ", "'rules:no-keywords=please,thanks'"),
        ("json", "is no judge"),
        ("length<=40", "Did you mean rules:length<=40?"),
        ("llm:gpt", "llm:MODEL@URL"),
        ("llm:m@localhost:1/v1", "llm:MODEL@URL"),
        ("llm:m@https://x/v1?key=1", "has a '?'"),
        ("llm:m@https://user:word@x/v1", "llm:MODEL@URL"),
        ("implicit:0.1", "write implicit alone"),
        ("reward:", "without a model"),
        ("", "is no judge"),
    ],
)
def test_a_spec_that_means_nothing_is_refused_before_any_model_is_loaded(spec, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        check_specs([spec])
    with pytest.raises(ConfigError, match=re.escape(says)):
        open_judge([spec])


@pytest.mark.parametrize(
    ("spec", "is_it"),
    [("implicit", True), (" 0.5*implicit", True), ("my_judge:implicit", False), ("2*my_judge:not_implicit", False)],
)
def test_which_judge_is_the_implicit_one(spec, is_it):
    assert is_implicit(spec) is is_it


@pytest.mark.parametrize(
    ("spec", "is_it"),
    [
        ("rules:length<=40", True),
        (" 0.5*rules:finished", True),
        (r"rules:no-regex=^\W*(to|one)", True),  # a star that is no weight
        (r"2*rules:regex=.*rules:", True),
        ("implicit", False),
        ("my_judge:rules", False),
    ],
)
def test_which_judge_is_a_rule(spec, is_it):
    assert is_rule(spec) is is_it


def test_a_mistyped_kind_looks_like_a_module_and_is_named():
    with pytest.raises(JudgeError, match=r"No module named 'rule'\. Did you mean rules\?"):
        check_specs(["rule:json"])


# --- several, and a user's own --------------------------------------------------------------------


def test_several_judges_add_up_with_their_weights():
    judge = open_judge(["rules:json", "0.5*rules:length<=1", "-2*rules:finished"])
    assert judge.spec == "rules:json + 0.5*rules:length<=1 + -2*rules:finished"
    assert judge.score(prompt(), answers("1", "a b c")) == [-0.5, -2]


def test_a_sum_with_an_unknown_part_is_unknown():
    assert open_judge(["rules:json", "rules:exact"]).score(prompt(), answers("1")) == [None]


def test_a_function_of_a_users_own_module_is_a_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_of_mine.py").write_text(
        "import numpy\n"
        "def score(prompt, answers):\n"
        "    return [numpy.float32(len(answer.text) + len(prompt.text)) for answer in answers]\n"
    )
    judge = open_judge(["judge_of_mine:score"])
    assert judge.score(prompt(text="??"), answers("a", "abc")) == [3, 5]
    assert re.fullmatch("[0-9a-f]{64}", judge.facts["source_sha256"])
    with pytest.raises(JudgeError, match="has no function sore"):
        open_judge(["judge_of_mine:sore"])
    with pytest.raises(JudgeError, match="No module named 'judge_of_yours'"):
        open_judge(["judge_of_yours:score"])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda prompt, answers: [1], "1 scores for 2 answers"),
        (lambda prompt, answers: [1, float("nan")], "a finite number, or None"),
        (lambda prompt, answers: [1, "2"], "a finite number, or None"),
        (lambda prompt, answers: [(1, "good"), (0, "bad")], r"gave the score \(1, 'good'\)"),
        (lambda prompt, answers: [torch.ones(2), 1], "a finite number, or None"),
        (lambda prompt, answers: [10**400, 1], "a finite number, or None"),
        (lambda prompt, answers: [1 / 0], "ZeroDivisionError: division by zero"),
        (lambda prompt, answers: None, "TypeError"),
        (lambda prompt: [], "TypeError"),
    ],
)
def test_what_a_judge_returns_is_checked_and_the_prompt_named(function, says):
    with pytest.raises(JudgeError, match=says) as raised:
        Judge("mine:score", function).score(prompt(), answers("a", "b"))
    assert "The judge mine:score, on prompts.jsonl row 3," in str(raised.value)


# --- reward models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tokenizer, tmp_path_factory):
    return make_classifier(tokenizer, tmp_path_factory.mktemp("reward") / "tiny-reward", num_labels=1)


def make_classifier(tokenizer, folder, *, num_labels):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        num_labels=num_labels,
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_a_batch_as_plain_transformers_scores_one_by_one(reward_folder, tokenizer):
    from transformers import AutoModelForSequenceClassification

    judge = open_judge([f"reward:{reward_folder}"])
    texts = ["Yes.", "A much longer answer, to be padded around.", "No!"] * 4  # more than a batch
    found = judge.score(prompt(), answers(*texts))
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    for text, score in zip(texts, found, strict=True):
        turns = [*prompt().messages, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"][:, :-1]
        assert ids[0, -1] == tokenizer.eos_token_id  # the template's last line break is not part of the answer
        assert score == pytest.approx(plain(input_ids=ids).logits.item(), abs=1e-5)
    assert len({round(score, 4) for score in found}) == 3  # beside other rows a row may round otherwise
    assert "GB of memory beside the policy" in judge.about


def test_an_answer_longer_than_the_reward_models_window_is_not_scored(reward_folder):
    assert open_judge([f"reward:{reward_folder}"]).score(prompt(), answers("x" * 300, "x"))[0] is None


def test_a_chat_model_is_no_reward_model_and_that_is_said_once(tiny_model_folder, monkeypatch):
    import logging

    library = logging.getLogger("transformers")
    logged = []
    catch = logging.Handler(logging.WARNING)
    monkeypatch.setattr(catch, "emit", logged.append)
    library.addHandler(catch)
    try:
        with pytest.raises(JudgeError, match=r"no reward model: score\.weight"):
            open_judge([f"reward:{tiny_model_folder}"])
    finally:
        library.removeHandler(catch)
    assert [record.getMessage() for record in logged] == []


def test_a_classifier_of_many_classes_is_no_reward_model(tokenizer, tmp_path):
    folder = make_classifier(tokenizer, tmp_path / "three", num_labels=3)
    with pytest.raises(JudgeError, match="sorts into 3 classes"):
        open_judge([f"reward:{folder}"])


def test_a_reward_model_that_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(JudgeError, match=r"cannot be loaded: .*no config\.json") as raised:
        open_judge([f"reward:{tmp_path}"])
    assert "\n" not in str(raised.value)


def test_pickled_weights_are_never_loaded(reward_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    for path in reward_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(JudgeError, match="cannot be loaded"):
        open_judge([f"reward:{tmp_path}"])


# --- the implicit reward --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
    model = attach_lora(base.model, LoraSection(rank=4), seed=0).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return base, model


@pytest.mark.parametrize("texts", [["Yes."], ["Yes.", "No, never."], ["Yes.", "No, never.", "é"]])
def test_the_implicit_reward_is_beta_times_the_log_ratio(trained, texts):
    base, model = trained
    judge = open_judge(["implicit"], Means(base=base, policy=model, beta=0.3))
    found = judge.score(prompt(), answers(*texts))
    for text, score in zip(texts, found, strict=True):
        side = ({"role": "assistant", "content": text},)
        pair = PreferencePair(prompt=prompt().messages, chosen=side, rejected=side, origin=Origin("here", 1))
        tokens = tokenize_pair(base.tokenizer, pair, max_length=None)
        ids = torch.tensor([tokens.prompt + tokens.chosen])
        logps = {}
        for name, logits in (("policy", model(ids).logits), ("ref", with_reference(model, ids))):
            rows = torch.log_softmax(logits[0, len(tokens.prompt) - 1 : -1].double(), dim=-1)
            logps[name] = rows.gather(1, ids[0, len(tokens.prompt) :, None]).sum().item()
        assert score == pytest.approx(0.3 * (logps["policy"] - logps["ref"]), abs=1e-4)
        assert abs(score) > 1e-3


def with_reference(model, ids):
    with reference(model):
        return model(ids).logits


def test_the_implicit_judge_needs_an_adapter():
    with pytest.raises(ConfigError, match="--adapter"):
        open_judge(["implicit"])


def test_scoring_leaves_the_policy_as_it_was(trained):
    base, model = trained
    pair = PreferencePair(
        prompt=prompt().messages,
        chosen=({"role": "assistant", "content": "a"},),
        rejected=({"role": "assistant", "content": "b"},),
        origin=Origin("here", 1),
    )
    tokens = [tokenize_pair(base.tokenizer, pair, max_length=None)]
    before = score_pairs(model, tokens, pad_id=0)
    open_judge(["implicit"], Means(base=base, policy=model)).score(prompt(), answers("a", "b"))
    assert score_pairs(model, tokens, pad_id=0) == before
