"""The adapter folder: what training hands to everything after it.

adapter_config.json, adapter_model.safetensors   standard PEFT, loadable by plain `peft`
passport.json    base, fingerprint, quantisation, hashes, data, reference, metrics, versions
recipe.yaml      every setting of the run, resolved
metrics.jsonl    one row per logged step and evaluation
curves.png       loss, margin, accuracy, log-ratios
README.md        the model card
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import AdapterError
from lora_dpo.model import POLICY, Base
from lora_dpo.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PASSPORT = "passport.json"
PACKAGES = ("lora-dpo", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Passport:
    """What an adapter was made from. Read back from `passport.json`."""

    base: str
    base_revision: str | None
    base_fingerprint: str | None
    quantize: str
    packed: bool
    dtype: str
    tokenizer_sha256: str
    chat_template_sha256: str
    reference: str
    data: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    format: int = 1


def make_passport(
    base: Base, *, reference: str, data: dict[str, Any], metrics: dict[str, Any], created: str
) -> Passport:
    """Describe an adapter that was trained on `base` as it is in memory."""
    return Passport(
        base=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        quantize=base.quantize,
        packed=base.packed,
        dtype=base.dtype,
        tokenizer_sha256=tokenizer_hash(base.tokenizer),
        chat_template_sha256=_sha256(str(base.tokenizer.chat_template)),
        reference=reference,
        data=data,
        metrics=metrics,
        versions={name: version(name) for name in PACKAGES},
        created=created,
    )


def write_passport(folder: Path, passport: Passport) -> None:
    """Write `passport.json` into an adapter folder."""
    text = json.dumps(asdict(passport), indent=2, ensure_ascii=False)
    (folder / PASSPORT).write_text(text + "\n", encoding="utf-8")


def read_passport(folder: Path) -> Passport | None:
    """The passport of an adapter folder; None for an adapter made by another tool.

    Raises:
        AdapterError: no adapter there, or a passport that cannot be read.
    """
    check_folder(folder)
    path = folder / PASSPORT
    if not path.is_file():
        return None
    try:
        return Passport(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read ({error}). Take the adapter from its source again.") from error


def check_folder(folder: Path) -> None:
    """Raise `AdapterError` unless `folder` holds an adapter in safetensors."""
    if not folder.is_dir():
        raise AdapterError(f"There is no adapter folder at {folder}.{_known_adapters()}")
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} is no adapter: there is no adapter_config.json in it.")
    if not (folder / "adapter_model.safetensors").is_file():
        hint = " (only a pickle file, which is never loaded)" if (folder / "adapter_model.bin").exists() else ""
        raise AdapterError(f"{folder} has no adapter_model.safetensors{hint}. Take the adapter from its source again.")


def base_name(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the base that an adapter was made for, by its passport or PEFT config."""
    passport = read_passport(folder)
    if passport:
        return passport.base, passport.base_revision
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder} does not say what base it was made for. Name it with --model.")
    return str(name), config.get("revision")


def attach_adapter(base: Base, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a loaded base, under the name `default`.

    Raises:
        AdapterError: the folder is no adapter, or the adapter was made for another base.
    """
    import torch

    with quiet_libraries():  # peft brings bitsandbytes in, which has advice to give
        from peft import PeftModel

    folder = Path(folder)
    passport = read_passport(folder)
    if passport:
        check_base(passport, base, folder)
    try:
        with quiet_libraries():
            model = PeftModel.from_pretrained(base.model, str(folder), adapter_name=POLICY, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        # size mismatch, unknown target modules, broken safetensors or config
        reason = str(error).strip().splitlines()
        detail = next((line.strip() for line in reason if "size mismatch" in line), reason[0] if reason else "")
        raise AdapterError(f"The adapter {folder} does not fit {base.name}: {detail}") from error
    if any(not torch.isfinite(value).all() for name, value in model.named_parameters() if "lora_" in name):
        raise AdapterError(f"The adapter {folder} holds NaN or infinite weights. Take an earlier checkpoint.")
    model.eval()
    return model


def restore_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Put a checkpoint's adapter weights into the policy that is on the model."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"), adapter_name=POLICY)


def check_base(passport: Passport, base: Base, folder: Path) -> None:
    """Raise `AdapterError` if the adapter's base has other weights than the one in memory."""
    known = passport.base_fingerprint and base.fingerprint
    if known and passport.base_fingerprint != base.fingerprint:
        raise AdapterError(
            f"The adapter {folder} was made for {passport.base} (fingerprint {passport.base_fingerprint}), but the "
            f"loaded base is {base.name} (fingerprint {base.fingerprint}). Load it on its own base."
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary with its ids: equal tokenizers read text alike."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _sha256(json.dumps(vocabulary))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _known_adapters() -> str:
    folder = Path("adapters")
    names = sorted(str(found.parent) for found in folder.glob("*/adapter_config.json")) if folder.is_dir() else []
    return f" There is {', '.join(names)}." if names else " Train one with: lora-dpo train configs/quickstart.yaml"
