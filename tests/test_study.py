"""The study of DPO and PPO: its maths by hand and by enumeration, PPO on a tiny model, and the whole of it once."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import PAIRS, build, columns, pair, tiny

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks.dpo_vs_ppo import lab as lab_module  # noqa: E402
from benchmarks.dpo_vs_ppo import maths, report, study  # noqa: E402
from benchmarks.dpo_vs_ppo.lab import Lab, kl_of, log_ratios, rows_of, score  # noqa: E402
from benchmarks.dpo_vs_ppo.ppo import PPO, PPOSettings, train_ppo  # noqa: E402
from benchmarks.dpo_vs_ppo.presets import PRESETS  # noqa: E402
from benchmarks.dpo_vs_ppo.prompts import FAMILIES, UNSEEN, of_split, openings  # noqa: E402
from benchmarks.dpo_vs_ppo.reward import rewards  # noqa: E402
from lora_dpo import DPOTrainer, load_base  # noqa: E402
from lora_dpo.config.recipe import LoraSection  # noqa: E402


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- advantages -----------------------------------------------------------------------------------


def test_advantages_by_hand():
    """δ2 = 1 - 0.4 = 0.6; δ1 = 0.9·0.4 - 0.2 = 0.16, A1 = 0.16 + 0.72·0.6; δ0 = 0.9·0.2 - 0.5, A0 = δ0 + 0.72·A1."""
    found, returns = maths.gae(t([0, 0, 1]), t([0.5, 0.2, 0.4]), t([1, 1, 1]), gamma=0.9, lam=0.8)
    assert found[0].tolist() == pytest.approx([-0.32 + 0.72 * 0.592, 0.592, 0.6])
    assert returns[0].tolist() == pytest.approx([0.60624, 0.792, 1.0])


def test_advantages_end_with_the_answer():
    short, _ = maths.gae(t([0, 1]), t([0.5, 0.2]), t([1, 1]), gamma=0.9, lam=0.8)
    padded, returns = maths.gae(t([0, 1, 7]), t([0.5, 0.2, 9]), t([1, 1, 0]), gamma=0.9, lam=0.8)
    assert padded[0].tolist() == pytest.approx([*short[0].tolist(), 0.0])
    assert returns[0, 2] == 0


def test_with_lambda_1_returns_are_the_rewards_to_come_and_with_0_advantages_are_td_errors():
    draws = torch.Generator().manual_seed(0)
    reward, value = torch.rand(3, 5, generator=draws), torch.rand(3, 5, generator=draws)
    mask = torch.ones(3, 5)
    _, returns = maths.gae(reward, value, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(returns, reward.flip(1).cumsum(1).flip(1))
    advantages, _ = maths.gae(reward, value, mask, gamma=0.7, lam=0.0)
    following = torch.cat([value[:, 1:], torch.zeros(3, 1)], dim=1)
    assert torch.allclose(advantages, reward + 0.7 * following - value)


def test_rewards_of_tokens_are_the_kl_penalty_and_the_score_at_the_end():
    found = maths.token_rewards(
        t(2.0, 3.0),
        t([-1, -2, -9], [-1, -1, -1]),
        t([-2, -1, -9], [-1, -1, -3]),
        t([1, 1, 0], [1, 1, 1]),
        kl_weight=0.5,
    )
    assert found.tolist() == [[-0.5, 0.5 + 2.0, 0.0], [0.0, 0.0, -1.0 + 3.0]]


def test_whitened_values_have_mean_0_and_variance_1_where_they_count():
    found = maths.whiten(t([1, 2, 3], [6, 100, 100]), t([1, 1, 1], [1, 0, 0]))
    assert found[1, 1:].tolist() == [0, 0]
    kept = found[[0, 0, 0, 1], [0, 1, 2, 0]]
    assert kept.mean() == pytest.approx(0, abs=1e-9)
    assert (kept**2).mean() == pytest.approx(1, abs=1e-6)


# --- the clipped loss -----------------------------------------------------------------------------


def clipped(ratio, advantage):
    loss, share = maths.clipped_loss(t([math.log(ratio)]), t([0.0]), t([advantage]), t([1.0]), clip=0.2)
    return float(-loss), share


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "share"),
    [
        (1.5, 1.0, 1.2, 1.0),  # better, and far enough already
        (0.5, 1.0, 0.5, 0.0),  # better, but it fell: pulled back
        (0.5, -1.0, -0.8, 1.0),  # worse, and far enough already
        (1.5, -1.0, -1.5, 0.0),  # worse, but it rose: pushed back
        (1.1, 2.0, 2.2, 0.0),
    ],
)
def test_the_clipped_objective_in_each_of_its_cases(ratio, advantage, objective, share):
    assert clipped(ratio, advantage) == (pytest.approx(objective), share)


def test_the_first_step_is_the_policy_gradient_and_padding_has_none():
    logps = t([-1.0, -2.0, -3.0]).requires_grad_()
    advantages, mask = t([0.5, -2.0, 9.0]), t([1, 1, 0])
    loss, share = maths.clipped_loss(logps, logps.detach(), advantages, mask, clip=0.2)
    loss.backward()
    assert logps.grad.tolist() == [[-0.25, 1.0, 0.0]]
    assert share == 0


# --- KL -------------------------------------------------------------------------------------------


def test_kl_of_answers_by_enumeration():
    """Two tokens of three words: E over all nine answers of the sum of next-token KLs is KL(π‖π_ref) of answers."""
    draws = torch.Generator().manual_seed(0)
    first = torch.log_softmax(torch.randn(2, 3, generator=draws), dim=-1)  # policy, reference
    second = torch.log_softmax(torch.randn(2, 3, 3, generator=draws), dim=-1)  # given the first word
    whole, summed = 0.0, 0.0
    for a, b in itertools.product(range(3), repeat=2):
        policy, ref = (float(first[i, a] + second[i, a, b]) for i in (0, 1))
        whole += math.exp(policy) * (policy - ref)
        tables = [torch.stack([first[i], second[i, a]])[None] for i in (0, 1)]
        summed += math.exp(policy) * float(maths.exact_kl(*tables).sum())
    assert summed == pytest.approx(whole, rel=1e-6)
    assert whole > 0.1


def test_kl_of_a_policy_with_itself_is_0():
    table = torch.log_softmax(torch.randn(2, 3, 5), dim=-1)
    assert maths.exact_kl(table, table).abs().max() == 0


# --- best of n ------------------------------------------------------------------------------------


def test_the_best_of_n_is_the_mean_over_all_choices():
    scores = [0.3, -1.0, 0.3, 2.0, 0.0]
    for n in range(1, 6):
        choices = [max(some) for some in itertools.combinations(scores, n)]
        assert maths.expected_best(scores, n) == pytest.approx(sum(choices) / len(choices))


def test_kl_of_best_of_n():
    assert maths.best_of_n_kl(1) == 0
    assert maths.best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)


def test_kl_of_best_of_n_by_enumeration():
    """Without ties it is exact in the limit of many answers: here 400, equally likely."""
    size, n = 400, 4
    best = np.diff((np.arange(size + 1) / size) ** n)  # chance that the best of n is the i-th worst
    assert np.sum(best * np.log(best * size)) == pytest.approx(maths.best_of_n_kl(n), rel=0.02)


# --- pairs ----------------------------------------------------------------------------------------


def test_agreement_is_the_share_of_unequal_pairs_in_the_same_order():
    # (0, 1) is tied in truth, (0, 2) and (0, 3) are right, (1, 2) and (2, 3) wrong, (1, 3) is a tied guess
    assert maths.agreement([1.0, 4.0, 3.0, 4.0], [0.0, 0.0, 0.5, 0.3]) == pytest.approx((1 + 1 + 0 + 0.5 + 0) / 5)
    assert maths.agreement([1.0, 2.0], [0.3, 0.3]) is None
    assert maths.agreement([-3.0, -1.0, 2.0], [0.0, 0.1, 0.2]) == 1.0


def test_pairs_are_best_with_worst_and_never_ties():
    assert maths.best_and_worst([0.1, 0.9, 0.5, -1.0], most=1) == [(1, 3)]
    assert maths.best_and_worst([0.1, 0.9, 0.5, -1.0], most=5) == [(1, 3), (2, 0)]
    assert maths.best_and_worst([0.0, 0.0, 0.0], most=2) == []
    assert maths.best_and_worst([0.0, 1.0, 0.0, 0.0], most=2) == [(1, 3)]


def test_exactly_the_share_of_labels_is_wrong_and_the_seed_decides_which():
    pairs = [(i, i + 100) for i in range(40)]
    found = maths.flip(pairs, 0.2, seed=1)
    assert sum(a != b for a, b in zip(found, pairs, strict=True)) == 8
    assert all(set(a) == set(b) for a, b in zip(found, pairs, strict=True))
    assert found == maths.flip(pairs, 0.2, seed=1)
    assert found != maths.flip(pairs, 0.2, seed=2)
    assert maths.flip(pairs, 0.0, seed=1) == pairs


def test_the_smoothed_loss_is_made_of_trls_two(tiny_model_folder, tmp_path):
    """(1-ε)·L(pair) + ε·L(pair turned round), by stock TRL's plain loss."""
    turned = [pair(one.prompt, one.rejected, one.chosen) for one in PAIRS]

    def loss(pairs, name, **settings):
        trainer = build(DPOTrainer, tiny("llama"), tiny_model_folder, tmp_path / name, pairs=pairs, **settings)
        batch = trainer._prepare_inputs(trainer.data_collator(columns(pairs)))
        found = float(trainer.compute_loss(trainer.model, batch))
        trainer.close()
        return found

    plain, wrong = loss(PAIRS, "a", loss_type=["sigmoid"]), loss(turned, "b", loss_type=["sigmoid"])
    weights = list(maths.smoothed_weights(0.2))
    made = loss(PAIRS, "c", loss_type=["sigmoid", "robust"], loss_weights=weights, label_smoothing=0.2)
    assert made == pytest.approx(0.8 * plain + 0.2 * wrong, rel=1e-5)
    assert abs(plain - wrong) > 0.01


