"""The adapter folder, which training hands to everything after it, and what is checked before it goes onto a base.

adapter_config.json, adapter_model.safetensors   standard PEFT, loadable by plain `peft`
passport.json    base, fingerprint, quantisation, hashes, data, recipe, reference, metrics, versions
verify.json      a few held-out pairs with their scores, to check that the adapter still works
recipe.yaml      every setting of the run, resolved
metrics.jsonl    one row per logged step and evaluation
pair-margins.json   of DPO: each training pair's margin before it was learnt from, and at last
curves.png       loss, margin, accuracy, log-ratios
README.md        the model card

`check_adapter` is all that is checked. `attach_adapter` does both; `put_adapter` and `put_beside` expect it done.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dpo.adapters.adapter import check_fit, open_adapter
from lora_dpo.adapters.lora_config import WEIGHTS, read_config
from lora_dpo.adapters.passport import Passport, is_public_name
from lora_dpo.adapters.peft_config import live_config
from lora_dpo.adapters.peft_files import check_finite, weights
from lora_dpo.errors import AdapterError, BaseDiffers
from lora_dpo.model.base import Base, resolve_model
from lora_dpo.model.device import out_of_memory
from lora_dpo.model.identity import weight_fingerprint
from lora_dpo.model.lora import POLICY
from lora_dpo.model.origin import CARRIED, from_text, is_another_form, origin_sample
from lora_dpo.model.packaged import CONFIG as CONFIG_OF_MODEL
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import plain

if TYPE_CHECKING:
    from peft import PeftModel


def attach_adapter(base: Base, folder: str | Path, *, trainable: bool = False, name: str = POLICY) -> PeftModel:
    """Put a saved adapter on a loaded base, after its passport, names, shapes and values were checked.

    Args:
        name: the adapter's name on the model; training and chat know it as `default`.

    Raises:
        AdapterError: the folder is no adapter, or the adapter was made for another base.

    Warns:
        BaseDiffers: another revision, quantisation, tokenizer or chat template than the passport's, or no passport.
    """
    folder = Path(folder)
    warn_of(check_adapter(base, folder))
    return put_adapter(base, folder, trainable=trainable, name=name)


def put_adapter(base: Base, folder: Path, *, trainable: bool = False, name: str = POLICY) -> PeftModel:
    """The second half of `attach_adapter`, for a folder that `check_adapter` has passed. Raises `AdapterError`."""
    with quiet_libraries():  # peft brings bitsandbytes in, which has advice to give
        from peft import PeftModel, set_peft_model_state_dict
        from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        with peft_errors(folder, base.name):
            config = live_config(read_config(folder), base.model)
            config.inference_mode = not trainable
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
            model = kind(base.model, config, adapter_name=name)
            # What `PeftModel.from_pretrained` does, but for its reading: that maps the file (`tensor_file`).
            set_peft_model_state_dict(model, dict(weights(folder)), adapter_name=name)
        _check_names(model, folder, name, base.name)
    model.eval()
    return model


def put_beside(model: PeftModel, folder: Path, *, name: str, base: str) -> None:
    """Put one more adapter on a model that has one, switched off, for a folder that `check_adapter` has passed.

    Raises:
        AdapterError: its config does not fit the base called `base`.
    """
    from peft import set_peft_model_state_dict

    with peft_errors(folder, base):
        config = live_config(read_config(folder), model)
        config.inference_mode = True
        model.add_adapter(name, config)
        set_peft_model_state_dict(model, dict(weights(folder)), adapter_name=name)
    model.eval()
    _check_names(model, folder, name, base)


def _check_names(model: PeftModel, folder: Path, name: str, base: str) -> None:
    from peft import get_peft_model_state_dict

    live = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    stored = set(read_adapter_names(folder))
    if odd := sorted(live ^ stored):
        where = "is in the file and not on the model" if odd[0] in stored else "is missing in the file"
        raise AdapterError(
            f"The adapter {folder} does not fit {base}: {plain(odd[0])} {where}. Take it from its source again."
        )


@contextmanager
def peft_errors(folder: Path, base: str) -> Iterator[None]:
    """Turn what peft says of an adapter that it does not take into one `AdapterError`."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        if out_of_memory(error):
            raise
        # target modules that are not there, a config that peft refuses
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise AdapterError(f"The adapter {folder} does not fit {base}: {plain(reason, 300)}") from error


def check_adapter(base: Base, folder: Path) -> list[str]:
    """All that is checked before an adapter goes onto a base in memory.

    Returns:
        What is not quite as the passport has it, each a sentence for `warn_of`: another revision, quantisation,
        tokenizer or chat template, or no passport at all.

    Raises:
        AdapterError: the folder is no adapter, or the adapter was made for another base.
    """
    adapter = open_adapter(folder)
    differs = check_base(adapter.passport, base, folder) if adapter.passport is not None else []
    check_fit(adapter, base.model, base.name)
    check_finite(folder)
    return differs if adapter.passport is not None else [unverified(folder, base.name, quantize=base.quantize)]


