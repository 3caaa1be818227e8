import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_dpo.config.recipe import LoraSection
from lora_dpo.data import Origin, TokenPair
from lora_dpo.data.questions import is_correct, read_questions
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.errors import DataError
from lora_dpo.evaluation.metrics import answer_metrics, pair_metrics
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Answer
from lora_dpo.model.lora import attach_lora, reference


def pair(prompt, chosen, rejected):
    return TokenPair(prompt, chosen, rejected, Origin("t", 1), False)


PAIRS = [
    pair([257, 5, 6, 7], [8, 9, 258], [10, 258]),
    pair([257, 65], [66, 67, 68, 69, 70, 71, 258], [72]),
    pair([257, *range(40, 70)], [80], [81, 82, 258]),
]


def test_metrics_of_a_worked_example():
    # h(chosen) = 2, 0, -1; h(rejected) = 1, 0, 1: one win, one tie, one loss
    metrics = pair_metrics(
        ([-8.0, -5.0, -7.0], [-9.0, -4.0, -2.0]), ([-10.0, -5.0, -6.0], [-10.0, -4.0, -3.0]), beta=0.1
    )
    assert metrics.accuracy == pytest.approx(0.5)
    assert metrics.margin == pytest.approx(0.1 * (1 + 0 - 2) / 3)
    assert metrics.chosen_logratio == pytest.approx(1 / 3)
    assert metrics.rejected_logratio == pytest.approx(2 / 3)


def test_a_policy_equal_to_its_reference_scores_one_half():
    scores = ([-3.0, -4.0], [-1.0, -9.0])
    assert pair_metrics(scores, scores, beta=0.1).accuracy == 0.5


def test_scores_equal_the_models_own_loss(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    chosen, rejected = score_pairs(model, PAIRS, pad_id=258)
    for one, got in [(p, (c, r)) for p, c, r in zip(PAIRS, chosen, rejected, strict=True)]:
        for answer, score in zip((one.chosen, one.rejected), got, strict=True):
            ids = torch.tensor([one.prompt + answer])
            labels = ids.clone()
            labels[:, : len(one.prompt)] = -100
            with torch.no_grad():
                expected = -model(input_ids=ids, labels=labels).loss.item() * len(answer)
            assert score == pytest.approx(expected, rel=1e-5)


def test_scoring_as_reference_ignores_the_adapter_and_leaves_it_on(tiny_model_folder):
    base = load_base(str(tiny_model_folder), quantize="none")
    plain = score_pairs(base.model, PAIRS, pad_id=258)
    model = attach_lora(base.model, LoraSection(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    adapted = score_pairs(model, PAIRS, pad_id=258)
    with reference(model):
        assert score_pairs(model, PAIRS, pad_id=258)[0] == pytest.approx(plain[0], rel=1e-5)
    assert score_pairs(model, PAIRS, pad_id=258)[0] == pytest.approx(adapted[0], rel=1e-6)
    assert adapted[0] != pytest.approx(plain[0], rel=1e-3)


@pytest.mark.parametrize(
    ("text", "accepted", "right"),
    [
        ("The capital is Rome.", ("Rome",), True),
        ("It is romeo.", ("Rome",), False),
        ("about 1,000 grams", ("1000", "1,000"), True),
        ("18 legs", ("8",), False),
        ("It has EIGHT legs", ("8", "eight"), True),
        ("", ("a",), False),
    ],
)
def test_is_correct_wants_whole_words(text, accepted, right):
    assert is_correct(text, accepted) is right


def test_answer_metrics():
    from lora_dpo.data.questions import Question

    metrics = answer_metrics(
        [Answer("a b", 2, True), Answer("a b c d", 4, False)],
        chosen_mean_tokens=5.0,
        questions=[Question("?", ("x",)), Question("?", ("y",))],
        question_answers=[Answer("x", 1, True), Answer("z", 1, True)],
    )
    assert (metrics.mean_tokens, metrics.finished, metrics.correct) == (3.0, 0.5, 0.5)


def test_questions_without_accepted_answers_are_refused_with_their_line(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "a?", "accepted": ["b"]}\n{"prompt": "c?"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_questions(str(file))