# --- frontiers and intervals ----------------------------------------------------------------------


def test_the_hull_keeps_what_mixing_cannot_beat():
    points = [(0, 0), (1, 1), (2, 1.2), (2, 1.9), (3, 2), (4, 1.5)]
    assert maths.hull(points) == [(0, 0), (1, 1), (2, 1.9), (3, 2)]
    assert maths.hull([(0, 0), (1, 0.1), (2, 2)]) == [(0, 0), (2, 2)]
    assert maths.hull([(0, 5), (1, 1)]) == [(0, 5)]


def test_reward_at_a_kl_is_interpolated_and_flat_beyond_the_end():
    points = [(0, 0), (2, 1), (4, 1.5)]
    assert [maths.reward_at(points, x) for x in (0, 1, 3, 9)] == [0, 0.5, 1.25, 1.5]
    assert math.isnan(maths.reward_at([(1, 1)], 0.5))


def test_intervals_hold_what_they_promise():
    """Of 300 samples of 40 normal numbers, some 95% of intervals of the mean hold the true one."""
    draws = np.random.default_rng(0)
    held = 0
    for number in range(300):
        sample = draws.normal(0.3, 1.0, size=40)
        mean, low, high = maths.bootstrap(lambda i, s=sample: s[i].mean(), 40, seed=number, resamples=400)
        assert low < mean < high
        held += low <= 0.3 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_a_difference_on_the_same_prompts_has_a_narrower_interval():
    draws = np.random.default_rng(0)
    prompts = draws.normal(0, 3, size=50)
    one, two = prompts + draws.normal(0.5, 0.1, size=50), prompts
    paired = maths.bootstrap(lambda i: (one[i] - two[i]).mean(), 50, seed=0)
    alone = maths.bootstrap(lambda i: one[i].mean(), 50, seed=0)
    assert paired[1] > 0.4
    assert alone[2] - alone[1] > 5 * (paired[2] - paired[1])


