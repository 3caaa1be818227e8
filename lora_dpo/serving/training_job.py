"""A training run, or a search of many, in a thread of its own, beside the answers of the same base.

It computes in slices: before a forward pass it lets those who wait go first, once it has had its share of time.
It trains on a tree of modules of its own (`model.share_weights`), so nothing that happens in between, and no way
in which it can end, touches the trees that answer.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lora_dpo.adapters.run_folder import discard_run
from lora_dpo.config.recipe import Recipe
from lora_dpo.errors import LoraDPOError
from lora_dpo.events import Event, OnEvent, Progress, Saved, Stopped, StopSignal
from lora_dpo.model.base import Base
from lora_dpo.model.lora import share_weights
from lora_dpo.serving.fair_queue import INTERNAL, FairQueue
from lora_dpo.training.run import Look, train
from lora_dpo.tuning import TuneResult, tune
from lora_dpo.tuning.folder import begun_options, discard_search

logger = logging.getLogger(__name__)

SLICE = 2.0
"""Seconds that training computes while others wait: about as long as a short answer takes."""

State = Literal["running", "paused", "stopping", "done", "stopped", "failed"]


class TrainingJob:
    """One training. Its thread begins at once.

    Args:
        base: without an adapter on it; it stays so.
        fair_queue: where the job waits for its slices of the one computer.
        recipe: with the `output` that it is to write.
        look: as in `train`.
        minutes: search so long for the best settings (`tune`), in place of one training.
    """

    def __init__(
        self,
        base: Base,
        fair_queue: FairQueue,
        recipe: Recipe,
        *,
        name: str,
        on_event: OnEvent | None,
        resume: bool,
        look: Look | None = None,
        minutes: float | None = None,
    ) -> None:
        self.name, self.recipe, self.minutes = name, recipe, minutes
        self.output = Path(recipe.output or name)
        self.events: list[Event] = []
        """All that happened so far; it only grows."""
        self.error: str | None = None
        """Why it failed, in a sentence."""
        self.folder: Path | None = None
        """The finished adapter; none of a search that found nothing to learn."""
        self.found: TuneResult | None = None
        """What a search came to."""
        self.ended: float | None = None
        """When it was over (monotonic); None while it goes on."""
        self._on_event, self._look, self._resumed = on_event, look, resume
        self._stop = StopSignal()
        self._slices = _Slices(fair_queue)
        self._steering = threading.Lock()
        self._discard = False
        self._end: State | None = None
        self._thread = threading.Thread(target=self._run, args=(base,), name=f"training {name}", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """`done` has an adapter (a search perhaps none), `stopped` has none, `failed` says why in `error`."""
        if self._end is not None:
            return self._end
        if self._ending:
            return "stopping"
        return "running" if self._slices.go.is_set() else "paused"

    @property
    def running(self) -> bool:
        """Whether it goes on, paused or not."""
        return self._end is None

    @property
    def paused_seconds(self) -> float:
        """How long it has stood still so far; the time that a search has does not go on meanwhile."""
        return self._slices.paused

    def pause(self) -> None:
        """Compute nothing from the next forward pass on, until `resume`. A run that is to end is not held up."""
        with self._steering:
            if not self._ending:
                self._slices.go.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._slices.go.set()

    def stop(self, *, keep: bool) -> None:
        """End at the next step.

        Args:
            keep: measure and save the adapter as it is then; before a run's first step there is none to keep. A search
                chooses among what it tried. Otherwise nothing stays, no checkpoint either.
        """
        with self._steering:
            if keep and (self._resumed or self._has_trained()):
                self._stop.keep = True
            else:
                self._discard = self._stop.requested = True
            self.resume()

    def interrupt(self) -> None:
        """End at the next step with a checkpoint, from which a job with `resume=True` goes on."""
        with self._steering:
            self._stop.requested = True
            self.resume()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False if it has not come in `timeout` seconds."""
        self._thread.join(timeout)
        return not self.running

    @property
    def _ending(self) -> bool:
        return self._stop.requested or self._stop.keep

    def _has_trained(self) -> bool:
        """Whether a step is done; a search tells of `trial 0: training`."""
        steps = (event for event in self.events if isinstance(event, Progress) and event.done)
        return any(event.stage.rpartition(": ")[2] == "training" for event in steps)

    def _run(self, base: Base) -> None:
        end: State = "failed"
        try:
            self._slices.enter()
            end = self._train(base)
        except LoraDPOError as error:
            self.error = str(error)
        except Exception as error:  # the end of a thread: whatever it was must be told to whoever asks
            self.error = _sentence(error)
            logger.exception("The training %s failed.", self.name)
        finally:
            gc.collect()  # optimiser and activations hang in cycles: the answers need their memory
            self._slices.leave()
            self.ended = time.monotonic()
            self._end = end

    def _train(self, base: Base) -> State:
        # A tokenizer is not made for two threads at once, and the host's reads prompts meanwhile.
        view = replace(share_weights(base), tokenizer=copy.deepcopy(base.tokenizer))
        view.model.register_forward_pre_hook(lambda module, args: self._slices.yield_if_due())
        how: Any = {
            "name": self.name,
            "base": view,
            "resume": self._resumed,
            "on_event": self._hear,
            "stop": self._stop,
        }
        try:
            if self.minutes is None:
                train(self.recipe, look=self._look, **how)
            else:
                begun = begun_options(self.output) if self._resumed else {}
                self.found = tune(self.recipe, minutes=self.minutes, clock=self._slices.clock, **begun, **how)
        except Stopped:
            if self._discard:
                (discard_run if self.minutes is None else discard_search)(self.output)
            return "stopped"
        return "done"

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Saved):
            self.folder = event.folder
        if self._on_event:
            self._on_event(event)
        self._slices.yield_if_due()


class _Slice:
    """One slice, as work in the queue: the thread that computes waits here while the training thread does."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def run(self) -> None:
        self.begun.set()
        self.over.wait()


class _Slices:
    """The training thread's side of the queue."""

    def __init__(self, fair_queue: FairQueue) -> None:
        self.go = threading.Event()
        self.go.set()
        self._fair_queue = fair_queue
        self._slice: _Slice | None = None
        self._since = 0.0
        self._paused = 0.0
        self._paused_since: float | None = None

    @property
    def paused(self) -> float:
        """Seconds that were spent paused so far."""
        since = self._paused_since
        return self._paused + (time.monotonic() - since if since is not None else 0.0)

    def clock(self) -> float:
        """Seconds since some moment, without those spent paused."""
        return time.monotonic() - self.paused

    def enter(self) -> None:
        """Wait for a slice."""
        mine = _Slice()
        self._fair_queue.put(INTERNAL, mine)
        mine.begun.wait()
        self._slice, self._since = mine, time.monotonic()

    def leave(self) -> None:
        """End the slice, if there is one."""
        if self._slice is not None:
            self._slice.over.set()
            self._slice = None

    def yield_if_due(self) -> None:
        """Let others go first if some wait and the slice is over; wait here while paused."""
        others = time.monotonic() - self._since >= SLICE and self._fair_queue.waiting() > 0
        if others or not self.go.is_set():
            self.leave()
            if not self.go.is_set():
                self._paused_since = time.monotonic()
                self.go.wait()
                self._paused, self._paused_since = self.paused, None
            self.enter()


def _sentence(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"Training failed unexpectedly ({type(error).__name__}: {first}). The whole error is in the log."
