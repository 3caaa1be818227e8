"""One base in memory with any number of adapters on it, for many who ask at once.

    threads that ask ──► FairQueue ──► one thread that computes ──► each one's own pieces of text
    a training, in slices ──┘

The weights are loaded once. What answers and what trains are trees of modules of their own over them
(`adapter_pool.py`, `training_job.py`), so neither can disturb the other.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lora_dpo import places
from lora_dpo.adapters.folder import is_strict
from lora_dpo.adapters.package import check_name
from lora_dpo.config.recipe import Dtype, ModelSection, Quantize, Recipe
from lora_dpo.config.template_kwargs import NO_KWARGS, TemplateKwargs
from lora_dpo.data import Message
from lora_dpo.data.chat_template import prompt_ids
from lora_dpo.data.thoughts import opened_thought
from lora_dpo.errors import Busy, ConfigError, LoraDPOError, ModelError
from lora_dpo.events import OnEvent
from lora_dpo.files import refuse_existing
from lora_dpo.model.base import Base, load_base
from lora_dpo.model.decoding import Sampling, stream_from
from lora_dpo.model.lora import share_weights
from lora_dpo.model.stored_form import can_pack
from lora_dpo.serving.adapter_pool import AdapterPool
from lora_dpo.serving.fair_queue import INTERNAL, FairQueue, Task
from lora_dpo.serving.request import (
    Completion,
    GenerationRequest,
    PendingRequest,
    Stream,
    StreamItem,
    refuse_long,
    refuse_prompt,
    why_it_failed,
)
from lora_dpo.serving.training_job import TrainingJob
from lora_dpo.training.run import Look

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_PROMPT = 4096
"""Longest prompt, in tokens, where the model's context has room for it."""


