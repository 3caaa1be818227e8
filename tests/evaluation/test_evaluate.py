"""`lora-dpo eval`: what it measures against independent ways to the same number, and what it calls better."""

import json
import math
import shutil

import pytest
import torch
from transformers import PreTrainedModel

from lora_dpo.adapters.loading import load_policy
from lora_dpo.cli.commands import main
from lora_dpo.data import Origin, TokenPair
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.errors import AdapterError, DataError
from lora_dpo.evaluation.evaluate import AssessPlan, assess, pair_part, ratio_interval
from lora_dpo.evaluation.kl import draw, kl_to_reference, text_losses, windows
from lora_dpo.files import sha256_of
from lora_dpo.judging import open_judge
from lora_dpo.model.decoding import Sampling, answer_of, generate, stop_token_ids

QUICK = AssessPlan(answers=4, kl_answers=3, sampling=Sampling(max_new_tokens=8))
ASKED = [[{"role": "user", "content": text}] for text in ("Say it.", "Now, please, say it once more.")]


@pytest.fixture
def policy(tiny_adapter):
    return load_policy(adapter=tiny_adapter)


# --- token by token -------------------------------------------------------------------------------


def test_drawn_answers_are_those_of_generate(policy):
    tokenizer = policy.base.tokenizer
    sampling = Sampling(max_new_tokens=12)
    drawn = draw(policy.model, tokenizer, ASKED, sampling)
    stops = stop_token_ids(policy.model, tokenizer)
    assert [answer_of(tokenizer, prompt, ids, stops) for prompt, ids in drawn] == generate(
        policy.model, tokenizer, ASKED, sampling=sampling
    )
    assert [prompt for prompt, _ in drawn] == [prompt_ids(tokenizer, one) for one in ASKED]


def test_kl_is_the_sum_over_the_whole_vocabulary(policy):
    prompt, answer = prompt_ids(policy.base.tokenizer, ASKED[0]), [65, 66, 67]
    [(found, tokens)] = kl_to_reference(policy.model, [(prompt, answer)])
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        ours = policy.model(input_ids=ids).logits[0].double().softmax(-1)
        with policy.model.disable_adapter():
            theirs = policy.model(input_ids=ids).logits[0].double().softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + 2)
    expected = sum(float((ours[t] * (ours[t] / theirs[t]).log()).sum()) for t in places)
    assert tokens == 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 0


def test_kl_is_the_mean_log_ratio_of_answers_that_the_policy_draws(policy):
    sampling = Sampling(max_new_tokens=4, temperature=1.0, seed=3)
    drawn = draw(policy.model, policy.base.tokenizer, ASKED * 150, sampling, batch_size=300)
    sums = kl_to_reference(policy.model, drawn)
    log_ratios = []
    for prompt, answer in drawn:
        ids = torch.tensor([prompt + answer])
        at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with torch.no_grad():
            ours = policy.model(input_ids=ids).logits[0].log_softmax(-1)
            with policy.model.disable_adapter():
                theirs = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        log_ratios.append(float((ours - theirs)[at, torch.tensor(answer)].sum()))
    exact, sampled = sum(value for value, _ in sums) / 300, sum(log_ratios) / 300
    error = math.sqrt(sum((value - sampled) ** 2 for value in log_ratios) / 299 / 300)
    assert abs(exact - sampled) < 4 * error
    assert exact > 0


def test_a_policy_without_effect_has_no_kl(policy):
    with torch.no_grad():
        for name, value in policy.model.named_parameters():
            if "lora_B" in name:
                value.zero_()
    sums = kl_to_reference(policy.model, draw(policy.model, policy.base.tokenizer, ASKED, Sampling(max_new_tokens=5)))
    assert all(abs(value) < 1e-5 for value, _ in sums)


def test_text_losses_are_the_models_own(policy):
    piece = [*b"To be, or not to be"]
    [(found, tokens)] = text_losses(policy.model, [piece])
    ids = torch.tensor([piece])
    with torch.no_grad():
        expected = policy.model(input_ids=ids, labels=ids).loss.item() * (len(piece) - 1)
    assert tokens == len(piece) - 1
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("length", "sizes"), [(0, []), (1, []), (2, [2]), (9, [4, 4]), (10, [4, 4, 2])])
def test_windows_leave_no_piece_of_one_token(length, sizes):
    assert [len(piece) for piece in windows(range(length), 4)] == sizes


# --- numbers --------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected):
    return TokenPair(prompt, chosen, rejected, Origin("t", 1), False)


