"""Chat messages out of whatever a row holds: text, lists of messages, ShareGPT turns, transcripts, JSON in a cell."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from lora_dpo.data.chat_template import REASONING, Message
from lora_dpo.data.row_reading import Row
from lora_dpo.quiet import never_warn
from lora_dpo.text import shown

Messages = tuple[Message, ...]
Tools = tuple[dict[str, Any], ...]
ROLES = ("system", "user", "assistant", "tool")

Kind = Literal["missing", "empty", "equal", "prefix", "roles", "malformed", "tie", "vote"]
"""What is wrong with a row, for the doctor to sort by."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant|System):[ \t]*")
_OBJECTS = re.compile(r"\s*(\[\s*)?\{\s*['\"]")
_ONE_MESSAGE = re.compile(r"\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")
_SPEAKER = re.compile(r"['\"](?:role|from)['\"]\s*:")
_SPOKEN = re.compile(r"['\"](?:content|value)['\"]\s*:")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


class BadRow(Exception):
    """A row that cannot become a pair; the text is the reason, the same for all rows of its kind."""

    def __init__(self, reason: str, kind: Kind = "malformed") -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def conversation(value: Any, part: str) -> Messages:
    """A list of messages: `{role, content}`, or ShareGPT's `{from, value}`; one message stands for a list of one."""
    if value is None:
        raise BadRow(f"without '{part}'", "missing")
    value = listed(value) or value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{part} is neither text nor a list of messages")
    return tuple(_sharegpt(item, part) if _is_sharegpt(item) else _chat(item, part) for item in value)


def prompt_of(value: Any, part: str = "prompt") -> Messages:
    """A prompt as messages; text is a user turn."""
    if isinstance(value, str) and not listed(value):
        return (message("user", value, part),)
    return conversation(value, part)


def answer_of(value: Any, side: str) -> Messages:
    """An answer as messages; text is an assistant turn."""
    if isinstance(value, str) and not listed(value):
        return (message("assistant", value, side),)
    return conversation(value, side)


def with_system(row: Row, prompt: Messages, *columns: str) -> Messages:
    """The prompt with the row's system text in front, unless it has a system turn already."""
    for column in columns:
        text = row.get(column)
        if isinstance(text, str) and text.strip() and prompt and prompt[0]["role"] != "system":
            return (message("system", text, column), *prompt)
    return prompt


def transcript(text: str, part: str) -> Messages:
    r"""The turns of a text `\n\nHuman: … \n\nAssistant: …`."""
    pieces = _TRANSCRIPT.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRow(f"{part} is no transcript that starts with Human:")
    roles, texts = pieces[1::2], pieces[2::2]
    return tuple(message(_TRANSCRIPT_ROLES[role], said.strip(), part) for role, said in zip(roles, texts, strict=True))


def asked_in_transcript(text: str, part: str = "prompt") -> Messages:
    r"""The turns of a transcript that ends with `Assistant:`, where the answer is to follow."""
    turns = transcript(text, part)
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def is_transcript(value: Any) -> bool:
    """True for text that starts with a Human turn and has an Assistant turn."""
    return isinstance(value, str) and value[:16].lstrip().startswith("Human:") and "\n\nAssistant:" in value


def split_shared_prefix(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Both sides hold the whole conversation: the messages they share are the prompt."""
    if says_the_same(chosen, rejected):
        raise BadRow("chosen equals rejected", "equal")
    shared = shared_length(without_call_ids(chosen), without_call_ids(rejected))
    if shared == 0:
        raise BadRow("without 'prompt', and chosen and rejected share no first message", "prefix")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def shared_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two conversations, or two texts, share at their start."""
    shared = 0
    while shared < min(len(left), len(right)) and left[shared] == right[shared]:
        shared += 1
    return shared


def says_the_same(left: Messages, right: Messages) -> bool:
    """True for conversations that differ at most in the ids of their tool calls."""
    return without_call_ids(left) == without_call_ids(right)


def without_call_ids(messages: Messages) -> Messages:
    """The same turns without the ids of tool calls: these are drawn anew for each answer, and say nothing."""
    return tuple(_without_call_ids(said) for said in messages)


def _without_call_ids(said: Message) -> Message:
    if "tool_calls" not in said and "tool_call_id" not in said:
        return said
    base_of = said.copy()
    base_of.pop("tool_call_id", None)
    if "tool_calls" in base_of:
        base_of["tool_calls"] = [{key: call[key] for key in call if key != "id"} for call in base_of["tool_calls"]]
    return base_of


def listed(value: Any) -> list[Any] | None:
    """Messages from a CSV cell, which can hold them only as text: a list of objects with a role, or one, else None.

    JSON is read, and what Python prints of such messages: pandas' `to_csv` and `csv.DictWriter` write that. An object
    alone is a message only if it has a role that we know and a content: an answer may well be JSON of its own.

    Raises:
        BadRow: a text that begins as such messages do and is neither.
    """
    found = _OBJECTS.match(value) if isinstance(value, str) else None
    if found is None:
        return None
    in_list = found[1] is not None
    parsed = from_json(value)
    if parsed is None and _SPEAKER.search(value):
        parsed = _from_python(value)
        if parsed is None and _SPOKEN.search(value) and (in_list or _is_cut_message(value)):
            raise BadRow("messages that are neither JSON nor a Python list: write them as JSON")
    if not in_list:
        return [parsed] if _is_message(parsed) else None
    if not isinstance(parsed, list):
        return None
    return parsed if all(isinstance(item, dict) and ("role" in item or "from" in item) for item in parsed) else None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if _is_sharegpt(value):
        return value["from"] in (*_SHAREGPT_ROLES, "function_call") and isinstance(value.get("value"), str)
    return value.get("role") in ROLES and ("content" in value or "tool_calls" in value)


def _is_cut_message(text: str) -> bool:
    """True if a text begins as one message does, unless an object that is whole has more text after it."""
    if not _ONE_MESSAGE.match(text):
        return False
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return True
    return False


LITERAL = r"<unknown>\Z"
"""The module that Python names in what it says of a text that `ast.literal_eval` is given."""


def _from_python(text: str) -> Any:
    """What a text holds as a Python literal, or None."""
    try:
        never_warn(SyntaxWarning, LITERAL)  # a backslash in somebody's text
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def from_json(value: Any) -> Any:
    """What a text holds as JSON, or None; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """A finite number, also from a CSV cell; anything else is no score."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def text_of(row: Row, column: str) -> str:
    """The text of a column that a format cannot do without."""
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f"without text in '{column}'", "missing")
    return value


