"""What all tabs use: errors as a message beside the page, and texts that are safe to show as Markdown."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from html import escape
from typing import Any, TypeVar, get_type_hints

import gradio as gr
from pydantic import TypeAdapter, ValidationError

from lora_dpo.data.thoughts import split_thought
from lora_dpo.demo.html import note, thought_title
from lora_dpo.demo.machine_paths import without_paths
from lora_dpo.errors import ConfigError, LoraDPOError
from lora_dpo.model.decoding import Sampling
from lora_dpo.text import SHOWN, one_line, shown

Handler = TypeVar("Handler", bound=Callable[..., Any])
Given = dict[Any, Any]
"""What a handler is given: the values of parts of the page, by these."""
Update = dict[Any, Any]
"""What a handler returns: new values by their parts. What it does not name stays as it is."""
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""Of an event of the page: it is no endpoint for scripts."""

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


def told(handler: Handler) -> Handler:
    """A handler whose `LoraDPOError` becomes a message on the page, in the error's own words."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except LoraDPOError as error:
                raise refusal(error) from None

        return generator  # type: ignore[return-value]

    @functools.wraps(handler)
    def function(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except LoraDPOError as error:
            raise refusal(error) from None

    return function  # type: ignore[return-value]


def typed(handler: Handler) -> Handler:
    """A handler whose values are held to the types of its parameters: what a script sends may be any JSON.

    A null in the place of a parameter that has a default is that default. Raises `ConfigError` for another type.
    """
    signature = inspect.signature(handler)
    hints = {name: hint for name, hint in get_type_hints(handler).items() if name not in ("request", "return")}
    checks = {name: TypeAdapter(hint) for name, hint in hints.items()}

    def taken(args: Any, kwargs: Any) -> inspect.BoundArguments:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            default = signature.parameters[name].default
            if name in checks and value is None and default is not inspect.Parameter.empty:
                given.arguments[name] = default
            elif name in checks:
                try:
                    given.arguments[name] = checks[name].validate_python(value)
                except ValidationError as error:
                    raise _of_another_type(name, error) from None
        return given

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generator(*args: Any, **kwargs: Any) -> Iterator[Any]:
            given = taken(args, kwargs)
            yield from handler(*given.args, **given.kwargs)

        return generator  # type: ignore[return-value]

    @functools.wraps(handler)
    def function(*args: Any, **kwargs: Any) -> Any:
        given = taken(args, kwargs)
        return handler(*given.args, **given.kwargs)

    return function  # type: ignore[return-value]


def _of_another_type(name: str, error: ValidationError) -> ConfigError:
    """Pydantic's first complaint of a parameter's value, as a sentence."""
    first = error.errors(include_url=False)[0]
    where = one_line(".".join(map(str, (name, *first["loc"]))), SHOWN)
    said = first["msg"]
    return ConfigError(
        f"{where} is {shown(first['input'])}, which this call does not take: {said[0].lower()}{said[1:]}."
    )


def refusal(error: LoraDPOError) -> gr.Error:
    """An error as Gradio's. Its message is HTML there, so ours is escaped: it may quote a name from outside."""
    return gr.Error(escape(without_paths(str(error))), title="", print_exception=False)


def red_line(error: LoraDPOError) -> str:
    """An error as one red line beside what it is about, in the place of a message over the page."""
    return note(str(error), kind="bad")


def terminal(place: str, *, visible: bool = True) -> tuple[gr.Accordion, gr.Textbox]:
    """A folded place for what does the same in a terminal, to copy."""
    with gr.Accordion("The same in a terminal", open=False, visible=visible) as folded:
        text = gr.Textbox(
            show_label=False, interactive=False, buttons=["copy"], max_lines=24, elem_id=place, elem_classes="code"
        )
    return folded, text


def markdown(text: str) -> str:
    """A model's or user's text as Markdown without HTML and pictures; code stays as it is written.

    The page sanitises it once more. This keeps `<tags>` readable, and stops pictures, which would be fetched. Only what
    could be a tag or an entity is written otherwise, since the page's copy button and editor take the text from here.
    """
    parts = _CODE.split(text)
    for index in range(0, len(parts), 2):
        escaped = _TAG.sub("&lt;", _ENTITY.sub("&amp;", parts[index]))
        parts[index] = escaped.replace("![", "!\\[")
    return "".join(parts)


def folded(text: str) -> str:
    """An answer as Markdown, with what was thought before it folded away: a click opens it."""
    thought, said = split_thought(text)
    if not thought:
        return markdown(said or text)
    title = thought_title(thought, said)
    inside = f"<details><summary>{title}</summary>\n\n{markdown(thought)}\n\n</details>"
    return f"{inside}\n\n{markdown(said)}".rstrip()


def plain_text(shown: str) -> str:
    """The text that `markdown` made `shown` of."""
    parts = _CODE.split(shown)
    for index in range(0, len(parts), 2):
        parts[index] = parts[index].replace("!\\[", "![").replace("&lt;", "<").replace("&amp;", "&")
    return "".join(parts)


def client_of(request: gr.Request | None) -> str:
    """Who asks: the address, and there the browser tab, or the script's session."""
    address = getattr(getattr(request, "client", None), "host", None)
    return f"{address or 'local'}/{getattr(request, 'session_hash', None) or 'script'}"


def sampling_of(temperature: float, top_p: float, max_new_tokens: float, seed: float | None) -> Sampling:
    """Settings from controls, held to what is sensible; an emptied field of the seed is 0."""
    return Sampling(
        max_new_tokens=min(4096, max(1, int(max_new_tokens))),
        temperature=min(5.0, max(0.0, float(temperature))),
        top_p=min(1.0, max(0.01, float(top_p))),
        seed=int(seed or 0) % (1 << 31),
    )
