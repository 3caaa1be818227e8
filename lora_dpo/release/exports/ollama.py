"""A Modelfile whose template and stop tokens are the model's own.

Ollama writes prompts with a Go template, models with a Jinja one. The Jinja template is asked, with marked messages,
what it writes around each role; what follows is held against it on other conversations before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_dpo.data import Message
from lora_dpo.data.chat_template import render
from lora_dpo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The last of it is no block: Jinja would take a line break of the template's own away after one.
_MARK_DATES = "{% macro strftime_now(form) %}\u2042{{ form }}\u2042{% endmacro %}{{ '' }}"
_DATE = re.compile("\u2042(%[^\u2042]*)\u2042")
"""What stands for today's date while the template is asked, with the format that it wants."""
_TIME_OF_DAY = re.compile("%[-_0^#]?[cHIkLlMpPrRsSTXzZ]")
_OLLAMAS_DATE = "%Y-%m-%d"

_CONVERSATIONS = (
    ("Hi.",),
    ("What is {2 + 2}?\nAnd why?", "It is 4.", "Thanks"),
    ("a", "b", "c", "d", "e"),
)


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around messages, BOS left out: llama.cpp writes that."""

    before_all: str
    """At the start of a conversation without a system message: a default one, or nothing."""
    around: dict[str, tuple[str, str]]
    """Before and after a message of each role; without `system` if the template has no such turn."""
    answer: str
    """Where the assistant is to write."""

    def write(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant is to write."""
        text = "" if messages[0]["role"] == "system" else self.before_all
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def go_template(self) -> str:
        """The same for Ollama. No `{{-` anywhere: it would eat the line breaks that belong to the format."""
        first = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.before_all}{{{{ end }}}}'
        turns = ""
        for number, (role, (before, after)) in enumerate(self.around.items()):
            word = "if" if number == 0 else "else if"
            turns += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        loop = f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}"
        return _DATE.sub("{{ currentDate }}", (first if self.before_all else "") + loop + self.answer)

    def dates(self) -> list[str]:
        """The formats in which today's date is written."""
        texts = [self.before_all, self.answer, *(text for pair in self.around.values() for text in pair)]
        return list(dict.fromkeys(form for text in texts for form in _DATE.findall(text)))


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Ask a chat template what it writes around each message.

    Raises:
        ModelError: the template does more than write turns one after another.
    """

    def written(*roles: str, ask: bool = False) -> list[str]:
        """The text between the marked messages: one part more than there are messages."""
        messages = [Message(role=role, content=f"\u2042{index}\u2042") for index, role in enumerate(roles)]
        text = _write(tokenizer, messages, ask=ask)
        parts = []
        for message in messages:
            part, found, text = text.partition(message["content"])
            if not found:
                raise _does_more(tokenizer)
            parts.append(part)
        return [*parts, text]

    start, after_user = written("user")
    answer = written("user", ask=True)[1].removeprefix(after_user)
    _, before_assistant, after_assistant = written("user", "assistant")
    before_assistant = before_assistant.removeprefix(after_user)
    between = written("user", "assistant", "user")[2]
    before_user = between.removeprefix(after_assistant)
    around = {"user": (before_user, after_user), "assistant": (before_assistant, after_assistant)}
    bos = tokenizer.bos_token or ""
    before_all = start.removesuffix(before_user)
    starts_with_bos = bool(bos) and start.startswith(bos) and not before_user.startswith(bos)
    try:
        before_system, after_system, _ = written("system", "user")
    except ModelError:
        pass  # Gemma 2's template refuses a system turn
    else:
        if after_system.endswith(before_user) and before_system != start:
            if starts_with_bos:
                before_system = before_system.removeprefix(bos)
            around = {"system": (before_system, after_system.removesuffix(before_user)), **around}
    if starts_with_bos:
        before_all = before_all.removeprefix(bos)
    found = Turns(before_all, around, answer)
    _hold_against(tokenizer, found, bos if starts_with_bos else "")
    return found


def _write(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool) -> str:
    """The conversation as text, with a mark where the template writes today's date."""
    own = tokenizer.chat_template
    template = own.get("default") if isinstance(own, dict) else own
    return render(tokenizer, messages, add_generation_prompt=ask, template=template and _MARK_DATES + template)


def modelfile(model: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> str:
    """The text of a Modelfile for the GGUF file `model`. Raises `ModelError` for a template that cannot be written."""
    turns = read_turns(tokenizer)
    literals = [turns.before_all, turns.answer, *(text for pair in turns.around.values() for text in pair)]
    if any(sign in text for text in literals for sign in ("{{", "}}", '"""')):
        raise _does_more(tokenizer)
    if any(_TIME_OF_DAY.search(form) for form in turns.dates()):
        raise _does_more(tokenizer)
    lines = [f"FROM ./{model}", f'TEMPLATE """{turns.go_template()}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if "system" not in turns.around:
        lines.insert(0, "# The model's template has no turn for a system message: Ollama leaves one out.")
    if others := [form for form in turns.dates() if form != _OLLAMAS_DATE]:
        lines.insert(
            0,
            f"# The model's template writes today's date as {', '.join(others)}; Ollama writes it as {_OLLAMAS_DATE}.",
        )
    return "\n".join(lines) + "\n"


def _hold_against(tokenizer: PreTrainedTokenizerBase, turns: Turns, bos: str) -> None:
    """Raise `ModelError` unless the turns write what the template writes, also for conversations not asked before."""
    systems = ([], ["Be brief."]) if "system" in turns.around else ([],)
    for contents in _CONVERSATIONS:
        for system in systems:
            said = [
                Message(role="user" if i % 2 == 0 else "assistant", content=text) for i, text in enumerate(contents)
            ]
            messages = [*(Message(role="system", content=text) for text in system), *said]
            if bos + turns.write(messages) != _write(tokenizer, messages, ask=True):
                raise _does_more(tokenizer)


def _does_more(tokenizer: PreTrainedTokenizerBase) -> ModelError:
    return ModelError(
        f"The chat template of {tokenizer.name_or_path} does more than write turns one after another, so no Ollama "
        "template follows from it. Use --to gguf: llama.cpp reads the model's own template from the file."
    )
