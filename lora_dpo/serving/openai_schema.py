"""The words of OpenAI's chat API: requests read strictly, answers and errors written. No network, no model.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from lora_dpo.config.reading import nearest
from lora_dpo.config.template_kwargs import TemplateKwargs, checked_template_kwargs
from lora_dpo.data import Message
from lora_dpo.data.chat_template import assistant_turn
from lora_dpo.data.keywords_read import note_of_keywords
from lora_dpo.data.thoughts import ThoughtSplitter
from lora_dpo.errors import RequestRefused
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.request import Completion
from lora_dpo.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    # of servers that are like OpenAI's, and of clients that send all that any of these takes
    "top_k": (0, -1),
    "min_p": (0,),
    "top_a": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Parameters that nothing here computes, with the values that ask for nothing; any other value is refused."""

NOTES = ("metadata", "safety_identifier", "prompt_cache_key")
"""Parameters that are the caller's notes to OpenAI: they change no answer anywhere."""

NEUTRAL_OF_TURN: Mapping[str, Sequence[Any]] = {
    "tool_calls": ([],),
    "refusal": ("",),
    "annotations": ([],),
    "images": ([],),
    "thinking_blocks": ([],),
}
"""The same of a message."""

REASONING_OF_TURN = ("reasoning_content", "reasoning")
"""Where clients keep what an earlier answer was thought through with: for the chat template, if it reads that."""

NOTES_OF_TURN = ("id", "object", "created", "created_at", "timestamp", "metadata", *REASONING_OF_TURN)
"""What clients keep beside the text of a message and send back with it."""


MAX_STOP = 1000
"""Characters of a stop text: each token of an answer is held against it."""

MAX_USER = 512
"""Characters of the caller's name for whom it speaks for."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_TextPart], FailFast(), BeforeValidator(_as_parts)]
    name: str | None = None
    reasoning_content: str = ""


_Stop = Annotated[str, Field(max_length=MAX_STOP)]


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(_Strict):
    model: str
    messages: Annotated[list[_Turn], Field(min_length=1), FailFast()]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[Annotated[list[_Stop], Field(max_length=4)] | None, BeforeValidator(_as_list)] = None
    user: Annotated[str, Field(max_length=MAX_USER)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(checked_template_kwargs)] | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A request that makes sense."""

    model: str
    messages: list[Message]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    user: str
    chat_template_kwargs: TemplateKwargs = field(default_factory=dict)
    """As vLLM has it: keywords for the chat template."""
    thoughts_apart: bool = True
    """As llama.cpp has it: `reasoning_format`, but for `none`."""


def read_request(content: bytes, *, max_new_tokens: int) -> ChatRequest:
    """The body of a `POST /v1/chat/completions`.

    Args:
        max_new_tokens: length of an answer where the request names none, and the most that it may name.

    Raises:
        RequestRefused: what is wrong, in OpenAI's terms.
    """
    body = _checked(content)
    longest = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if longest is not None and longest > max_new_tokens:
        raise RequestRefused(
            f"An answer of {longest} tokens is asked for; at most {max_new_tokens} are given here.",
            param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        )
    if body.stream_options is not None and not body.stream:
        raise RequestRefused("stream_options needs stream: true.", param="stream_options")
    stop = tuple(body.stop or ())
    if "" in stop:
        raise RequestRefused("A stop text is empty: it would end every answer at once.", param="stop")
    return ChatRequest(
        model=body.model,
        messages=[_message(turn) for turn in body.messages],
        sampling=Sampling(
            max_new_tokens=longest or max_new_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,  # OpenAI's defaults
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(63) if body.seed is None else body.seed,
        ),
        stop=stop,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        user=body.user or "",
        chat_template_kwargs=body.chat_template_kwargs or {},
        thoughts_apart=body.reasoning_format != "none",
    )


THINKING_OFF = ("enable_thinking", "thinking")
"""Keywords that ask for nothing where they are false and the chat template does not read them: it does not think."""


def check_keywords(tokenizer: PreTrainedTokenizerBase, kwargs: TemplateKwargs) -> None:
    """Raise `RequestRefused` for keywords that the chat template does not read: nobody would see that they are lost."""
    asked = {name: value for name, value in kwargs.items() if value or name not in THINKING_OFF}
    if unread := note_of_keywords(tokenizer, asked):
        raise RequestRefused(unread, param="chat_template_kwargs")


def _checked(content: bytes) -> _Body:
    try:
        given = json.loads(content)
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestRefused("The body holds half of a character (a lone surrogate). Cut text by characters.") from None
    except (ValueError, RecursionError):
        raise RequestRefused("The body is not JSON.") from None
    if not isinstance(given, dict):
        raise RequestRefused("The body is not a JSON object.")
    for name, values in NEUTRAL.items():
        asked = given.pop(name, None)
        if asked is not None and asked not in values:
            raise RequestRefused(f"{name} is not supported here: leave it out.", param=name)
    for name in NOTES:
        given.pop(name, None)
    given = {name: value for name, value in given.items() if value is not None}
    turns = given.get("messages")
    if isinstance(turns, list):
        given["messages"] = [_asked_of_turn(turn, f"messages.{place}") for place, turn in enumerate(turns)]
    try:
        return _Body.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None