# --- prompts and reward ---------------------------------------------------------------------------


def test_no_method_trains_on_what_is_tested():
    train, subject, family = (
        of_split(split, count) for split, count in (("train", 96), ("subject", 24), ("family", 40))
    )
    texts = [one.text for one in openings()]
    assert len(set(texts)) == len(texts) == 160
    assert len(train) + len(subject) + len(family) == 160
    assert {one.family for one in family} == set(UNSEEN)
    assert {one.family for one in train} == {one.family for one in subject} == set(FAMILIES) - set(UNSEEN)
    held = {FAMILIES[name][4] for name in FAMILIES}
    assert not [one for one in train if any(name in one.text.lower() for name in held)]
    with pytest.raises(ValueError, match="97 openings"):
        of_split("train", 97)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_has_its_openings_and_one_sampling_budget(preset):
    of_split("train", preset.train_prompts)
    of_split("subject", preset.test_prompts)
    of_split("family", preset.test_prompts)
    assert preset.iterations * preset.rollouts == preset.train_prompts * preset.samples
    assert preset.keep[-1] == preset.iterations
    assert max(preset.best_of) <= preset.base_answers
    names = [piece.name for piece in study.pieces(preset)]
    assert len(set(names)) == len(names)


def test_the_openings_themselves_are_neutral_to_the_reward():
    assert rewards(["It was wonderful, I love it.", "It was awful and sad.", "It was on the left.", ""]) == [
        pytest.approx(0.84, abs=0.03),
        pytest.approx(-0.72, abs=0.06),
        0.0,
        0.0,
    ]


