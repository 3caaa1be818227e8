"""The base model, loaded once: as NF4, as stored, or as its checkpoint is quantised; with its tokenizer."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lora_dpo import places
from lora_dpo.config.recipe import Dtype, ModelSection, Quantize, Stream
from lora_dpo.data.chat_template import check_default
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.files import looks_local
from lora_dpo.model.device import out_of_memory, pick_device, pick_dtype
from lora_dpo.model.experts import expert_weights
from lora_dpo.model.held_size import Streamed, streamed_for
from lora_dpo.model.identity import chat_template_sha256, commit_of, tokenizer_sha256, weight_fingerprint
from lora_dpo.model.origin import CARRIED, Window, origin_sample
from lora_dpo.model.packaged import PACKAGED_MODELS
from lora_dpo.model.quantised import hold_dequantized, hold_stored_values, kept_share, nf4_config
from lora_dpo.model.stored_form import BITSANDBYTES, DEQUANTISED, StoredForm, check_library, held_as, stored_form
from lora_dpo.quiet import quiet_libraries
from lora_dpo.text import SHOWN, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

load_lock = threading.Lock()
"""Held while weights are loaded: transformers changes torch's default dtype meanwhile, for the whole process, and the
last of two loads to end would leave the other's behind."""


@dataclass
class Base:
    """A base model in memory, with what identifies it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    quantize: str
    """How its weights are held: `nf4`, `none`, or the form that they are stored in, such as `nf4, stored`."""
    packed: bool
    dtype: str
    """Compute dtype, such as `float32`."""
    fingerprint: str | None
    """Hash over a sample of the stored weights; None if they are not in safetensors files."""
    asked: Quantize = "auto"
    """What `load_base` was asked for: the way to load the same once more."""
    kept_share: float = 0.0
    """Of a quantised base: the share of its layers' weights that are in 16 bits or more all the same."""
    streamed: Streamed = "off"
    """Which of its weights live in main memory and visit the device (`model.visiting`)."""
    sample: Mapping[str, Window] = field(default_factory=dict, repr=False)
    """Some numbers of the stored weights (`model.origin`), read when these were."""

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @cached_property
    def tokenizer_sha256(self) -> str:
        """See `tokenizer_sha256`."""
        return tokenizer_sha256(self.tokenizer)

    @property
    def chat_template_sha256(self) -> str:
        """See `chat_template_sha256`."""
        return chat_template_sha256(self.tokenizer)


def load_base(
    name: str,
    *,
    revision: str | None = None,
    quantize: Quantize = "auto",
    packed: bool | Literal["auto"] = "auto",
    dtype: Dtype = "auto",
    device: str = "auto",
    stream: Stream = "off",
    trust_remote_code: bool = False,
) -> Base:
    """Load a base model once.

    Args:
        name: a packaged model (`smollm2-135m`), a model folder, or a hub id.
        quantize: "nf4" (4-bit NormalFloat, double quantisation; Dettmers et al. 2023, section 3), "none" (as stored),
            or "auto": as the checkpoint is quantised, and NF4 of plain weights.
        packed: keep quantised weights packed, or dequantised once at load: the same function.
        dtype: compute dtype; "auto" is what the hardware does fast.
        device: "auto" is what `pick_device` says; else "cpu", "cuda" or "mps".
        stream: which weights live in main memory and visit the device, for DPO training (`ModelSection.stream`).

    Raises:
        ModelError: the model is not there, cannot be loaded, has no chat template, or is stored quantised in a form
            that is not what was asked for, or whose library is not installed.
        ConfigError: packed weights on an Apple GPU, of a form that is always dequantised, or a GPU where there is none;
            weights that should visit an Apple GPU.
    """
    path = resolve_model(name)  # before torch is loaded to say that it is not there
    form = form_to_load(name, revision=revision)
    held = held_as(form, quantize, name)
    import torch

    place = pick_device() if device == "auto" else torch.device(device)
    compute = getattr(torch, pick_dtype(dtype, place))
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(name, **common)
    if packed == "auto":
        packed = held != "none" and decide_packed(load_skeleton(name, **common), place, compute, form)
    check_packed(form, packed, place.type)
    streamed = streamed_for(stream, place, lambda: load_skeleton(name, **common), compute, form, packed=bool(packed))
    elsewhere = streamed != "off" or (held != "none" and place.type == "mps")  # no 4-bit kernels there
    here = torch.device("cpu") if elsewhere else place
    local = looks_local(path)  # a folder that vanishes now is not asked of the hub either
    arguments: dict[str, Any] = {"dtype": compute, "device_map": {"": here}, "local_files_only": local, **common}
    if form is not None:
        arguments["config"] = _config_to_load(name, form, compute, **common)
    elif held == "nf4" and packed:
        arguments["quantization_config"] = nf4_config(compute)
    model = _load_weights(name, form, arguments)
    if held != "none":
        with quiet_libraries():
            if form is not None:
                hold_stored_values(model, form, compute, packed=packed)
            elif not packed:
                hold_dequantized(model)
            if streamed == "off":
                model.to(place)
    keep_packed_weights_differentiable(model)
    model.requires_grad_(False)
    model.eval()
    share = 0.0 if held == "none" else kept_share(model, form)
    if streamed != "off":
        from lora_dpo.model.visiting import let_visit

        let_visit(model, place, layers=streamed == "on")
    return Base(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=commit_of(path, revision),
        quantize=held,
        packed=packed and held != "none",
        dtype=str(compute).removeprefix("torch."),
        fingerprint=weight_fingerprint(path, revision=revision),
        asked=quantize,
        kept_share=share,
        streamed=streamed,
        sample=origin_sample(path, revision=revision, most=CARRIED),
    )