def _asked_of_turn(turn: Any, where: str) -> Any:
    """A message without what asks for nothing. Raises `RequestRefused` for what is not understood here."""
    if not isinstance(turn, dict):
        return turn
    thoughts = [turn[name] for name in REASONING_OF_TURN if turn.get(name) and isinstance(turn[name], str)]
    turn = {name: value for name, value in turn.items() if value is not None and name not in NOTES_OF_TURN}
    if thoughts:  # `_message` leaves out those of other roles
        turn["reasoning_content"] = thoughts[0]
    for name, values in NEUTRAL_OF_TURN.items():
        asked = turn.pop(name, None)
        if asked is not None and asked not in values:
            raise RequestRefused(f"{where}.{name} is not supported here: only text is understood.", param="messages")
    if turn.get("role") in ("tool", "function"):
        raise RequestRefused(f"{where} answers a tool call: only text is understood here.", param="messages")
    return turn


def _refusal(error: ValidationError) -> RequestRefused:
    """Pydantic's first complaint, as a sentence."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    where = ".".join(map(str, first["loc"]))
    if name == "reasoning_effort":
        said = "There is no parameter reasoning_effort here. A chat template that reads it takes it in "
        return RequestRefused(f"{said}chat_template_kwargs.", param=name)
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return RequestRefused(f"There is no parameter {name}.{nearest(name, _Body.model_fields)}", param=name)
    if first["type"] == "missing":
        return RequestRefused(f"{where} is missing.", param=name)
    if name == "messages" and str(first["loc"][-1]) == "type":
        return RequestRefused(f"{where} is {shown(first['input'])}: only text is understood here.", param=name)
    said = first["msg"].removeprefix("Value error, ")
    return RequestRefused(f"{where}: {said}.", param=name)


def _message(turn: _Turn) -> Message:
    text = "".join(part.text for part in turn.content)
    if turn.role != "assistant":
        return Message(role="system" if turn.role == "developer" else turn.role, content=text)
    said = assistant_turn(text)
    if turn.reasoning_content:
        said["reasoning_content"] = turn.reasoning_content
    return said


# --- what is sent back ----------------------------------------------------------------------------


class Deltas:
    """Pieces of an answer as `delta`s: `reasoning_content` for what is thought before it, `content` for what is said.

    Source: https://api-docs.deepseek.com/guides/reasoning_model

    Args:
        opened: the prompt began a thought already.
        apart: False leaves the text as the model writes it.
    """

    def __init__(self, *, opened: bool, apart: bool) -> None:
        self._splitter = ThoughtSplitter(opened=opened) if apart else None
        self._thinks = False
        self._space = ""
        """White space that may be the thought's end: none is around it."""

    def feed(self, piece: str) -> Iterator[dict[str, str]]:
        """What is certain now."""
        if self._splitter is not None:
            yield from self._named(self._splitter.feed(piece))
        elif piece:
            yield {"content": piece}

    def end(self) -> Iterator[dict[str, str]]:
        """What was still held back."""
        if self._splitter is not None:
            yield from self._named(self._splitter.end())

    def _named(self, parts: Iterator[tuple[bool, str]]) -> Iterator[dict[str, str]]:
        for inside, part in parts:
            if not inside:
                yield {"content": part}
                continue
            text = self._space + part if self._thinks else part.lstrip()
            thought = text.rstrip()
            self._space = text[len(thought) :]
            if thought:
                self._thinks = True
                yield {"reasoning_content": thought}


@dataclass(frozen=True)
class Envelope:
    """What all parts of one answer have in common."""

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, reply: Completion, deltas: Deltas) -> dict[str, Any]:
        """A whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        for delta in (*deltas.feed(reply.text), *deltas.end()):
            for name, text in delta.items():
                message[name] = message.get(name, "") + text
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(reply)}

    def chunk(self, delta: Mapping[str, str], finish: str | None = None) -> dict[str, Any]:
        """A piece of an answer."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, reply: Completion) -> dict[str, Any]:
        """The last piece, for those who asked for the counts."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(reply)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def finish_reason(reply: Completion) -> str:
    """`stop` where the model ended its turn, or came to a stop text; `length` where it was cut."""
    return "stop" if reply.finished else "length"


def usage(reply: Completion) -> dict[str, Any]:
    """Token counts. Those of thoughts are a part of `completion_tokens`, shown apart or not."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.tokens,
        "total_tokens": reply.prompt_tokens + reply.tokens,
        "completion_tokens_details": {"reasoning_tokens": reply.thought_tokens},
    }


def model_entry(name: str, created: int) -> dict[str, Any]:
    """A model, as `/v1/models` lists it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lora-dpo"}


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
"""The end of a stream."""
