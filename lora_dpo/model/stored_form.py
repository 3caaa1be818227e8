"""How a checkpoint's weights are stored: as plain numbers, or quantised, and by what. Known from its config.json alone.

A quantised checkpoint's config has a `quantization_config`, as transformers writes it. Nothing here loads torch.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.config.recipe import Quantize
from lora_dpo.errors import ModelError
from lora_dpo.files import looks_local
from lora_dpo.text import plain

STORED = ", stored"
"""End of what a base is called whose quantised weights came with the checkpoint, such as `nf4, stored`."""

BITSANDBYTES = ("nf4", "fp4", "int8")
"""Forms of bitsandbytes: held as they are, or their values dequantised."""

DEQUANTISED = ("fp8", "mxfp4")
"""Forms whose values are always dequantised: the kernels that compute with them have no backward pass."""

_LIBRARIES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "gptq": (("gptqmodel", "gptqmodel"), ("optimum", "optimum")),
    "awq": (("gptqmodel", "gptqmodel"),),
    "hqq": (("hqq", "hqq"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "torchao": (("torchao", "torchao"),),
    "quanto": (("optimum.quanto", "optimum-quanto"),),
    "auto-round": (("auto_round", "auto-round"),),
    "aqlm": (("aqlm", "aqlm"),),
    "eetq": (("kernels", "kernels"),),
    "higgs": (("flute", "flute-kernel"),),
    "spqr": (("spqr_quant", "spqr_quant"),),
    "vptq": (("vptq", "vptq"),),
    "fbgemm_fp8": (("fbgemm_gpu", "fbgemm-gpu"),),
    "quark": (("quark", "amd-quark"),),
    "fp_quant": (("fp_quant", "fp_quant"),),
    "sinq": (("sinq", "sinq"),),
}
"""What a method's weights are loaded with: the module that is imported, and the package that has it."""


@dataclass(frozen=True)
class StoredForm:
    """A quantised checkpoint's form."""

    kind: str
    """`nf4`, `fp4` or `int8` of bitsandbytes, else the method's name, such as `gptq`, `fp8` or `mxfp4`."""
    bits: int | None
    """Of a quantised weight; None where the config does not say."""
    double: bool = False
    """Whether the scales of bitsandbytes' 4-bit weights are quantised as well."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The checkpoint's `quantization_config`."""

    @property
    def held(self) -> str:
        """What a passport calls weights that are held so, such as `nf4, stored`."""
        return f"{self.kind}{STORED}"

    @property
    def label(self) -> str:
        """What a person calls it."""
        doubly = " with double quantisation" if self.double else ""
        return f"{self.kind.upper()}{doubly}"


def stored_form(path: str, *, revision: str | None = None) -> StoredForm | None:
    """How a model's weights are stored quantised; None for plain ones.

    Args:
        path: as `resolve_model` returns it.

    Raises:
        ModelError: its config.json is no JSON object.
        OSError: a hub model whose config is neither here nor to be had.
    """
    return form_of(_config(path, revision), path)


def form_of(config: Mapping[str, Any], name: str) -> StoredForm | None:
    """The same of a config.json that was read. Raises `ModelError` for a `quantization_config` that is none."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = config.get("quantization_config") or nested or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise ModelError(f"The config.json of {name} has a quantization_config that is {plain(found)}, no settings.")
    method = str(found.get("quant_method") or _method(found)).lower()
    if method != "bitsandbytes":
        bits = found.get("bits", found.get("w_bit", {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}.get(method)))
        return StoredForm(method, bits if isinstance(bits, int) else None, settings=dict(found))
    if found.get("load_in_8bit") or found.get("_load_in_8bit"):
        return StoredForm("int8", 8, settings=dict(found))
    kind = str(found.get("bnb_4bit_quant_type", "fp4")).lower()  # bitsandbytes' own default
    return StoredForm(kind, 4, bool(found.get("bnb_4bit_use_double_quant")), dict(found))


def held_as(form: StoredForm | None, quantize: Quantize, name: str) -> str:
    """How a base is held: `nf4`, `none`, or for one that is stored quantised its own form, such as `fp4, stored`.

    Args:
        quantize: what was asked for; "auto" is what the checkpoint is, and NF4 of plain weights.

    Raises:
        ModelError: NF4 was asked for, and the weights are stored quantised in another form.
    """
    if form is None:
        return "nf4" if quantize == "auto" else quantize
    if quantize == "nf4" and form.kind != "nf4":
        raise ModelError(
            f"{name} is stored quantised ({form.label}), so quantize: nf4 cannot be made of it. Set model.quantize: "
            "auto (on a command line --quantize auto): its weights are then used as they are stored."
        )
    return form.held


def is_stored(held: str) -> bool:
    """Whether a base that is held so came quantised."""
    return held.endswith(STORED)


def can_pack(held: str) -> bool:
    """Whether weights that are held so are packed or dequantised as `model.packed` says."""
    return held.removesuffix(STORED) in BITSANDBYTES


def can_dequantise(form: StoredForm) -> bool:
    """Whether the values of weights of this form can be held in their place."""
    return form.kind in (*BITSANDBYTES, *DEQUANTISED)


def held_text(held: str, kept_share: float = 0.0) -> str:
    """How weights are held, for a person: such as `FP4 as stored; 89% of the layers' weights stay unquantised`.

    Args:
        kept_share: of the layers' weights, those that are not quantised; a hundredth and less is not told.
    """
    if held == "none":
        return "as stored"
    if is_stored(held):
        text = f"{plain(held.removesuffix(STORED)).upper()} as stored"
    else:  # a passport from elsewhere may say what it likes
        text = "NF4 with double quantisation" if held == "nf4" else plain(held)
    return f"{text}; {kept_share:.0%} of the layers' weights stay unquantised" if kept_share > 0.01 else text


def missing_libraries(form: StoredForm) -> list[str]:
    """Packages that weights of this form are loaded with and that are not installed."""
    return [package for module, package in _LIBRARIES.get(form.kind, ()) if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of, which others share
        return False


def check_library(form: StoredForm, name: str) -> None:
    """Raise `ModelError` if what loads weights of this form is not installed."""
    if missing := missing_libraries(form):
        raise ModelError(
            f"{name} is stored quantised by {form.kind}, which is loaded with {' and '.join(missing)}: not installed "
            f"here. Install it (pip install {' '.join(missing)}), or name the model's 16-bit original."
        )


def _method(settings: Mapping[str, Any]) -> str:
    """Of configs that are older than `quant_method`."""
    four_or_eight = any(settings.get(f"{mark}load_in_{bits}bit") for mark in ("", "_") for bits in (4, 8))
    return "bitsandbytes" if four_or_eight else "unknown"


def _config(path: str, revision: str | None) -> Mapping[str, Any]:
    if looks_local(path):
        file = Path(path) / "config.json"
    else:
        from transformers.utils import cached_file

        file = Path(cached_file(path, "config.json", revision=revision))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({plain(error)}). Download the model again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} cannot be read (no JSON object). Download the model again.")
    return config
