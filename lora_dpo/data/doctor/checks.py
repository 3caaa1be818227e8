"""How the doctor looks for each finding in one pair: patterns and small functions. What each means: `catalogue.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_dpo.data.chat_template import Message
from lora_dpo.data.language import differ
from lora_dpo.data.pairs import PreferencePair
from lora_dpo.data.thoughts import split_thought

_BOS = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "[CLS]",
    "<BOS_TOKEN>",
    "<｜begin▁of▁sentence｜>",
)
_END = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
)
_TOKENS = (
    # ChatML and Phi
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|endoftext|>",
    "<|startoftext|>",
    # Llama 3 and 4
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|python_tag|>",
    # Granite, OpenChat, Cohere
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_turn|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    # gpt-oss
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    # Llama 2, Mistral, Gemma
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<start_of_turn>",
    "<end_of_turn>",
)
"""What chat templates write and people hardly do: a leftover wherever it stands."""
_HINTS = ("<|", "<｜", "[", "<<", "_of_turn>", "###", "Human:", "Assistant:")
_LEFTOVER = re.compile(
    rf"<\|(?:{'|'.join(re.escape(token[2:-2]) for token in _TOKENS if token.startswith('<|'))})\|>|"
    + "|".join(re.escape(token) for token in _TOKENS if not token.startswith("<|"))
    # <|start|> alone may be somebody's own mark; gpt-oss goes on with a role. DeepSeek's bars are full-width.
    + r"|<\|start\|>(?=system|developer|user|assistant)|<｜[^｜\n]{1,40}｜>"
    r"|(?m:^### ?(?:Instruction|Response|Input):)|### ?(?:Human|Assistant):"
    r"|(?:\A|\n\n)(?:Human|Assistant):"
)
_USER, _ASSISTANT = re.compile(r"(?:\A|(?<=\s))USER:"), re.compile(r"\sASSISTANT:")
# </s> and <eos> are also what people write about: "the </s> token". A leftover is glued to a word, or ends an answer.
_STUCK_END = re.compile(r"(?<![\s`'\"(\[])(?:</s>|<eos>)|(?:</s>|<eos>)(?=\w)")
_STRUCK_OUT = re.compile(r"<s[ >]")

# UTF-8 read as Latin-1 or Windows-1252: each letter becomes an accented one and one to three of these.
_REST = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
# But letters at a word's end are followed by some of them in whole text, too: CAFÉ…, Spaß“, déjà », société¹.
_MAY_END = "\u00a0“”‘’…–—™›»"
_NEVER = "\u0080-\u009f¡¢£¤¥¦¨¬¯±µ¶¸¼½¾€‚ƒ„ˆ‰‹•˜Ÿ"
_MOJIBAKE_HINT = re.compile(f"[ÃÂÄÅ×ÎÏÐÑØÙÚÛà-ð][{_REST}]|\ufffd")
_MOJIBAKE = re.compile(
    "|".join(
        (
            f"[ÃÂ](?![{_MAY_END}])[{_REST}]",  # Western: é is Ã©
            f"(?<=[a-zß-ÿ])[ÃÂÄÅ][{_REST}]",
            f"(?<![^\\W_])[ÃÂ](?:\u00a0|[{_MAY_END}](?=[a-zß-ÿ]))",
            f"[ÄÅ](?:[{_NEVER}º]|[{_REST}](?=[a-zß-ÿ]))|[ÄÅ]‡",  # Central European, Turkish: š is Å¡
            f"(?:[ÎÏÐÑØÙÚÛ][{_REST}]){{2}}|(?:×[{_REST}]){{3}}",  # Greek, Cyrillic, Arabic, Hebrew
            "â€[\u0080-\u00bf™œ“”˜¦¢]|â‚¬|â„¢",  # quotes, dashes, €, ™
            f"â[†ˆ‰œ][{_REST}]|â[–—][{_NEVER}]",  # arrows, signs, boxes
            f"[à-ï](?!\u00a0)(?:[{_NEVER}][{_REST}]|[{_REST}][{_NEVER}])|(?:[à-ï][{_REST}]{{2}}){{2}}",  # the East
            f"ð[Ÿ\u009f][{_REST}]{{2}}",  # emoji
            "ï»¿|\ufffd",
        )
    )
)
_REFUSAL = re.compile(
    r"i(?:['’]?m| am) (?:very |so |really |truly )?sorry|sorry|(?:my|please accept my) apologies|i apologi[sz]e|"
    r"unfortunately|as an? (?:ai|(?:large )?language model)\b|"
    r"i (?:can(?:['’]t|not)|won['’]t|am (?:not able|unable))|i['’]m (?:not able|unable)|"
    r"i (?:must|have to) (?:respectfully |politely )?decline"
)
_REFUSES = re.compile(
    r"\b(?:can(?:['’]t|not)|won['’]t|unable|not able|not appropriate|not comfortable|do(?:n['’]t| not) have|"
    r"(?:must|have to) (?:respectfully |politely )?decline)\b"
)
_LIST_ITEM = re.compile(r"\s*(?:[|\-*#>•–]|https?:|\(?(?:\d{1,3}|[A-Za-z])[.)]\s)")


@dataclass(frozen=True)
class Texts:
    """The words of a pair, tool calls as JSON, without roles."""

    prompt: str
    chosen: str
    rejected: str

    @classmethod
    def of(cls, pair: PreferencePair) -> Texts:
        """Turns of each part, joined by blank lines."""
        return cls(*(_joined(part) for part in (pair.prompt, pair.chosen, pair.rejected)))


def thought_length(answer: Sequence[Message]) -> int:
    """Characters of an answer that are the thought at its start, tags and the space around them included."""
    first = answer[0]
    said = split_thought(first["content"])[1]
    if said == first["content"].strip() and "reasoning_content" not in first:
        return 0
    bare = first.copy()
    bare.pop("reasoning_content", None)
    return len(_joined(answer)) - len(_joined([{**bare, "content": said}, *answer[1:]]))


def prompt_text(prompt: Sequence[Message]) -> str:
    """What a prompt asks: the same for prompts that differ in case, white space and system turns only.

    Data sets write the same questions under many system turns, or under none: an answer that was learnt under one
    helps under the other.
    """
    asked = [said for said in prompt if said["role"] != "system"] or prompt
    return " ".join(_joined(asked).casefold().split())


def text_findings(pair: PreferencePair, texts: Texts) -> list[tuple[str, str]]:
    """`(check, evidence)` for everything that one pair shows by itself."""
    found = []
    for name, look in _LOOKS.items():
        evidence = look(pair, texts)
        if evidence is not None:
            found.append((name, evidence))
    return found


def special_findings(pair: PreferencePair, special: re.Pattern[str], bos: str | None) -> Iterator[tuple[str, str]]:
    """`(check, evidence)` for the special tokens of a tokenizer in the turns' own text, where it reads them as such."""
    for text in _each(pair):
        match = special.search(text)
        if match:
            doubled = match.group() == bos and not text[: match.start()].strip()
            yield "double-bos" if doubled else "leftover", _excerpt(text, match.start())