# --- on a tiny model ------------------------------------------------------------------------------


@pytest.fixture
def toy_reward(monkeypatch):
    """Share of letters before n: something that a random byte model can learn."""

    def toy(texts):
        return [sum(letter < "n" for letter in text) / max(1, len(text)) for text in texts]

    monkeypatch.setattr(lab_module, "rewards", toy)


@pytest.fixture
def lab(tiny_model_folder, toy_reward):
    base = load_base(str(tiny_model_folder), quantize="none", dtype="float32")
    return Lab(base, LoraSection(rank=4, alpha=8), longest=6)


def test_scores_are_those_of_a_plain_pass_over_each_answer(lab):
    prompts, answers = [list(b"Hello"), list(b"A")], [list(b"abc"), list(b"defghi")]
    scored = score(lab.base.model, rows_of(prompts, answers))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = lab.base.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        logps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        expected = [float(logps[i, token]) for i, token in enumerate(answer)]
        assert scored.logps[row, : len(answer)].tolist() == pytest.approx(expected, abs=1e-5)
        assert scored.logps[row, len(answer) :].abs().sum() == 0
    assert torch.equal(scored.ref, scored.logps)


def test_a_fresh_adapter_is_its_reference_and_a_changed_one_is_not(lab):
    prompts, answers = [list(b"Hello"), list(b"A")], [list(b"abc"), list(b"de")]
    with lab.fresh(0) as model:
        assert kl_of(model, prompts, answers) == [0.0, 0.0]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        assert min(kl_of(model, prompts, answers)) > 0
    assert not [name for name, _ in lab.base.model.named_parameters() if "lora" in name]


def test_the_log_ratio_of_an_answer_is_its_two_plain_passes_apart(lab):
    prompts, answers = [list(b"Hello"), list(b"A")], [list(b"abc"), list(b"de")]

    def logp(model, prompt, answer):
        with torch.no_grad():
            table = torch.log_softmax(model(input_ids=torch.tensor([prompt + answer])).logits[0], dim=-1)
        return sum(float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))

    before = [logp(lab.base.model, *both) for both in zip(prompts, answers, strict=True)]
    with lab.fresh(0) as model:
        assert log_ratios(model, prompts, answers) == [0.0, 0.0]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        after = [logp(model, *both) for both in zip(prompts, answers, strict=True)]
        found = log_ratios(model, prompts, answers)
    assert found == pytest.approx([a - b for a, b in zip(after, before, strict=True)], abs=1e-4)
    assert all(abs(one) > 1e-2 for one in found)


