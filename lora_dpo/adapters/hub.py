"""Adapters on the Hugging Face hub: the known files of a folder go up, and nothing else comes down."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.exchange import Installed, check_content, install
from lora_dpo.adapters.lora_config import WEIGHTS
from lora_dpo.adapters.package import KNOWN, check_size, refuse_pickle, require
from lora_dpo.adapters.passport import is_public_name
from lora_dpo.errors import AdapterError, LoraDPOError
from lora_dpo.files import disk_errors
from lora_dpo.text import plain


def push(folder: Path, repo: str, *, private: bool = True, message: str | None = None) -> str:
    """Upload an adapter with its model card (`README.md`) to `owner/name`; returns the address of the commit.

    The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN).

    Raises:
        AdapterError: the adapter is broken, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_content(folder)
    api = HfApi(library_name="lora-dpo")
    with hub_errors(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[*KNOWN, "curves.png"],
            commit_message=message or f"Adapter {folder.name}",
        )
    return str(done.commit_url)


def paths_told(folder: Path) -> list[str]:
    """The files of an adapter folder that name a place on this machine: its base's, or one of your home folder."""
    base, _ = open_adapter(folder).named_base
    home = os.path.expanduser("~")  # itself, for a user without a home folder
    places = [*([] if home == "~" else [home]), *([] if is_public_name(base) else [base])]
    places += [json.dumps(place)[1:-1] for place in places]  # in JSON Windows' backslashes are two
    texts = [name for name in KNOWN if name != WEIGHTS and (folder / name).is_file()]
    return [name for name in texts if any(place in (folder / name).read_text("utf-8", "replace") for place in places)]


def pull(repo: str, *, name: str | None = None, revision: str | None = None, root: Path | None = None) -> Installed:
    """Download an adapter's known files from the hub and install it, with every check of `install`.

    Raises:
        AdapterError: the hub refuses or cannot be reached, or the adapter is refused.
        OutputError: the name is taken.
    """
    return install(repo, name=name, root=root, fetch=lambda repo, target: download(repo, target, revision=revision))


def download(repo: str, target: Path, *, revision: str | None = None) -> None:
    """Put a hub repository's known files into the empty folder `target`, after their sizes were checked.

    Raises:
        PackageError: the repository holds no adapter, one as a pickle alone, or a file that is too large.
        AdapterError: the hub refuses or cannot be reached.
        OutputError: the disk is full.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    with hub_errors(repo), disk_errors(Path(constants.HF_HUB_CACHE)):
        info = HfApi(library_name="lora-dpo").model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        _check_files(repo, sizes)
        # the commit that was looked at: the branch may move in between
        found = Path(snapshot_download(repo, revision=info.sha, allow_patterns=list(KNOWN), library_name="lora-dpo"))
    for file in KNOWN:
        if (found / file).is_file():
            check_size(repo, file, (found / file).stat().st_size)
            shutil.copyfile(found / file, target / file)  # the cache holds links


def _check_files(repo: str, sizes: dict[str, int]) -> None:
    if WEIGHTS not in sizes:
        for name in sizes:
            refuse_pickle(repo, name)
    for name in KNOWN:
        check_size(repo, name, sizes.get(name, 0))
    require(repo, set(sizes))


@contextmanager
def hub_errors(repo: str, kind: type[LoraDPOError] = AdapterError) -> Iterator[None]:
    """What huggingface_hub raises inside the block, as one error of `kind` with the next step."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # ValueError: a card whose metadata the hub does not take
    named = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError)
    refusals: tuple[type[Exception], ...] = named + _network_errors()
    try:
        yield
    except refusals as error:
        reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
        raise kind(
            f"The hub did not serve {plain(repo)}: {plain(reason, 200)}. Check the id, the network and your token "
            "(hf auth login)."
        ) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library under huggingface_hub raises without a network; which one it is changes by version."""
    here = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
    return tuple(importlib.import_module(name).HTTPError for name in here)