def templated(pair: PreferencePair, special: re.Pattern[str] | None = None, bos: str | None = None) -> str | None:
    """Text of a chat template inside a turn's own text, cut short: what `double-bos` and `leftover` find."""
    texts = Texts.of(pair)
    found = _double_bos(pair, texts) or _leftover(pair, texts)
    if found is None and special is not None:
        found = next((evidence for _, evidence in special_findings(pair, special, bos)), None)
    return found


def ends_with_marker(text: str) -> bool:
    """True if an end-of-turn token is written at the end of a text."""
    return text.rstrip().endswith(_END)


def _joined(messages: Sequence[Message]) -> str:
    return _words(messages[0]) if len(messages) == 1 else "\n\n".join(map(_words, messages))


def _words(said: Message) -> str:
    """What a turn thinks beside its content, says and calls: two calls that differ are two answers."""
    parts = [said.get("reasoning_content", ""), said["content"]]
    if calls := said.get("tool_calls"):
        parts.append(json.dumps([call["function"] for call in calls], ensure_ascii=False, sort_keys=True))
    return "\n".join(filter(None, parts))


def _roles(pair: PreferencePair, texts: Texts) -> str | None:
    for answer in (pair.chosen, pair.rejected):
        turns = [*pair.prompt, *answer]
        before = "start"
        for said in turns:
            role = said["role"]
            if role not in _MAY_FOLLOW[before]:
                return f"{role} after {before}" if before != "start" else f"starts with {role}"
            before = role
    return None


