"""A chat with one loaded base: its state and commands, without a terminal.

Everything a line of input can do is a method here, so that the terminal face only reads and prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.loading import load_base_of
from lora_dpo.config.recipe import Dtype, Quantize
from lora_dpo.config.template_kwargs import TemplateKwargs
from lora_dpo.data import Message
from lora_dpo.data.chat_template import assistant_turn
from lora_dpo.data.journal import append_durably
from lora_dpo.errors import OutputError
from lora_dpo.model.base import Base
from lora_dpo.model.decoding import Sampling, stream

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class Chat:
    """A conversation with a base and one adapter on it; `use_adapter` says which of them answers."""

    base: Base
    model: PeftModel
    """The base with the adapter on it (a PeftModel)."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    system: str | None = None
    use_adapter: bool = True
    history: list[Message] = field(default_factory=list)
    chat_template_kwargs: TemplateKwargs = field(default_factory=dict)
    """Keywords for the chat template, for the base as for the adapter."""

    def say(self, text: str) -> Iterator[str]:
        """Add the user's turn and yield the answer in pieces; the answer joins the history.

        If the caller stops early (Ctrl-C), what was said so far is kept as the answer.
        """
        self.history.append(Message(role="user", content=text))
        said = ""
        try:
            for piece in self._stream(self.history):
                said += piece
                yield piece
        finally:
            if said.strip():
                self.history.append(assistant_turn(said.strip()))
            else:
                self.history.pop()  # a turn without an answer would confuse the next one

    def answer_once(self, text: str, *, use_adapter: bool) -> str:
        """The answer to one message on top of the history, which stays as it is."""
        switched, self.use_adapter = self.use_adapter, use_adapter
        try:
            return "".join(self._stream([*self.history, Message(role="user", content=text)])).strip()
        finally:
            self.use_adapter = switched

    def reset(self) -> None:
        """Forget the conversation."""
        self.history.clear()

    def save(self, path: Path) -> None:
        """Write the conversation as one JSONL row of messages, added to the file's end."""
        if not self.history:
            raise OutputError("There is nothing to save yet: say something first.")
        row = {"messages": self.history, "answered_by": "adapter" if self.use_adapter else "base"}
        append_durably(path, row, ours=False)

    def _stream(self, messages: list[Message]) -> Iterator[str]:
        with ExitStack() as stack:
            if not self.use_adapter:
                stack.enter_context(self.model.disable_adapter())
            yield from stream(
                self.model,
                self.base.tokenizer,
                self._turns(messages),
                sampling=self.sampling,
                chat_template_kwargs=self.chat_template_kwargs,
            )

    def _turns(self, messages: list[Message]) -> list[Message]:
        return [Message(role="system", content=self.system), *messages] if self.system else messages


def open_chat(
    adapter: str | Path,
    *,
    model: str | None = None,
    quantize: Quantize | None = None,
    dtype: Dtype = "auto",
    sampling: Sampling | None = None,
    system: str | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
) -> Chat:
    """Load an adapter's base once, put the adapter on it, and start a conversation.

    Args:
        model: another place of the same base; by default the one that the passport names.
        quantize: by default as the adapter was trained.
        chat_template_kwargs: keywords for the chat template, on top of those that the adapter was trained with.

    Raises:
        AdapterError: no adapter there, or made for another base.
        ModelError: the base cannot be loaded.
    """
    adapter = Path(adapter)
    base = load_base_of(adapter, model=model, quantize=quantize, dtype=dtype)
    kwargs = {**open_adapter(adapter).chat_template_kwargs, **(chat_template_kwargs or {})}
    on_it = attach_adapter(base, adapter)
    return Chat(base, on_it, sampling or Sampling(), system, chat_template_kwargs=kwargs)
