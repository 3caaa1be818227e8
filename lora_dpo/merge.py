"""An adapter and its base become one ordinary model folder.

Two bases can take the update W + (alpha / rank)·B·A (Hu et al. 2021, section 4.1), and the results
differ:

    base16        the weights as stored; better numbers, but not quite those that the adapter saw
    trained-base  the NF4 values that the adapter was trained on; the live adapter's own function
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lora_dpo.adapters import attach_adapter, base_name, read_passport
from lora_dpo.errors import AdapterError
from lora_dpo.files import atomic_folder, refuse_existing
from lora_dpo.model import load_base
from lora_dpo.quiet import quiet_libraries

Into = Literal["base16", "trained-base"]
StoredDtype = Literal["bfloat16", "float16", "float32"]


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    into: Into = "base16",
    dtype: StoredDtype = "bfloat16",
    model: str | None = None,
) -> Path:
    """Merge an adapter into its base and write a model folder that plain transformers loads.

    Sums are made in float32; `dtype` is what is stored.

    Args:
        into: "base16" or "trained-base", see above.
        model: another place of the same base; by default the one that the passport names.

    Raises:
        AdapterError: no adapter there, or made for another base.
        OutputError: `output` exists or cannot be written.
    """
    import torch

    adapter, output = Path(adapter), Path(output)
    refuse_existing(output)
    passport = read_passport(adapter)
    if into == "trained-base" and passport is not None and passport.quantize == "none":
        raise AdapterError(f"{adapter} was trained on unquantised weights: use --into base16, it is the same base.")
    name, revision = base_name(adapter)
    revision = None if model else revision  # another place has its own revisions
    base = load_base(
        model or name,
        revision=revision,
        quantize="nf4" if into == "trained-base" else "none",
        packed=False,
        # Training quantised the weights as they are in its compute dtype.
        dtype=passport.dtype if passport and into == "trained-base" else "float32",  # type: ignore[arg-type]
        device="cpu",  # float32 weights of a model that trains in 4 bits seldom fit the card
    )
    base.model.float()
    peft_model = attach_adapter(base, adapter)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"{adapter} cannot be merged: {error}") from error
    stored = merged.to(getattr(torch, dtype))
    stored.config.dtype = getattr(torch, dtype)
    with atomic_folder(output) as folder, quiet_libraries():
        stored.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return output