_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _double_bos(pair: PreferencePair, texts: Texts) -> str | None:
    for text in _each(pair):
        start = text.lstrip()
        if start.startswith(_BOS) and not _is_struck_out(start):
            return _excerpt(start, 0)
    return None


def _is_struck_out(text: str) -> bool:
    """True if a text uses `<s>` as HTML does, `<s>5 €</s> 3 €`: as a pair of tags within it, not around all of it."""
    opened = len(_STRUCK_OUT.findall(text))
    around = text.lstrip().startswith("<s>") and text.rstrip().endswith("</s>")
    return 0 < opened == text.count("</s>") and not around


def _leftover(pair: PreferencePair, texts: Texts) -> str | None:
    for text in _each(pair):
        start = _leftover_at(text)
        if start is not None:
            return _excerpt(text, start)
    for text in (texts.chosen, texts.rejected):
        if ends_with_marker(text) and not _is_struck_out(text):
            return "…" + text.rstrip()[-40:]
    return None


def _leftover_at(text: str) -> int | None:
    """Where the first piece of a template is in the text of one turn."""
    if any(hint in text for hint in _HINTS):
        match = _LEFTOVER.search(text)
        if match:
            return match.start()
    if "ASSISTANT:" in text:  # Vicuna's, of which either half alone may be anybody's heading
        opened = _USER.search(text)
        if opened and _ASSISTANT.search(text, opened.end()):
            return opened.start()
    if ("</s>" in text or "<eos>" in text) and not _is_struck_out(text):
        match = _STUCK_END.search(text)
        if match:
            return match.start()
    return None


def _each(pair: PreferencePair) -> Iterator[str]:
    """What each turn says, the prompt's first."""
    return map(_words, (*pair.prompt, *pair.chosen, *pair.rejected))


def _lost_end(pair: PreferencePair, texts: Texts) -> str | None:
    """A long answer whose last line is a sentence without an end; both answers, since either spoils the comparison."""
    for side, text in (("", texts.chosen), ("rejected: ", texts.rejected)):
        end = _open_end(text)
        if end is not None:
            return f"{side}…{end}"
    return None


def _open_end(text: str) -> str | None:
    text = text.rstrip()
    if len(text) < 200 or not (text[-1].isalpha() or text[-1] in ",;(–"):
        return None
    last = text[text.rfind("\n") + 1 :]
    if len(last.split()) < 8 or _LIST_ITEM.match(last) or "```" in text:
        return None  # a heading, a list or code ends so, too
    return last[-80:]


def _refusal(pair: PreferencePair, texts: Texts) -> str | None:
    return _excerpt(texts.chosen, 0) if _is_refusal(texts.chosen) and not _is_refusal(texts.rejected) else None


def _is_refusal(text: str) -> bool:
    start = text[:200].lstrip().lower()
    return bool(_REFUSAL.match(start)) and bool(_REFUSES.search(start))


def _mojibake(pair: PreferencePair, texts: Texts) -> str | None:
    for text in (texts.prompt, texts.chosen, texts.rejected):
        if not text.isascii() and _MOJIBAKE_HINT.search(text):
            match = _MOJIBAKE.search(text)
            if match:
                return _excerpt(text, max(0, match.start() - 20))
    return None


def _language(pair: PreferencePair, texts: Texts) -> str | None:
    return differ(texts.prompt, texts.chosen)


def _excerpt(text: str, start: int, length: int = 80) -> str:
    cut = " ".join(text[start : start + length].split())
    return cut + ("…" if len(text) > start + length else "")


_LOOKS: dict[str, Callable[[PreferencePair, Texts], str | None]] = {
    "roles": _roles,
    "double-bos": _double_bos,
    "leftover": _leftover,
    "lost-end": _lost_end,
    "refusal": _refusal,
    "mojibake": _mojibake,
    "language": _language,
}