def test_samples_are_drawn_by_the_seed_and_counted(lab):
    prompts = lab.ids(["Hello", "A", "Hm"] * 15)  # more than one batch
    one, same, other = (lab.sample(lab.base.model, prompts, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert lab.tokens_sampled == sum(len(answer.tokens) for answer in [*one, *same, *other])
    assert all(1 <= len(answer.tokens) <= 6 for answer in one)


def test_ppo_raises_the_reward_and_leaves_the_base_as_it_was(lab):
    weights = {name: value.clone() for name, value in lab.base.model.state_dict().items()}
    settings = PPOSettings(kl_weight=0.01, iterations=20, rollouts=32, learning_rate=2e-2, critic_learning_rate=3e-2)
    with lab.fresh(0) as model:
        run = PPO(lab, model, lab.ids(["Hello", "So"]), settings)
        log = [run.iterate() for _ in range(settings.iterations)]
    first, last = (sum(row["reward"] for row in part) / 3 for part in (log[:3], log[-3:]))
    assert last > first + 0.1
    assert log[0]["kl"] == 0
    assert log[-1]["kl"] > 0.05
    for name, value in lab.base.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_large_kl_weight_holds_the_policy(lab):
    ends = {}
    for weight in (0.0, 1.0):
        settings = PPOSettings(kl_weight=weight, iterations=8, rollouts=32, learning_rate=1e-2)
        with lab.fresh(0) as model:
            run = PPO(lab, model, lab.ids(["Hello", "So"]), settings)
            ends[weight] = [run.iterate() for _ in range(settings.iterations)][-1]["kl"]
    assert ends[1.0] < 0.5 * ends[0.0]


def test_a_run_of_ppo_that_is_cut_goes_on_to_the_same_adapter(lab, tmp_path):
    settings = PPOSettings(kl_weight=0.01, iterations=3, rollouts=8, learning_rate=1e-2)
    prompts = lab.ids(["Hello", "So"])

    def run(folder, patience):
        asked = itertools.count()
        return train_ppo(lab, prompts, settings, folder, keep=(3,), out_of_time=lambda: next(asked) >= patience)

    whole = run(tmp_path / "whole", 99)
    assert run(tmp_path / "cut", 1) is None
    assert not (tmp_path / "cut" / "iteration3").exists()
    assert run(tmp_path / "cut", 99) == whole
    files = [(tmp_path / name / "iteration3" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_the_critic_does_not_move_the_policy(lab):
    settings = PPOSettings(kl_weight=0.0, iterations=1, rollouts=8, learning_rate=1e-2)
    with lab.fresh(0) as model:
        run = PPO(lab, model, lab.ids(["Hello"]), settings)
        rollouts = run.roll_out(0)
        torch.nn.init.normal_(run.critic.weight)  # at its start it is 0, and so would be what it asks of the policy
        nothing = torch.zeros_like(rollouts.advantages)
        before = {name: p.detach().clone() for name, p in run.adapter.items()}
        run.step(
            type(rollouts)(rollouts.prompts, rollouts.answers, rollouts.old, nothing, rollouts.returns, 0.0), [0, 1]
        )
        assert all(torch.equal(p, before[name]) for name, p in run.adapter.items())
        assert run.critic.weight.grad.abs().sum() > 0


# --- the whole of it ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_study_in_pieces(tiny_model_folder, toy_reward, tmp_path, monkeypatch):
    made = study.Study(PRESETS["smoke"], tmp_path / "smoke", str(tiny_model_folder))
    said = []
    asked = itertools.count()
    monkeypatch.setattr(study.Study, "out_of_time", lambda self: next(asked) == 4)
    assert not study.run(made, said.append)  # the first time it is out of time once
    assert "the same command goes on" in said[-1]
    assert study.run(made, said.append)
    results = json.loads(study.write_results(tmp_path / "smoke").read_text())
    assert set(results["pieces"]) == {piece.name for piece in study.pieces(PRESETS["smoke"])}
    found = report.Study(results)
    assert found.curve("DPO", np.arange(8))[0] == (0.0, pytest.approx(found.base.mean()))
    for method in ("DPO", "PPO", "SFT"):  # each trained, and what it trained was measured
        assert all(1e-4 < kl < 50 for kl, _ in found.curve(method, np.arange(8))[1:])
    parts = report.tables(found)
    assert sum("PPO, KL weight 0.05" in line for line in parts["frontier"]) == 2
    assert len([line for line in parts["side"] if "wrong labels" in line]) == 3
    assert len(parts["agreement"]) == 3
    assert len(parts["samples"]) == 2 + len(PRESETS["smoke"].betas) + 1 + 1
    assert all(line.count(" | ") == 3 for line in parts["samples"][2:])
    assert report.main(["smoke", "--work", str(tmp_path)]) == 0
    assert (tmp_path / "smoke" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "smoke" / "report.md").read_text()
    assert all("\n".join(lines) in page for lines in parts.values())
    other = study.Study(PRESETS["quick"], tmp_path / "smoke", str(tiny_model_folder))
    with pytest.raises(SystemExit, match="results of other settings"):
        study.run(other, said.append)


def test_lines_of_code_do_not_count_words(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        '"""Doc."""\n\nimport os\n\n\ndef f(a):\n    """Doc\n    more."""\n    # why\n    return a\n\n\nx = 1\n'
    )
    assert report.code_lines(path) == 4
    assert report.code_lines(path, {"f"}) == 2


@pytest.mark.slow
@pytest.mark.long
def test_the_page_says_what_the_results_say():
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    for name in ("frontier", "matched", "samples", "side", "agreement", "lines"):
        assert page.count(f"<!-- {name}: made by benchmarks/dpo_vs_ppo/report.py -->") == 1
    assert report.main(["full", "--check"]) == 0
