"""Another base in place of the one in memory: which there are here, and which fit. Never two at once."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_dpo import places
from lora_dpo.errors import Busy, ModelError
from lora_dpo.model.base import Base, decide_packed, form_to_load, load_skeleton, load_tokenizer, resolve_model
from lora_dpo.model.device import free_bytes, give_back_memory, pick_device, pick_dtype
from lora_dpo.model.held_size import weight_bytes
from lora_dpo.model.packaged import PACKAGED_MODELS, to_fetch
from lora_dpo.model.stored_form import held_as as held_in
from lora_dpo.serving.host import Host
from lora_dpo.training.planning.lines import size

TIGHT = 0.85
"""Share of the free memory above which a base fits, but leaves little for a training."""
PATIENCE = 20.0
"""Seconds that a base which nobody uses any more may take to leave memory."""


@dataclass(frozen=True)
class Fit:
    """Whether a base fits in place of another one."""

    needed: int
    """Bytes of its weights, as they would be held."""
    free: int
    """Bytes that are free without the present base."""

    @property
    def fits(self) -> bool:
        """False if it would not go into memory."""
        return self.needed <= self.free

    @property
    def text(self) -> str:
        """One sentence."""
        kind = "It fits" if self.needed <= TIGHT * self.free else "Tight" if self.fits else "It does not fit"
        return f"{kind}: {size(self.needed)} of weights, {size(self.free)} free without the present base."


def bases(loaded: str) -> list[str]:
    """The bases that can be had without a network or a path: the present one, packaged ones, and folders of models."""
    folders = (str(path.parent) for models in places.models() for path in sorted(models.glob("[!.]*/config.json")))
    known = {loaded, *PACKAGED_MODELS}
    known_places = {_place(name) for name in known}
    others = [path for path in folders if _place(path) not in known_places]
    return [*sorted(known, key=lambda name: name != loaded), *others]


def fit(name: str, present: Base) -> Fit | None:
    """Whether a base fits in place of `present`; None for a packaged one that has to be fetched first.

    Raises:
        ModelError: it cannot be read.
    """
    import torch

    if name in PACKAGED_MODELS and to_fetch(name):
        return None
    device = pick_device()
    compute = getattr(torch, pick_dtype("auto", device))
    skeleton = load_skeleton(name).requires_grad_(False)
    form = form_to_load(name)
    quantised = held_in(form, present.asked, name) != "none"
    packed = quantised and decide_packed(skeleton, device, compute, form)
    held = sum(weight.numel() * weight.element_size() for weight in present.model.parameters())
    needed = weight_bytes(skeleton, itemsize=compute.itemsize, packed=packed, form=form)
    return Fit(needed, free_bytes(device) + held)


def check_base(name: str, present: Base) -> None:
    """Raise `ModelError` unless a base of `bases` can take the place of the present one, as far as that is known."""
    if name not in bases(present.name):
        raise ModelError(f"There is no base {name} to choose here. Start the demo anew with --model for another one.")
    found = fit(name, present)
    if found is not None:
        load_tokenizer(name)  # and that it has a chat template
        if not found.fits:
            raise ModelError(f"{name} is not loaded. {found.text}")


def close_and_forget(take_host: Callable[[], Host]) -> Base | None:
    """Close a host whose last owner gives it away; returns None when its base has left memory.

    Args:
        take_host: returns the host, and keeps no reference to it.

    Returns:
        The base, if something still holds it after `PATIENCE`.
    """
    host = take_host()
    host.close()
    weights: weakref.ref[Any] = weakref.ref(host.base.model)
    shell = replace(host.base, model=None)
    del host
    until = time.monotonic() + PATIENCE
    while weights() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    give_back_memory()
    model = weights()
    return None if model is None else replace(shell, model=model)


def held_as(base: Base) -> dict[str, Any]:
    """How a base is held, as `open_host` is told it, to load the same once more."""
    return {"model": base.name, "revision": base.revision, "quantize": base.asked}


def still_used() -> Busy:
    """The error of a base that does not leave memory."""
    return Busy("The present base is still in use, so no other one was loaded beside it. Try again in a moment.")


def _place(name: str) -> Path:
    """Where a base's files are, so that two names of one base are seen."""
    try:
        return Path(resolve_model(name)).resolve()
    except ModelError:
        return Path(name)