def _load_weights(name: str, form: StoredForm | None, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """The model as transformers loads it. Raises `ModelError` for experts that it cannot read."""
    from transformers import AutoModelForCausalLM

    path = resolve_model(name)
    packed = form is not None and form.kind in BITSANDBYTES
    with quiet_libraries(), model_errors(name), load_lock:
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **arguments)
        except RuntimeError as error:
            if not packed or "ignore_mismatched_sizes" not in str(error):
                raise
            model = None
    if model is None or (packed and not all(one.is_floating_point() for one in expert_weights(model).values())):
        raise ModelError(  # transformers stacks their packed numbers as if they were values
            f"The model {name} could not be loaded: its experts are stored quantised one by one, which transformers "
            "does not read any more. Name its 16-bit original instead."
        )
    return model


def load_recipe_base(section: ModelSection, *, method: str = "dpo") -> Base:
    """The base of a recipe, as `load_base` loads it; its template settings are the tokenizer's matter.

    Args:
        method: of the recipe: weights visit the device with DPO alone.
    """
    settings = section.model_dump(exclude={"template"})
    return load_base(**settings if method == "dpo" else {**settings, "stream": "off"})


def form_to_load(name: str, *, revision: str | None = None) -> StoredForm | None:
    """How a base's weights are stored quantised, and that what loads them is installed; None for plain weights.

    Raises:
        ModelError: the model is not there, or a library is missing.
    """
    with model_errors(name):
        form = stored_form(resolve_model(name), revision=revision)
    if form is not None:
        check_library(form, name)
    return form


def held_by(recipe: ModelSection) -> tuple[str, StoredForm | None]:
    """How the base of a recipe will be held (`stored_form.held_as`), and how it is stored quantised; no weight is read.

    Raises:
        ModelError: as `load_base` would, for what its config.json says.
    """
    form = form_to_load(recipe.name, revision=recipe.revision)
    return held_as(form, recipe.quantize, recipe.name), form


def check_packed(form: StoredForm | None, packed: bool, device: str) -> None:
    """Raise `ConfigError` where weights can only be held the other way.

    Args:
        form: how they are stored quantised; None where they are made NF4 here.
        device: what computes: "cpu", "cuda" or "mps".
    """
    if packed and device == "mps":
        raise ConfigError("model.packed is true, but no 4-bit kernels are known for Apple GPUs: set it to false.")
    if packed and form is not None and form.kind in DEQUANTISED:
        raise ConfigError(
            f"model.packed is true, but weights stored as {form.label} are always dequantised: their kernels have no "
            "backward pass. Remove it."
        )
    if not packed and form is not None and form.kind not in (*BITSANDBYTES, *DEQUANTISED):
        raise ConfigError(f"model.packed is false, but {form.label} weights are held as they are stored. Remove it.")


def _config_to_load(name: str, form: StoredForm, compute: torch.dtype, **common: Any) -> Any:
    """A quantised checkpoint's config, told what is computed in, and to dequantise what cannot be trained on."""
    from transformers import AutoConfig

    path = resolve_model(name)
    with quiet_libraries(), model_errors(name):
        config = AutoConfig.from_pretrained(path, local_files_only=looks_local(path), **common)
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict):
        if form.kind in BITSANDBYTES:
            settings["bnb_4bit_compute_dtype"] = str(compute).removeprefix("torch.")
        elif form.kind in DEQUANTISED:
            settings["dequantize"] = True
    return config


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model. Raises `ModelError` if there is none or no (default) chat template."""
    path = resolve_model(name)
    from transformers import AutoTokenizer

    with quiet_libraries(), model_errors(name):
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=looks_local(path), **common)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name} has no chat template, so chat messages cannot be written for it. "
            "Use an instruction-tuned (chat) version of the model."
        )
    check_default(tokenizer.chat_template, name)
    return tokenizer


def load_skeleton(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's structure without its weights (meta tensors): to count and plan with."""
    path = resolve_model(name)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_libraries(), model_errors(name), torch.device("meta"):
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(path, local_files_only=looks_local(path), **common)
        stored = config.dtype
        # Under torch's own dtype: transformers builds under the config's by changing the process's default, so that a
        # tensor made by another thread meanwhile has the wrong type, and of two builders the last leaves it changed.
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.get_default_dtype(), trust_remote_code=trust_remote_code
        )
        if stored is not None:
            config.dtype = stored
            for parameter in model.parameters():
                parameter.data = parameter.data.to(stored)
        return model