def tools_of(row: Row) -> Tools:
    """The `tools` column: schemas of functions, as a list, or as text of JSON or Python; bare schemas are wrapped."""
    value = from_json(row.get("tools"))
    if value is None and isinstance(row.get("tools"), str):
        value = _from_python(row["tools"])
    if value is None or value == "":
        if isinstance(row.get("tools"), str) and row["tools"].strip():
            raise BadRow("tools is not a JSON list")
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow("tools is not a list of function schemas")
    if not _is_clean(value):
        raise BadRow("tools holds half of a character (a lone surrogate)")
    return tuple(item if "function" in item else {"type": "function", "function": item} for item in value)


def message(role: str, content: str, part: str) -> Message:
    """One message whose text any tokenizer can read."""
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        # JSON's "\ud83d" is half of an emoji, from a text that was cut within it: no tokenizer can read that.
        raise BadRow(f"{part} holds half of a character (a lone surrogate)") from None
    return Message(role=role, content=content)


def has_text(said: Message) -> bool:
    """True if a turn says or calls something; what it thought alone is no answer."""
    return bool(said["content"].strip() or said.get("tool_calls"))


def _chat(item: Any, part: str) -> Message:
    if not isinstance(item, dict):
        raise BadRow(f"{part} has a message without text content")
    calls = item.get("tool_calls")
    content = item.get("content")
    if isinstance(content, list):
        calls = calls or _typed_calls(content)
        content = _typed_text(content, part)
    elif content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{part} has a message without text content")
    role = item.get("role")
    if role not in ROLES:
        raise BadRow(f"{part} has a message with an unknown role ({shown(role)})")
    made = message(role, content, part)
    if role == "assistant":
        thought = next(
            (item[name] for name in REASONING if isinstance(item.get(name), str) and item[name].strip()), None
        )
        if thought:
            made["reasoning_content"] = message(role, thought, part)["content"]
        if calls:
            made["tool_calls"] = _tool_calls(calls, part)
    elif role == "tool":
        for key in ("name", "tool_call_id"):
            if isinstance(item.get(key), str):
                made[key] = message(role, item[key], part)["content"]
    return made


def _typed_text(content: Sequence[Any], part: str) -> str:
    """Text of a content list: `{type: text, text: …}`, in LLaMA-Factory's v1 format `{type: text, value: …}`."""
    texts = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind is None:
            raise BadRow(f"{part} has a message without text content")
        if kind == "tool_call":
            texts.append("")
            continue
        text = item.get("text") if item.get("text") is not None else item.get("value")
        if kind != "text" or not isinstance(text, str):
            raise BadRow(f"{part} has content that is not text ({shown(kind)})")
        texts.append(text)
    if not texts:
        raise BadRow(f"{part} has a message without text content")
    return "".join(texts)


def _typed_calls(content: Sequence[Any]) -> list[Any]:
    """Calls of a content list in LLaMA-Factory's v1 format: `{type: tool_call, value: …}`, each as JSON text."""
    parts = [item for item in content if isinstance(item, dict) and item.get("type") == "tool_call"]
    return [from_json(item.get("value")) for item in parts]


def _is_sharegpt(item: Any) -> bool:
    return isinstance(item, dict) and "from" in item and "role" not in item


def _sharegpt(item: dict[str, Any], part: str) -> Message:
    said, value = item["from"], item.get("value")
    if not isinstance(value, str):
        raise BadRow(f"{part} has a message without text content")
    if said == "function_call":
        calls = from_json(value)
        made = message("assistant", "", part)
        made["tool_calls"] = _tool_calls(calls if isinstance(calls, list) else [calls], part)
        return made
    role = _SHAREGPT_ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"{part} has a message with an unknown role ({shown(said)})")
    return message(role, value, part)


def _tool_calls(calls: Any, part: str) -> list[dict[str, Any]]:
    """Calls as `{id, type: function, function: {name, arguments}}`, arguments as an object: what chat templates read.

    The id is there if the row has one: Mistral's templates refuse calls without.
    """
    made = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{part} has a tool call without a function name")
        given = function.get("arguments")
        parsed = from_json(given)  # OpenAI writes them as JSON text
        arguments = (given if parsed is None else parsed) or {}
        given_id = call.get("id") if isinstance(call, dict) else None
        named = {"id": given_id} if isinstance(given_id, str) else {}
        made.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not _is_clean(made):
        raise BadRow(f"{part} holds half of a character (a lone surrogate)")
    return made


def _is_clean(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, TypeError, RecursionError):
        return False
    return True
