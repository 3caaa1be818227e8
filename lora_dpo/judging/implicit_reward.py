"""The policy's own implicit reward as the judge: r(x, y) = β·(log π_θ(y|x) - log π_ref(y|x)).

Rafailov et al. 2023, eq. 5, up to a term of the prompt alone, which no comparison of two answers sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data import Origin, PreferencePair, TokenPair
from lora_dpo.data.chat_template import assistant_turn
from lora_dpo.data.prompts import Prompt
from lora_dpo.data.tokenize import tokenize_pair
from lora_dpo.engine.scoring import score_pairs
from lora_dpo.judging.judge import Judge, Scores
from lora_dpo.model.decoding import Answer
from lora_dpo.model.lora import reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def implicit_judge(
    spec: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    beta: float,
    chat_template_kwargs: TemplateKwargs = NO_KWARGS,
) -> Judge:
    """The judge that reads the adapter on `model` as a reward model."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def score(prompt: Prompt, answers: Sequence[Answer]) -> Scores:
        kwargs = chat_template_kwargs
        pairs = [_two(tokenizer, prompt, *two, kwargs) for two in _by_twos([answer.text for answer in answers])]
        policy = _interleave(score_pairs(model, pairs, pad_id=pad))
        with reference(model):
            ref = _interleave(score_pairs(model, pairs, pad_id=pad))
        rewards = [beta * (ours - theirs) for ours, theirs in zip(policy, ref, strict=True)]
        return rewards[: len(answers)]

    return Judge(spec, score, {"beta": beta}, reads_thoughts=True)


def _by_twos(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Answers two by two, since pairs are what is scored; an odd last one stands beside itself."""
    return [(texts[index], texts[min(index + 1, len(texts) - 1)]) for index in range(0, len(texts), 2)]


def _two(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, first: str, second: str, kwargs: TemplateKwargs
) -> TokenPair:
    sides = [(assistant_turn(text),) for text in (first, second)]
    origin = Origin(prompt.source, prompt.row)
    pair = PreferencePair(prompt=prompt.messages, chosen=sides[0], rejected=sides[1], origin=origin)
    return tokenize_pair(tokenizer, pair, max_length=None, chat_template_kwargs=kwargs)


def _interleave(scores: tuple[list[float], list[float]]) -> list[float]:
    return [value for two in zip(*scores, strict=True) for value in two]