def test_pairs_of_one_prompt_are_one_unit():
    tokens = [pair([1], [5], [6, 6]), pair([1], [5], [7]), pair([2], [5, 5], [6]), pair([3], [5], [6])]
    found = pair_part(tokens, [2.0, 0.0, -1.0, 0.0], [1.0, 1.0, 1.0, 0.0], beta=0.1)
    assert found.accuracy.n == 3
    assert found.accuracy.value == pytest.approx((0.5 + 0.0 + 0.5) / 3)  # win and loss; loss; tie
    assert found.margin.value == pytest.approx(0.1 * ((1 - 1) / 2 - 2 + 0) / 3)
    assert found.pairs == 4


def test_a_ratio_and_its_interval():
    found = ratio_interval([(2.0, 10), (1.0, 10), (3.0, 10)])
    assert found.value == pytest.approx(6 / 30)
    # with equal token counts it is the t interval of the means a token
    assert found.high - found.value == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-3)
    assert not ratio_interval([(2.0, 10)]).known


def test_an_assessment_agrees_with_plain_scores(policy, write_pairs, tiny_adapter):
    from lora_dpo.data import read_pairs, tokenize_pairs
    from lora_dpo.engine.scoring import score_pairs
    from lora_dpo.evaluation.metrics import pair_metrics

    data = str(write_pairs(count=6))
    found = assess(policy, [data], plan=QUICK, judge=open_judge(["rules:length<=2"]))
    tokens, _ = tokenize_pairs(policy.base.tokenizer, read_pairs(data)[0], max_length=2048)
    ours = score_pairs(policy.model, tokens, pad_id=257)
    with policy.model.disable_adapter():
        theirs = score_pairs(policy.model, tokens, pad_id=257)
    plain = pair_metrics(ours, theirs, beta=0.1)
    assert found.pairs.accuracy.value == pytest.approx(plain.accuracy)
    assert found.pairs.margin.value == pytest.approx(plain.margin, rel=1e-5)
    assert found.adapter == str(tiny_adapter)
    assert len(found.rows) == 4
    assert set(found.numbers()) == {
        "accuracy", "accuracy-lc", "margin", "win-rate", "win-rate-lc", "kl", "length", "length-change", "finished",
        "repetition", "refusals",
    }  # fmt: skip
    json.dumps(found.to_json(), allow_nan=False)


def test_against_itself_every_prompt_is_a_tie(policy, write_pairs, tiny_adapter, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(tiny_adapter, twin)
    plan = AssessPlan(answers=4, kl_answers=0, sampling=Sampling(max_new_tokens=8), against=str(twin))
    found = assess(policy, [str(write_pairs(count=4))], plan=plan, judge=open_judge(["rules:chars<=5"]))
    assert found.contest.outcomes == (0.5,) * 4
    assert found.length_change.value == 0
    assert found.against == "twin"
    assert found.called == "no better than chance"
    assert policy.model.active_adapter == "default"


def test_another_adapter_answers_as_it_does_alone(policy, write_pairs, make_adapter, tmp_path):
    other = make_adapter(tmp_path / "other", seed=5)
    plan = AssessPlan(answers=4, kl_answers=0, sampling=Sampling(max_new_tokens=8), against=str(other))
    found = assess(policy, [str(write_pairs(count=4))], plan=plan)
    alone = load_policy(adapter=other)
    asked = [[{"role": "user", "content": row[0]}] for row in found.rows]
    texts = [one.text for one in generate(alone.model, alone.base.tokenizer, asked, sampling=plan.sampling)]
    systems = [index for index, row in enumerate(found.rows) if "Be brief." in row[0]]
    assert systems == []
    # prompts with a system turn answer another conversation: compare the others
    plain = [index for index, text in enumerate(asked) if int(text[0]["content"].split()[1]) % 3]
    assert [texts[index] for index in plain] == [found.rows[index][1] for index in plain]


def test_one_base_is_loaded_once(tiny_adapter, write_pairs, make_adapter, tmp_path, monkeypatch):
    loads = []
    original = PreTrainedModel.from_pretrained.__func__

    def counted(cls, *args, **kwargs):  # every way to load weights ends here
        loads.append(args[0])
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    other = make_adapter(tmp_path / "other", seed=5)
    loads.clear()
    plan = AssessPlan(answers=2, kl_answers=2, sampling=Sampling(max_new_tokens=4), against=str(other))
    assess(load_policy(adapter=tiny_adapter), [str(write_pairs(count=4))], plan=plan)
    assert len(loads) == 1


def test_plain_text_is_scored_with_and_without_the_adapter(policy, write_pairs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20, encoding="utf-8")
    plan = AssessPlan(answers=0, kl_answers=0, text=str(text))
    found = assess(policy, [str(write_pairs(count=4))], plan=plan)
    assert found.text.tokens == 20 * 53 - 3  # three pieces, each without its first token
    assert found.text.ratio.value == pytest.approx(found.text.adapter / found.text.base, rel=1e-5)
    assert (found.ours, found.contest, found.kl) == (None, None, None)


def test_what_cannot_be_assessed_is_said(policy, write_pairs, tiny_model_folder, tmp_path):
    data = [str(write_pairs(count=4))]
    with pytest.raises(AdapterError, match="no adapter to assess"):
        assess(load_policy(str(tiny_model_folder), quantize="none"), data)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="fewer than two tokens"):
        assess(policy, data, plan=AssessPlan(answers=0, kl_answers=0, text=str(tmp_path / "short.txt")))
    with pytest.raises(DataError, match="No pair is left"):
        assess(policy, data, plan=AssessPlan(max_length=2))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def place(tiny_adapter, write_pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_adapter, "adapters/mine")
    write_pairs("eval.jsonl", count=5)
    return ["eval", "mine", "--data", "eval.jsonl", "--answers", "2", "--max-new-tokens", "6", "--kl-answers", "2"]


