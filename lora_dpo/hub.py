"""Adapters on the Hugging Face hub: the known files of a folder go up, and nothing else comes down."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_dpo.errors import AdapterError
from lora_dpo.library import Installed, check_content, install
from lora_dpo.lora_files import plain
from lora_dpo.package import KNOWN
from lora_dpo.runs import ADAPTERS_DIR


def push(folder: Path, repo: str, *, private: bool = True, message: str | None = None) -> str:
    """Upload an adapter with its model card (`README.md`) to `owner/name`; returns the address of the commit.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN).

    Raises:
        AdapterError: the adapter is broken, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_content(folder)
    api = HfApi(library_name="lora-dpo")
    with _hub_errors(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[*KNOWN, "curves.png"],
            commit_message=message or f"Adapter {folder.name}",
        )
    return str(done.commit_url)


def pull(repo: str, *, name: str | None = None, revision: str | None = None, root: Path = ADAPTERS_DIR) -> Installed:
    """Download an adapter's known files from the hub and install it, with every check of `install`.

    Raises:
        AdapterError: the hub refuses or cannot be reached, or the adapter is refused.
        OutputError: the name is taken.
    """
    return install(repo, name=name, root=root, fetch=lambda repo, target: download(repo, target, revision=revision))


def download(repo: str, target: Path, *, revision: str | None = None) -> None:
    """Put a hub repository's known files into the empty folder `target`."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repo):
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=list(KNOWN), library_name="lora-dpo"))
    for file in KNOWN:
        if (found / file).is_file():
            shutil.copyfile(found / file, target / file)  # the cache holds links


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    named = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OfflineModeIsEnabled, OSError)
    refusals: tuple[type[Exception], ...] = named + _network_errors()
    try:
        yield
    except refusals as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        raise AdapterError(
            f"The hub did not serve {plain(repo)}: {plain(reason, 200)}. Check the id, the network and your token "
            "(hf auth login)."
        ) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library under huggingface_hub raises without a network; which one it is changes by version."""
    here = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
    return tuple(importlib.import_module(name).HTTPError for name in here)