def read_adapter_names(folder: Path) -> list[str]:
    """Names of the tensors in the folder's weights, without copies of the base's own embeddings."""
    from lora_dpo.adapters.peft_files import read_header

    return [name for name in read_header(folder / WEIGHTS) if ".base_layer." not in name or ".lora_" in name]


def restore_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Put a checkpoint's adapter weights into the policy that is on the model."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, dict(weights(checkpoint)), adapter_name=POLICY)


def check_base(passport: Passport, base: Base, folder: Path) -> list[str]:
    """Hold the base in memory against the passport; returns what differs as `check_adapter` does.

    Raises:
        AdapterError: it has other weights.
    """
    differs = check_weights_of_base(
        passport, folder, name=base.name, revision=base.revision, fingerprint=base.fingerprint
    )
    return differs + check_holding(
        passport,
        folder,
        name=base.name,
        quantize=base.quantize,
        tokenizer=base.tokenizer_sha256,
        template=base.chat_template_sha256,
    )


def check_holding(
    passport: Passport, folder: Path, *, name: str, quantize: str, tokenizer: str, template: str
) -> list[str]:
    """The part of `check_base` that is about how the base is held and asked: `tokenizer`, `template` are SHA-256."""
    found = []
    if passport.quantize != quantize:
        found.append(f"it was trained on weights quantised as {passport.quantize}, here they are {quantize}")
    if passport.tokenizer_sha256 != tokenizer:
        found.append("the tokenizer has another vocabulary")
    if passport.chat_template_sha256 != template:
        found.append("the chat template is another one")
    return [_not_quite(folder, name, found)] if found else []


def check_weights_of_base(
    passport: Passport, folder: Path, *, name: str, revision: str | None, fingerprint: str | None
) -> list[str]:
    """The part of `check_base` that needs no model in memory."""
    if not (passport.base_fingerprint and fingerprint):
        said = "its weights cannot be compared, since they are not in safetensors files"
        return [_not_quite(folder, name, [said])]
    if passport.base_fingerprint != fingerprint:
        moved = passport.base == name and is_public_name(name) and not (revision and revision == passport.base_revision)
        if not moved and _is_another_form(passport, name, revision):
            return [_not_quite(folder, name, [f"its weights are those of {passport.base} in another form"])]
        if not moved:
            raise AdapterError(
                f"The adapter {folder} was made for {passport.base} (fingerprint {passport.base_fingerprint}), but the "
                f"loaded base is {name} (fingerprint {fingerprint}). Load it on its own base."
            )
        was, now = passport.base_revision or "unknown", revision or "unknown"
        return [_not_quite(folder, name, [f"its weights are another revision's (trained on {was}, here {now})"])]
    return []


def _is_another_form(passport: Passport, name: str, revision: str | None) -> bool:
    """Whether a base is the passport's, quantised or not quantised: by the passport's sample of it, or by its files.

    Passports of earlier versions have no sample, so the base that they name must be here.
    """
    from safetensors import SafetensorError

    sample = from_text(passport.base_sample)
    if not sample and os.path.isfile(Path(os.path.expanduser(passport.base)) / CONFIG_OF_MODEL):
        with suppress(OSError, ValueError, SafetensorError):  # half a model: it tells nothing
            if weight_fingerprint(resolve_model(passport.base)) == passport.base_fingerprint:
                sample = origin_sample(resolve_model(passport.base), most=CARRIED)
    return is_another_form(resolve_model(name), sample, revision=revision)


def unverified(folder: Path, name: str, *, quantize: str) -> str:
    """What is said of an adapter without passport whose names and shapes fit."""
    text = f"The adapter {folder} has no passport, so it is unverified: its names and shapes fit {name}, but nothing "
    text += "says that it was made for it"
    return text + ("." if quantize == "none" else f", nor for weights quantised as {quantize}, as they are held here.")


def warn_of(differences: Sequence[str]) -> None:
    """Issue what `check_adapter` returned as `BaseDiffers` warnings; for whoever has a user before them."""
    for text in differences:
        warnings.warn(BaseDiffers(text), stacklevel=3)


def is_strict() -> bool:
    """Whether `BaseDiffers` is an error now: by `strictness`, or by a filter of the caller's own."""
    for action, message, category, module, _ in warnings.filters:
        if message is None and module is None and issubclass(BaseDiffers, category):
            return action == "error"
    return False


def _not_quite(folder: Path, name: str, found: list[str]) -> str:
    return f"The base {name} is not quite the one of the adapter {folder}: {'; '.join(found)}. It may answer otherwise."


@contextmanager
def strictness(strict: bool) -> Iterator[None]:
    """With `strict`, what would be a `BaseDiffers` warning is an error inside the block. For the main thread alone."""
    with warnings.catch_warnings():
        if strict:
            warnings.simplefilter("error", BaseDiffers)
        yield
