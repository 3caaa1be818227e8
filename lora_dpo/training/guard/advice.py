"""Why each alarm of the health monitor happens, and which setting to change, by training method."""

from __future__ import annotations

_SLOWER = "Lower trainer.learning_rate or train fewer steps"
_RATE_OR_BETA = f"{_SLOWER}, or raise trainer.beta"

CAUSES: dict[str, dict[str, str]] = {
    "not a number": {
        "any": "The step before was too large, or the numbers do not fit the compute dtype",
    },
    "likelihood displacement": {
        "any": "The loss looks at differences alone, so both answers may become unlikely as long as the rejected one "
        "falls faster; what becomes likely instead was in no pair",
    },
    "rejected collapse": {
        "any": "Pushing answers down that are already unlikely squeezes all probability onto the likeliest tokens",
    },
    "stuck": {
        "any": "The learning rate is too small to move anything, or the labels follow no rule (mixed up?)",
    },
    "overfit": {
        "any": "The adapter learns the pairs by heart instead of the rule behind them",
    },
    "length collapse": {
        "any": "The policy ends its answers early because short answers lose least",
        "sft": "The answers it learns from are much shorter than those to these prompts should be",
    },
    "length growth": {
        "any": "Longer answers won, and length is easier to learn than quality",
        "sft": "The answers it learns from are longer than those to these prompts should be",
    },
    "repetition": {
        "any": "The policy falls into loops, a sign that it was pushed off what it knew",
    },
    "lost end of turn": {
        "any": "The end-of-turn token became unlikely, often because the answers it learns from are cut off before it",
    },
    "KL budget": {
        "any": "It went further than preferences need, and what it knew is lost on the way",
        "sft": "It went far from what it was, and what it knew is lost on the way",
    },
    "reference drift": {
        "any": "Its weights changed during the run, so log-ratios mean nothing any more",
    },
}
"""By alarm and method; `any` stands for the methods that are not named."""

ADVICE: dict[str, dict[str, str]] = {
    "not a number": {
        "any": "Lower trainer.learning_rate or trainer.max_grad_norm; with model.dtype: float16 try bfloat16 or "
        "float32",
    },
    "likelihood displacement": {
        "dpo": "Lower trainer.learning_rate, add an sft term (trainer.loss_type: [sigmoid, sft]), or raise "
        "trainer.beta",
        "any": _RATE_OR_BETA,
    },
    "rejected collapse": {"any": _RATE_OR_BETA},
    "stuck": {"any": "Raise trainer.learning_rate, and look at the data: lora-dpo data check"},
    "saturated": {"any": "Train fewer steps (trainer.max_steps), or raise trainer.beta"},
    "overfit": {"any": "Train fewer steps, lower lora.rank, or add pairs with other prompts"},
    "length collapse": {
        "dpo": "Lower trainer.learning_rate, add an sft term, or use pairs whose chosen answers are not always the "
        "shorter ones",
        "kto": f"{_RATE_OR_BETA}; look at the lengths of good and bad answers: lora-dpo data stats",
        "sft": f"{_SLOWER}, or learn from longer answers: lora-dpo data stats shows their lengths",
    },
    "length growth": {
        "dpo": "Use pairs of like length (lora-dpo data check measures the bias), or loss_type sigmoid_norm",
        "kto": "Use good and bad answers of like length: lora-dpo data stats shows them",
        "sft": "Learn from shorter answers: lora-dpo data stats shows their lengths",
    },
    "repetition": {"dpo": f"{_SLOWER}, or add an sft term", "kto": _RATE_OR_BETA, "sft": _SLOWER},
    "lost end of turn": {
        "any": "Check the data (lora-dpo data check: lost end-of-turn tokens) and trainer.max_length",
    },
    "KL budget": {
        "sft": f"{_SLOWER}, or raise health.kl if that is meant",
        "any": "Raise trainer.beta, lower trainer.learning_rate, or raise health.kl if that is meant",
    },
    "reference drift": {
        "any": "Do not change the base or the adapter 'ref' while a run goes on; start again from a fresh base",
    },
}
"""By alarm and method, as `CAUSES`."""


def of(table: dict[str, dict[str, str]], alarm: str, method: str) -> str:
    """The entry for an alarm in a run of this method."""
    texts = table[alarm]
    return texts[method] if method in texts else texts["any"]