def test_the_command_writes_numbers_and_a_page(place, capsys, tmp_path):
    assert main([*place, "--judge", "rules:length<=2", "--judge", "rules:no-repeat", "--require", "kl>=0"]) == 0
    shown = capsys.readouterr().out
    assert "win rate" in shown
    assert "met" in shown
    stored = json.loads((tmp_path / "evaluations/mine/eval.json").read_text())
    assert stored["contest"]["wins"] + stored["contest"]["ties"] + stored["contest"]["losses"] == 2
    assert (tmp_path / "evaluations/mine/report.html").read_text().startswith("<!doctype html>")
    assert main(place) == 0
    assert (tmp_path / "evaluations/mine-2/eval.json").is_file()


def test_json_is_one_object_and_an_unmet_requirement_is_status_3(place, capsys):
    assert main([*place, "--json", "--require", "accuracy>1", "--require", "accuracy<=1"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert [one["met"] for one in found["requirements"]] == [False, True]


def test_data_that_was_trained_on_is_said(place, capsys, tmp_path):
    passport = tmp_path / "adapters/mine/passport.json"
    stored = json.loads(passport.read_text())
    stored["data"] = {"train": {"sha256": {"elsewhere.jsonl": sha256_of(tmp_path / "eval.jsonl")}, "pairs": 5}}
    passport.write_text(json.dumps(stored))
    assert main(place) == 0
    says = "The adapter was trained on eval.jsonl"
    assert says in capsys.readouterr().out
    assert says in json.loads((tmp_path / "evaluations/mine/eval.json").read_text())["warnings"][0]
    assert says in (tmp_path / "evaluations/mine/report.html").read_text()
    (tmp_path / "other.jsonl").write_text((tmp_path / "eval.jsonl").read_text() + "\n")
    (tmp_path / "adapters/mine/held-out.jsonl").write_text("{}\n")
    assert main([*place, "--data", "other.jsonl", "--json"]) == 0
    warning = json.loads(capsys.readouterr().out)["warnings"][0]
    assert "trained on eval.jsonl:" in warning
    assert warning.endswith("such as those that its run held out: --data adapters/mine/held-out.jsonl.")


def test_votes_on_other_weights_are_said(place, capsys, tmp_path):
    def row(number, **facts):
        sides = {"chosen": {"who": "mine", **facts}, "rejected": {"who": "base"}}
        return {"prompt": f"q{number}", "chosen": "a", "rejected": "b", "origin": {"vote": "a", **sides}}

    rows = [row(1), row(2, adapter_sha256="0" * 64), row(3, adapter_sha256="0" * 64)]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert main([*place, "--votes", "votes.jsonl"]) == 0
    assert "2 votes under these names are on other weights" in capsys.readouterr().out
    stored = json.loads((tmp_path / "evaluations/mine/eval.json").read_text())
    assert (stored["contest"]["votes"], stored["contest"]["foreign_votes"]) == (1, 2)
    assert "2 votes under these names" in (tmp_path / "evaluations/mine/report.html").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--require", "win-rate>0.5"], "--judge or --votes"),
        (["--require", "acuracy>0.5"], "Did you mean accuracy"),
        (["--judge", "rules:lenght<=3"], "Did you mean length"),
        (["--judge", "rules:json", "--votes", "v.jsonl"], "Give one of them"),
        (["--against", "nobody"], "There is no adapter nobody"),
        (["--quantize", "nf5"], "Did you mean nf4"),
        (["--output", "adapters"], "already exists"),
        (["--criterion", "good"], "there is none"),
        (["--votes", "nowhere.jsonl"], "does not exist"),
        (["--text", "nowhere.txt"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(place, options, says, capsys, tmp_path):
    (tmp_path / "v.jsonl").write_text("{}\n")
    assert main([*place, *options]) == 1
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "evaluations").exists()


def test_a_missing_file_is_one_line(place, capsys):
    assert main(["eval", "mine", "--data", "nowhere.jsonl"]) == 1
    assert "does not exist" in capsys.readouterr().err
