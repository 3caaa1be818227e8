"""Modules that are trained whole beside the adapter (peft's `modules_to_save`), such as a head: `lora.modules_to_save`.

peft keeps a copy of each beside the base's own, which is the reference with the adapter off. Copies are trained in
float32, and compute as the base does: what they are given and what they return is cast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def whole_modules(model: PreTrainedModel, wanted: list[str]) -> list[str]:
    """The full names of modules by the ends of their names; of tied embeddings and head, the embeddings.

    Raises:
        ConfigError: no module has that name, or one cannot be trained whole.
    """
    there = {name: part for name, part in model.named_modules() if name and any(True for _ in part.parameters())}
    tied = _tied(model)
    found: list[str] = []
    for one in wanted:
        names = [name for name in there if f".{name}".endswith(f".{one}")]
        if not names:
            leaves = {name.rpartition(".")[2] for name, part in there.items() if not any(part.children())}
            raise ConfigError(
                f"lora.modules_to_save names {shown(one)}, which no module with weights is called. There is "
                f"{', '.join(sorted(leaves))}."
            )
        for name in names:
            if any(any(True for _ in child.parameters()) for child in there[name].children()):
                raise ConfigError(
                    f"lora.modules_to_save names {shown(one)}, which is made of others. Name those that hold weights, "
                    "such as lm_head, embed_tokens, or model.norm."
                )
            if any(not p.is_floating_point() or p.element_size() < 2 for p in there[name].parameters()):
                raise ConfigError(
                    f"lora.modules_to_save names {shown(one)}, whose weights are held quantised: they cannot be "
                    "trained. Leave it out, or set model.quantize: none."
                )
            found.append(tied.get(name, name))
    return list(dict.fromkeys(found))


def is_tied(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether one of these modules shares its weight with the head."""
    return bool(set(_tied(model).values()) & set(names))


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """The head's name, and the embeddings', each with the embeddings' name, where both are one matrix."""
    head, into = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return {}
    names = {part: name for name, part in model.named_modules()}
    return {names[head]: names[into], names[into]: names[into]}


def finish_copies(model: PeftModel, names: list[str]) -> None:
    """Check what peft made copies of, and let them compute as the base does.

    Raises:
        ConfigError: peft took another module, too.
    """
    copies = copies_of(model)
    for part in copies.values():
        dtype = next(part.original_module.parameters()).dtype
        if dtype.itemsize < 4:  # on the wrapper: TRL puts a copy "ref" into it, too
            part.register_forward_pre_hook(_as_weights)
            part.register_forward_hook(_Cast(dtype))
    head = {name for name in copies if model.get_base_model().get_submodule(name) is _head(model)}
    if odd := set(copies) - set(names) - (head if is_tied(model.get_base_model(), names) else set()):
        raise ConfigError(
            f"lora.modules_to_save: peft takes {shown(min(odd))} by its name, too. Name that one as well, or neither."
        )


def copies_of(model: PeftModel) -> dict[str, Any]:
    """peft's wrappers of modules that an adapter has whole, by the modules' names in the base."""
    from peft.utils.other import ModulesToSaveWrapper

    parts = model.get_base_model().named_modules()
    return {name: part for name, part in parts if isinstance(part, ModulesToSaveWrapper)}


def _head(model: PeftModel) -> Any:
    return model.get_base_model().get_output_embeddings()


def _as_weights(part: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give the module that runs now what its weights compute with; ids stay ids."""
    import torch

    on = [name for name in part.active_adapters if name in part.modules_to_save]
    runs = part.original_module if part.disable_adapters or not on else part.modules_to_save[on[0]]
    dtype = next(runs.parameters()).dtype
    return tuple(one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in given)


class _Cast:
    """A forward hook that returns what a module computed in the base's dtype, be it several tensors, as of a router."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, part: torch.nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        """Cast the output."""
        import torch

        if isinstance(output, tuple):
            return tuple(self(part, given, one) for one in output)
        is_wide = isinstance(output, torch.Tensor) and output.is_floating_point()
        return output.to(self.dtype) if is_wide else output
