"""Rules: judges that need no model. Each scores from 0 (broken) to 1 (kept); an empty answer has 0.

length<=40  length>=5        words; also sentences, chars and tokens
regex=PATTERN  no-regex=PATTERN
keywords=a,b  no-keywords=a,b
json                         the whole answer is valid JSON
exact  contains  numeric     against the prompt's known answers ("accepted")
finished                     the answer ended by itself
no-repeat                    the share of three-word sequences that are new
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from lora_dpo.config.reading import nearest
from lora_dpo.data.prompts import Prompt
from lora_dpo.data.questions import is_correct
from lora_dpo.errors import ConfigError
from lora_dpo.judging.judge import Judge, Scores
from lora_dpo.model.decoding import Answer
from lora_dpo.text import shown

Rule = Callable[[Prompt, Answer], float | None]

KNOWN = (
    "length",
    "sentences",
    "chars",
    "tokens",
    "regex",
    "no-regex",
    "keywords",
    "no-keywords",
    "json",
    "exact",
    "contains",
    "numeric",
    "finished",
    "no-repeat",
)
NEED_ACCEPTED = ("exact", "contains", "numeric")


def rule_judge(spec: str, text: str) -> Judge:
    """The judge of one rule.

    Args:
        spec: how the user wrote the judge.
        text: the rule, such as `length<=40`.

    Raises:
        ConfigError: no such rule, or its value is none that it can use.
    """
    rule = _parse(text)

    def score(prompt: Prompt, answers: Sequence[Answer]) -> Scores:
        return [rule(prompt, answer) if answer.text.strip() else 0.0 for answer in answers]

    return Judge(spec, score, needs_accepted=text in NEED_ACCEPTED)


def _parse(text: str) -> Rule:
    if limit := re.fullmatch(r"(length|sentences|chars|tokens)\s*(<=|>=)\s*(\d{1,9})", text):
        return _size_rule(limit[1], limit[2], int(limit[3]))
    name, equals, value = text.partition("=")
    if equals and value and name in ("regex", "no-regex"):
        return _regex_rule(value, wanted=name == "regex")
    words = [word.strip() for word in value.split(",") if word.strip()]
    if equals and words and name in ("keywords", "no-keywords"):
        return _keyword_rule(words, wanted=name == "keywords")
    if text in _PLAIN:
        return _PLAIN[text]
    name = re.split(r"[<>=]", text)[0].strip()
    if name in KNOWN:
        raise ConfigError(f"The rule {shown(text)} is not written as it must be. Examples: {_example(name)}.")
    raise ConfigError(f"There is no rule {shown(name)}: rules are {', '.join(KNOWN)}.{nearest(name, KNOWN)}")


def _example(name: str) -> str:
    if name in ("length", "sentences", "chars", "tokens"):
        return f"rules:{name}<=40, rules:{name}>=5"
    if name.endswith("regex"):
        return f"'rules:{name}=^(Yes|No)'"
    return f"'rules:{name}=please,thanks'" if name.endswith("keywords") else f"rules:{name}"


# --- one function a rule --------------------------------------------------------------------------


def _size_rule(unit: str, sign: str, limit: int) -> Rule:
    if sign == "<=" and limit == 0:
        raise ConfigError(f"The rule {unit}<=0 allows no answer. Give a larger number.")

    def rule(prompt: Prompt, answer: Answer) -> float:
        size = _size(unit, answer)
        if sign == "<=":  # at twice the limit and above the score is 0
            return 1 - min(1.0, max(0, size - limit) / limit)
        return min(1.0, size / limit) if limit else 1.0

    return rule


def _size(unit: str, answer: Answer) -> int:
    if unit == "tokens":
        return answer.tokens
    if unit == "chars":
        return len(answer.text)
    if unit == "sentences":
        return len(re.findall(r"[.!?]+(?=\s|$)|[^.!?\s][^.!?]*$", answer.text.strip()))
    return len(answer.text.split())


def _regex_rule(pattern: str, *, wanted: bool) -> Rule:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"The rule's pattern {shown(pattern)} is no regular expression: {error}.") from None
    return lambda prompt, answer: float(bool(compiled.search(answer.text)) == wanted)


def _keyword_rule(words: list[str], *, wanted: bool) -> Rule:
    def rule(prompt: Prompt, answer: Answer) -> float:
        there = sum(is_correct(answer.text, [word]) for word in words)
        return there / len(words) if wanted else float(there == 0)

    return rule


def _json(prompt: Prompt, answer: Answer) -> float:
    try:
        json.loads(answer.text)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _exact(prompt: Prompt, answer: Answer) -> float | None:
    if not prompt.accepted:
        return None
    return float(_plain(answer.text) in {_plain(accepted) for accepted in prompt.accepted})


def _contains(prompt: Prompt, answer: Answer) -> float | None:
    return float(is_correct(answer.text, prompt.accepted)) if prompt.accepted else None


def _numeric(prompt: Prompt, answer: Answer) -> float | None:
    """The last number of the answer, as in the scoring of GSM8K (Cobbe et al. 2021)."""
    known = [number for text in prompt.accepted if (number := last_number(text)) is not None]
    if not known:
        return None
    given = last_number(answer.text)
    return float(given is not None and any(abs(given - number) <= 1e-6 * max(1, abs(number)) for number in known))


def last_number(text: str) -> float | None:
    """The last number in a text; `1,234.5` is one number."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return float(found[-1].replace(",", "")) if found else None


def _finished(prompt: Prompt, answer: Answer) -> float:
    return float(answer.finished)


def _no_repeat(prompt: Prompt, answer: Answer) -> float:
    words = re.findall(r"\w+", answer.text.lower())
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(threes)) / len(threes) if threes else 1.0


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip(".!").casefold()


_PLAIN: dict[str, Rule] = {
    "json": _json,
    "exact": _exact,
    "contains": _contains,
    "numeric": _numeric,
    "finished": _finished,
    "no-repeat": _no_repeat,
}
