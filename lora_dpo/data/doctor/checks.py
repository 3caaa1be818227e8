"""What the doctor looks for: what each finding is, what it does to DPO, and what to do about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_dpo.data.chat_template import Message
from lora_dpo.data.doctor.language import differ
from lora_dpo.data.pairs import PreferencePair

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with preference data."""

    name: str
    severity: Severity
    title: str
    meaning: str
    """What it does to DPO."""
    advice: str
    """What to do."""
    removes: bool = False
    """True if `--fix` takes such rows out. Rows that are no pairs are always out."""


_CHECKS = (
    Check(
        "unreadable",
        "error",
        "rows that are no object, or not whole",
        "A run stops at the first of them.",
        "Repair or remove these rows.",
        removes=True,
    ),
    Check(
        "malformed",
        "error",
        "rows with missing or malformed fields",
        "They are left out of training; many of them mean that the form was not recognised.",
        "Compare the columns with docs/data.md, or name the form with --format.",
        removes=True,
    ),
    Check(
        "empty",
        "error",
        "empty prompts or answers",
        "They are left out; an empty answer would teach to stop at once.",
        "Fill or remove them.",
        removes=True,
    ),
    Check(
        "equal",
        "error",
        "chosen equals rejected",
        "The margin is always 0 and so is the gradient: a step that teaches nothing.",
        "Remove them, and look for a bug where the pairs were made.",
        removes=True,
    ),
    Check(
        "prefix",
        "error",
        "the prompt is not a shared prefix",
        "The two answers follow different prompts, so their log-probabilities cannot be compared.",
        "Give both answers the same conversation, up to the first answer that differs.",
        removes=True,
    ),
    Check(
        "roles",
        "error",
        "roles out of order",
        "Many chat templates refuse such a conversation; others write something the model never saw.",
        "Order turns as system, user, assistant, user, assistant; join two turns of one role.",
        removes=True,
    ),
    Check(
        "tie",
        "warning",
        "ties, small gaps, or scores against the labels",
        "A pair whose scores do not prefer the chosen answer is noise; it is left out.",
        "Judge them again, or leave them out.",
        removes=True,
    ),
    Check(
        "vote",
        "warning",
        "votes without an opposite vote",
        "DPO needs two answers to one prompt; a vote alone is left out.",
        "Collect a second answer to these prompts, or train them with a loss for single votes such as KTO.",
        removes=True,
    ),
    Check(
        "contradiction",
        "error",
        "contradictions: A over B here, B over A there",
        "The two pull in opposite directions and cancel; what is left is noise.",
        "Decide for one of them. If people disagree, see 'label noise' below.",
        removes=True,
    ),
    Check(
        "duplicate",
        "warning",
        "exact duplicates of an earlier pair",
        "The pair is seen more often than the others in each pass, and is overfitted first.",
        "Keep one of them; --fix does.",
        removes=True,
    ),
    Check(
        "near-duplicate",
        "warning",
        "near duplicates of an earlier pair",
        "Almost the same as a duplicate: such pairs weigh more than others.",
        "Look at a few; remove those that add nothing.",
    ),
    Check(
        "leak",
        "error",
        "prompts that are also in the held-out data",
        "What is measured on held-out data will flatter.",
        "Remove them from one of the two; lora-dpo data split keeps prompts apart.",
        removes=True,
    ),
    Check(
        "double-bos",
        "error",
        "a beginning-of-text token written in the text",
        "The chat template writes it too: the model reads it twice, which it never saw in training.",
        "Remove the token from the text.",
        removes=True,
    ),
    Check(
        "leftover",
        "error",
        "chat template leftovers inside the text",
        "A token such as <|im_start|> inside a text ends or opens a turn, so the model learns to write other turns.",
        "Split the text into messages, or remove the tokens.",
        removes=True,
    ),
    Check(
        "lost-end",
        "warning",
        "answers that lost their end",
        "A chosen answer that stops in mid-sentence, or without the end-of-turn token that the others have, teaches to "
        "ramble on or to break off. Where the rejected one stops so, its end alone tells the two apart, and the pair "
        "says little about the rest.",
        "Make these answers again with a larger limit of tokens, or remove them.",
    ),
    Check(
        "refusal",
        "warning",
        "a refusal preferred over an answer",
        "DPO amplifies it: the model refuses more, also where it should not.",
        "Keep those that you mean; remove the others.",
    ),
    Check(
        "mojibake",
        "warning",
        "damaged encoding (mojibake)",
        "If only one side is damaged, the pair teaches the damage or its absence and nothing else.",
        "Read the source again with the right encoding (usually UTF-8).",
    ),
    Check(
        "language",
        "warning",
        "the chosen answer is in another language than the prompt",
        "The model may learn to change the language.",
        "Keep translations; remove the others.",
    ),
    Check(
        "length-bias",
        "warning",
        "length alone predicts the preference",
        "DPO takes the shortest way to the margin: it learns the length instead of the quality.",
        "Add pairs where it is the other way round; trainer.ld_alpha below 1 discounts what one answer is longer by.",
    ),
    Check(
        "same-after-cut",
        "error",
        "pairs that are the same after truncation",
        "They are left out: what told the answers apart was cut off.",
        "Raise trainer.max_length.",
        removes=True,
    ),
    Check(
        "prompt-fills",
        "error",
        "prompts that fill max_length alone",
        "They are left out: there is no room for an answer.",
        "Raise trainer.max_length.",
        removes=True,
    ),
    Check(
        "template",
        "error",
        "conversations that the chat template refuses",
        "A run stops at the first of them.",
        "Do what the template's own words say; often it wants no system turn, or user and assistant in turn.",
        removes=True,
    ),
    Check(
        "left-out",
        "warning",
        "answers of which the chat template leaves out a part",
        "The model is trained on what the template writes alone: reasoning before an answer, or a call, is gone.",
        "Take a template that writes it whole, or take it out of the answers yourself.",
    ),
    Check(
        "other-start",
        "warning",
        "answers that do not follow what a chat asks for them with",
        "A chat's prompt ends with something, such as <think>, that no trained answer follows: the model answers there "
        "from where it was never trained.",
        "Take a template that writes both alike, or begin the answers with it.",
    ),
    Check(
        "cut",
        "warning",
        "answers cut by max_length: their end-of-turn token is gone",
        "The model learns answers that never end.",
        "Raise trainer.max_length, or remove the longest pairs.",
    ),
)

CHECKS = {check.name: check for check in _CHECKS}

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
    """What a turn says and calls: two calls that differ are two answers."""
    calls = said.get("tool_calls")
    if not calls:
        return said["content"]
    written = json.dumps([call["function"] for call in calls], ensure_ascii=False, sort_keys=True)
    return f"{said['content']}\n{written}" if said["content"] else written


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