def resolve_model(name: str) -> str:
    """A packaged model's folder, else the name itself. Raises `ModelError` with the next step."""
    name = os.path.expanduser(name)
    if name in PACKAGED_MODELS:
        folder = places.model_folder(name)
        if not (folder / "config.json").is_file():
            raise ModelError(f"The model {name} is not here yet. Get it once with: lora-dpo models fetch {name}")
        return str(folder)
    if looks_local(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ModelError(f"{name} is no model folder: there is no config.json in it{_why_not_the_hub(name)}.")
    return name


def _why_not_the_hub(name: str) -> str:
    owner, slash, _ = name.partition("/")
    if not slash:
        return "; a model of the hub is written owner/name"
    here = owner.strip(".~") and os.path.isdir(owner)
    return f"; the hub is not asked, since there is a folder {owner} here" if here else ""


def keep_packed_weights_differentiable(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    In eval mode it repacks them there for a kernel without a backward pass, and never back: LoRA
    gradients would be cut, without an error, after the first evaluation.

    Raises:
        ModelError: they are repacked already. The way back is lossy (bf16 scales).
    """
    for name, part in model.named_modules():
        if not hasattr(part, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(part.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"The 4-bit weights of {name} were repacked for inference, because the model ran in eval mode on this "
                "CPU, and bitsandbytes has no gradient for that form. Load the model again, and call "
                "lora_dpo.model.base.keep_packed_weights_differentiable(model) before its first pass."
            )
        part.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def steady(model: torch.nn.Module) -> Iterator[None]:
    """Training mode without dropout for the length of the block: what training computes, the same at every pass.

    Eval mode would not do: bitsandbytes has other kernels there. Activation checkpointing is off too; every
    module's mode is set back.
    """
    from torch.nn.modules.dropout import _DropoutNd
    from transformers.modeling_layers import GradientCheckpointingLayer

    before = [(part, part.training) for part in model.modules()]
    model.train()
    for part, _ in before:
        if isinstance(part, _DropoutNd | GradientCheckpointingLayer):
            part.training = False
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def decide_packed(
    skeleton: PreTrainedModel, device: torch.device, compute: torch.dtype, form: StoredForm | None = None
) -> bool:
    """For `packed: auto`: on a CPU hold the weights dequantised if they take at most half of the free memory.

    On a GPU they are packed; on Apple's never, since there are no kernels for it.

    Args:
        form: how the weights are stored quantised; some forms are always packed, some never.
    """
    import psutil

    if form is not None and form.kind not in BITSANDBYTES:
        return form.kind not in DEQUANTISED
    if device.type != "cpu":
        return device.type == "cuda"
    weights = sum(parameter.numel() for parameter in skeleton.parameters()) * compute.itemsize
    return bool(weights > psutil.virtual_memory().available / 2)


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[None]:
    """What libraries raise of a model's files, of whatever shape they are, as a `ModelError` with the next step."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    expected = (OSError, ValueError, ImportError)
    # JSON of another shape than transformers expects: it looks at nothing before it uses it
    misshapen = (StrictDataclassError, TypeError, KeyError, IndexError, AttributeError)
    # weights that are cut off, no weights at all, or a pickle that wants to run something: torch runs none of it
    unreadable = (pickle.UnpicklingError, EOFError, SafetensorError)
    try:
        yield
    except (*expected, *misshapen, *unreadable, RuntimeError) as error:
        if isinstance(error, RuntimeError) and (type(error) is not RuntimeError or out_of_memory(error)):
            raise
        reason = re.split(r"\n(?! )|(?<=\.) ", str(error).strip())[0]
        if isinstance(error, (*misshapen, RuntimeError)):  # torch's own of a zip that holds something else
            reason = f"transformers cannot read its files ({type(error).__name__}: {one_line(reason, SHOWN)})."
        elif isinstance(error, unreadable):
            reason = "its weights are damaged, or a pickle that holds more than tensors, which is never loaded."
        raise ModelError(
            f"The model {name} could not be loaded: {reason} "
            "Give a model folder, a hub id (with network), or a name of: lora-dpo models list"
        ) from error
