"""Which modules a PEFT config means by a name or a pattern: found in time linear in the names' length.

A config comes from anywhere. PEFT gives its patterns to Python's `re`, where `.*.*.*.*Z` takes hours for one long
name, and tries each of them on each module; here RE2 (in pyarrow) matches them, and names are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

MAX_NAME = 500
"""Characters of a module's or tensor's name; the longest of a known architecture has about 100."""
MAX_NAMES = 20_000
"""Names in one list of a config. A name for each of Qwen3-MoE's 48 · 128 · 3 experts' matrices is 18,432."""
MAX_PATTERNS = 64
"""Regular expressions in one field of a config."""

Value = TypeVar("Value")


def is_name(text: object) -> bool:
    """True for a name or the end of one, such as `q_proj` or `model.layers.0.mlp`: no regular expression."""
    return isinstance(text, str) and len(text) <= MAX_NAME and re.fullmatch(r"[\w.-]+", text) is not None


def is_pattern(text: object) -> bool:
    """True for a regular expression that is accepted.

    No group is repeated, so no repeat is inside another one, and there are few of them: such a pattern is harmless to
    those who match it with a backtracking engine, too, on names of usual length.
    """
    if not isinstance(text, str) or len(text) > 2000 or sum(map(text.count, "*+{")) > 8:
        return False
    if re.search(r"\)[*+{?]|[*+?}][*+{]", text):
        return False
    if re.search(r"\(\?[a-zA-Z-]*x", text):  # in verbose mode a space may stand between a group and its repeat
        return False
    try:
        re.compile(text)
        matching(text, [""])
    except (re.error, ValueError, OverflowError):
        return False
    return True


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern matches whole, as `re.fullmatch` would.

    Lookaheads are understood at the beginning alone, where trainers of multimodal models write them.

    Raises:
        ValueError: it uses what RE2 does not know, such as a backreference.
    """
    conditions, rest = _lookaheads(pattern)
    found = _matching(rf"\A(?:{rest})\z", names)
    for wanted, inner in conditions:
        hit = set(_matching(rf"\A(?:{inner})", found))
        found = [name for name in found if (name in hit) == wanted]
    return found


class ByModule(Generic[Value]):
    """What PEFT's `rank_pattern` or `alpha_pattern` gives to a module: the first that matches the end of its name.

    Args:
        given: values by name or pattern, each of which `is_name` or `is_pattern` accepts; no lookaheads.
    """

    def __init__(self, given: Mapping[str, Value]) -> None:
        self._given = list(given.items())
        self._names = {key: place for place, (key, _) in enumerate(self._given) if is_name(key)}
        self._patterns = [(place, key) for place, (key, _) in enumerate(self._given) if not is_name(key)]

    def of(self, modules: Sequence[str]) -> dict[str, Value]:
        """The value of each module that has one."""
        first: dict[str, int] = {}
        for module in modules if self._names else ():
            places = [self._names[end] for end in _ends(module) if end in self._names]
            if places:
                first[module] = min(places)
        for place, key in self._patterns:
            for module in _matching(rf"\A(?:.*\.)?(?:{key})\z", modules):
                first[module] = min(place, first.get(module, place))
        return {module: self._given[place][1] for module, place in first.items()}


def in_use(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Those of `names` that are a module's name or the end of one, in their order."""
    ends = {end for module in modules for end in _ends(module)}
    return [name for name in names if name in ends]


def _ends(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while True:
        yield module
        _, dot, module = module.partition(".")
        if not dot:
            return


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    import pyarrow
    import pyarrow.compute

    column = pyarrow.array(list(names), type=pyarrow.string())
    found = pyarrow.compute.match_substring_regex(column, pattern=pattern)  # ArrowInvalid is a ValueError
    return [name for name, hit in zip(names, found.to_pylist(), strict=True) if hit]


def _lookaheads(pattern: str) -> tuple[list[tuple[bool, str]], str]:
    """`^(?!a)b` as `([(False, "a")], "b")`; a pattern without lookaheads as it is."""
    found: list[tuple[bool, str]] = []
    rest = pattern.lstrip("^")
    while rest.startswith(("(?!", "(?=")):
        end = next((place for place, mark, depth in _marks(rest) if mark == ")" and depth == 0), None)
        if end is None:
            raise ValueError("a group is not closed")
        found.append((rest[2] == "=", rest[3:end]))
        rest = rest[end + 1 :]
    if found and any(mark == "|" and depth == 0 for _, mark, depth in _marks(rest)):
        raise ValueError("a lookahead of one alternative alone")
    return found, rest if found else pattern


def _marks(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Place, sign, and groups around it after it, of each bracket and bar that is neither escaped nor in a class."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", lambda found: "x" * len(found[0]), pattern, flags=re.DOTALL)
    depth = 0
    for place, letter in enumerate(plain):
        if letter in "()|":
            depth += {"(": 1, ")": -1}.get(letter, 0)
            yield place, letter, depth