class Host:
    """One base in memory with any number of adapters on it by name; one computation at a time.

    Every method may be called from any thread.

    Args:
        base: without an adapter on it; it stays so.
        adapters_dir: adapters are the folders in it, by their names; by default `adapters/`.
        strict: leave out those that are not quite as their passports say; by default as `strictness` says.
        max_waiting: requests that may wait; one more is refused, or takes the place of one of whoever has most.
        max_prompt_tokens: longest prompt; by default three quarters of the model's context, at most 4,096.
    """

    def __init__(
        self,
        base: Base,
        adapters_dir: Path | None = None,
        *,
        strict: bool | None = None,
        max_waiting: int = 32,
        max_prompt_tokens: int | None = None,
    ) -> None:
        self.base, self.adapters_dir = base, adapters_dir or places.adapters()
        self.strict = is_strict() if strict is None else strict
        self.context = int(base.model.config.get_text_config().max_position_embeddings)
        """Tokens that prompt and answer may have together."""
        self.max_prompt_tokens = max_prompt_tokens or min(MAX_PROMPT, self.context * 3 // 4)
        self.job: TrainingJob | None = None
        """The training that goes on, or the last one."""
        self._fair_queue = FairQueue(max_waiting)
        self._pool = AdapterPool(base, self.adapters_dir, strict=self.strict)
        self.keywords_compared = self._pool.keywords_compared
        """See there."""
        self._lock = threading.Lock()
        self._closing = self._warming = False
        self._refusing: str | None = None
        """Why no request and no training is taken, after `drain`."""
        self._ahead: threading.Thread | None = None
        """Puts adapters into memory ahead."""
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()
        self._warm_up()

    def incompatibility(self, name: str) -> str | None:
        """Why an adapter is not among `names`, or what of its base differs from this one; None if all is well."""
        return self._pool.incompatibility(name)

    def names(self) -> list[str]:
        """`base`, then every adapter in the adapters' folder that fits it, as they are on the disk now."""
        names = self._pool.names()
        if self._pool.not_loaded():
            self._warm_up()
        return names

    def in_memory(self) -> list[str]:
        """Adapters that answer without being read first, the last used last."""
        return self._pool.held()

    def is_warming(self) -> bool:
        """Whether adapters are being put into memory ahead, or are about to be."""
        return self._warming or bool(self._pool.not_loaded())

    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._fair_queue.waiting()

    def model_section(self) -> ModelSection:
        """The `model:` of a recipe that trains on this base."""
        base = self.base
        dtype: Any = base.dtype
        held = ModelSection(name=base.name, revision=base.revision, quantize=base.asked, dtype=dtype)
        choosable = base.asked != "none" and can_pack(base.quantize)
        return held.model_copy(update={"packed": base.packed}) if choosable else held

    # --- answers ----------------------------------------------------------------------------------

    def stream(
        self,
        who: str,
        conversation: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        client: str,
        stop: Sequence[str] = (),
        chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    ) -> Stream:
        """One answer in pieces, after waiting for a turn.

        Args:
            who: a name of `names`.
            client: who asks, `PLACE` or `PLACE/NAME`; places take turns, and so do the names of one (`FairQueue`).
            stop: the answer ends before the first of these texts.
            chat_template_kwargs: keywords for the chat template, on top of those that the adapter was trained with.

        Raises:
            Busy: too many wait, or the prompt is too long (`PromptTooLong`).
            AdapterError: there is no such adapter, or it does not fit.
            ModelError: the chat template refuses the conversation.
        """
        how: dict[str, Any] = {"client": client, "stop": stop, "chat_template_kwargs": chat_template_kwargs}
        return Stream(lambda deliver: self.submit(who, conversation, sampling, deliver=deliver, **how))

    def answer(
        self,
        who: str,
        conversation: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        client: str,
        stop: Sequence[str] = (),
        chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    ) -> Completion:
        """The whole answer, with counts and times; raises as `stream` does."""
        kwargs = chat_template_kwargs
        stream = self.stream(who, conversation, sampling, client=client, stop=stop, chat_template_kwargs=kwargs)
        list(stream)
        assert stream.reply is not None  # noqa: S101 - a stream that ends without one has raised
        return stream.reply

    def submit(
        self,
        who: str,
        conversation: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        client: str,
        deliver: Callable[[StreamItem], None],
        stop: Sequence[str] = (),
        chat_template_kwargs: TemplateKwargs = NO_KWARGS,
    ) -> PendingRequest:
        """`stream` for a caller that must not wait; raises as it does.

        Args:
            deliver: as of a `PendingRequest`: called for every piece, then once for the end; it must not block.
        """
        if self._refusing:
            raise Busy(self._refusing)
        refuse_long(conversation, most=self.max_prompt_tokens)
        self._pool.check(who)
        kwargs = {**self._pool.chat_template_kwargs(who), **chat_template_kwargs}
        with self._lock:  # tokenizers are not made for two threads at once
            prompt = prompt_ids(self.base.tokenizer, conversation, chat_template_kwargs=kwargs)
            thought = opened_thought(self.base.tokenizer, prompt)
        refuse_prompt(prompt, most=self.max_prompt_tokens)
        how: dict[str, Any] = {"sampling": sampling or Sampling(), "stop": tuple(stop), "client": client}
        asked = GenerationRequest(who=who, prompt=prompt, thought=thought, **how)
        return PendingRequest(asked, self._fair_queue, deliver=deliver, compute=self._answer)

    def take_turn(self, work: Callable[[Base], Result]) -> Result:
        """Compute something else on the base, in a turn between the answers; returns, or raises, what it does.

        Args:
            work: is given another tree of modules over the same weights, so that it may put an adapter on it.

        Raises:
            Busy: this host is being shut down.
        """
        turn = Task(lambda: work(share_weights(self.base)))
        self._fair_queue.put(INTERNAL, turn)
        return turn.outcome()

    # --- training ---------------------------------------------------------------------------------

    def start_training(
        self,
        recipe: Recipe,
        name: str,
        on_event: OnEvent | None = None,
        *,
        resume: bool = False,
        look: Look | None = None,
        minutes: float | None = None,
    ) -> TrainingJob:
        """Train an adapter called `name` on this same base, while answers go on between its passes.

        Args:
            recipe: its `model` must be the base (`model_section`), its `output` unset or that adapter's folder.
            on_event: called in the training's thread.
            resume: go on from the checkpoint of an interrupted training of that name.
            look: called in the training's thread between its steps, with the model in training.
            minutes: search so long for the best settings (`tune`), in place of one training; without `look`.

        Raises:
            Busy: a training goes on already.
            ConfigError: the recipe names another output.
            PackageError: that is no name for an adapter.
            OutputError: there is one of that name.
        """
        output = self.adapters_dir / check_name(name)
        if recipe.output is not None and Path(recipe.output).absolute() != output.absolute():
            raise ConfigError(f"The recipe sets output: {recipe.output}, but the adapter is to be {output}. Unset it.")
        refuse_existing(output)
        recipe = recipe if recipe.output else recipe.model_copy(update={"output": str(output)})
        with self._lock:
            if self._refusing:
                raise Busy(self._refusing)
            if self.job is not None and self.job.running:
                raise Busy(f"The training of {self.job.name} goes on. Wait for its end, or stop it first.")
            how: dict[str, Any] = {"on_event": on_event, "resume": resume, "look": look, "minutes": minutes}
            self.job = TrainingJob(self.base, self._fair_queue, recipe, name=name, **how)
            return self.job

    # --- the end ----------------------------------------------------------------------------------

    def drain(self, reason: str) -> None:
        """Take nothing more, and return when those that were taken have their answers: then `close` cuts nobody off.

        Args:
            reason: what is said to whoever comes now.

        Raises:
            Busy: a training goes on; then all is as before.
        """
        with self._lock:
            if self.job is not None and self.job.running:
                raise Busy(f"The training of {self.job.name} goes on. Wait for its end, or stop it first.")
            self._refusing = reason
        while True:
            turn: Task[None] = Task(lambda: None)
            self._fair_queue.put(INTERNAL, turn)
            turn.outcome()  # whatever was being written has ended by then
            if not self.waiting():
                return

    def close(self) -> None:
        """End: a training saves a checkpoint, an answer stops, those who wait are told."""
        if self.job is not None and self.job.running:
            self.job.interrupt()
            self.job.wait()
        self.stop_answering()
        self._thread.join()
        if self._ahead is not None:
            self._ahead.join()

    def stop_answering(self) -> None:
        """Take no more requests: those who wait are told, and an answer ends at its next token."""
        self._closing = True
        for work in self._fair_queue.close():
            if isinstance(work, PendingRequest):
                work.deliver(Busy("The model is being shut down."))
            elif isinstance(work, Task):
                work.done.set()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # --- the thread that computes -----------------------------------------------------------------

    def _work(self) -> None:
        while (work := self._fair_queue.take()) is not None:
            try:
                work.run()
            except Exception:  # the one thread that computes must go on for the others
                logger.exception("A turn failed.")

    def _warm_up(self) -> None:
        """Put adapters into memory between the answers, one a turn, so that nobody's first answer waits for that."""
        with self._lock:
            if self._warming or self._closing:
                return
            self._warming = True
            # Not in the thread that computes: a large adapter takes a while to check.
            self._ahead = threading.Thread(target=self._read_ahead, name="adapters", daemon=True)
            self._ahead.start()

    def _read_ahead(self) -> None:
        try:
            while not self._closing and (waiting := self._pool.not_loaded(wait=math.inf)):
                turn = Task(functools.partial(self._pool.preload, waiting[0]))
                with suppress(Busy):  # it is closing
                    self._fair_queue.put(INTERNAL, turn)
                    turn.outcome()
        finally:
            self._warming = False

    def _answer(self, request: PendingRequest) -> None:
        outcome: StreamItem
        try:
            outcome = self._generate(request)
        except LoraDPOError as error:
            outcome = error
        except Exception as error:  # whatever it was, the one who waits must be told
            logger.exception("An answer failed.")
            outcome = ModelError(why_it_failed(error))
        request.deliver(outcome)

    def stream_from(self, *asked: Any, **settings: Any) -> Any:
        """The pieces of one answer, as `decoding.stream_from`; tests put something in its place."""
        return stream_from(*asked, **settings)

    def _generate(self, request: PendingRequest) -> Completion:
        began, asked = time.monotonic(), request.asked
        room = min(asked.sampling.max_new_tokens, self.context - len(asked.prompt))
        pieces = self.stream_from(
            self._pool.resident(asked.who),
            self.base.tokenizer,
            asked.prompt,
            sampling=replace(asked.sampling, max_new_tokens=room),
            stop=asked.stop,
        )
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                answer = end.value
                break
            if request.cancelled or self._closing:
                raise Busy("The answer was stopped.")
            request.tokens += 1
            if piece:
                request.deliver(piece)
        request.tokens = answer.tokens
        spent = time.monotonic() - began, began - request.since, answer.thought_tokens
        return Completion(answer.text, answer.tokens, len(asked.prompt), answer.finished, *spent)


def open_host(
    model: str,
    adapters_dir: str | Path | None = None,
    *,
    revision: str | None = None,
    quantize: Quantize = "auto",
    dtype: Dtype = "auto",
    strict: bool | None = None,
    max_waiting: int = 32,
    max_prompt_tokens: int | None = None,
) -> Host:
    """Load a base once, and host it.

    Raises:
        ModelError: the base cannot be loaded.
    """
    base = load_base(model, revision=revision, quantize=quantize, dtype=dtype)
    settings: dict[str, Any] = {"max_waiting": max_waiting, "max_prompt_tokens": max_prompt_tokens}
    return Host(base, Path(adapters_dir or places.adapters()), strict=strict, **settings)
