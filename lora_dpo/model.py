"""The base model, loaded once, and the adapters on it. The only place that loads weights.

π_ref = reference(model): the adapters off, or the frozen copy named "ref"
π_θ   = the same model, the adapter named "default" on
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_dpo.config import Dtype, LoraSection, Quantize
from lora_dpo.data.template import check_default
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.fetch import MODELS_DIR, PACKAGED_MODELS, looks_local
from lora_dpo.quiet import quiet_libraries
from lora_dpo.tensor_file import open_tensors
from lora_dpo.wording import shown

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY, REFERENCE = "default", "ref"
"""Adapter names on the model; TRL and plain peft use the same two."""


@dataclass
class Base:
    """A base model in memory, with what identifies it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    quantize: Quantize
    packed: bool
    dtype: str
    """Compute dtype, such as `float32`."""
    fingerprint: str | None
    """Hash over a sample of the stored weights; None if they are not in safetensors files."""

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


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary with its ids: equal tokenizers read text alike."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _sha256(json.dumps(vocabulary))


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the chat template; of several, in the order of their names: that of files is anyhow."""
    template = tokenizer.chat_template
    return _sha256(json.dumps(template, sort_keys=True) if isinstance(template, dict) else str(template))


def load_base(
    name: str,
    *,
    revision: str | None = None,
    quantize: Quantize = "nf4",
    packed: bool | Literal["auto"] = "auto",
    dtype: Dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Base:
    """Load a base model once.

    Args:
        name: a packaged model (`smollm2-135m`), a model folder, or a hub id.
        quantize: "nf4" (4-bit NormalFloat, double quantisation; Dettmers et al. 2023, section 3) or "none".
        packed: keep 4-bit weights packed, or dequantised once at load: the same function.
        dtype: compute dtype; "auto" is what the hardware does fast.
        device: "auto" is the GPU if there is one; else "cpu" or "cuda".

    Raises:
        ModelError: the model is not there, cannot be loaded, or has no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = resolve_model(name)
    place = pick_device() if device == "auto" else torch.device(device)
    compute = getattr(torch, pick_dtype(dtype, place))
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(name, **common)
    here_alone = looks_local(path)  # a folder that vanishes now is not asked of the hub either
    with quiet_libraries(), _load_errors(name):
        if packed == "auto":
            packed = quantize == "nf4" and decide_packed(load_skeleton(name, **common), place, compute)
        if quantize == "nf4" and not packed:
            _refuse_quantised(name, path, **common)
        arguments: dict[str, Any] = {"dtype": compute, "device_map": {"": place}}
        if quantize == "nf4" and packed:
            arguments["quantization_config"] = _nf4_config(compute)
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=here_alone, **arguments, **common)
    if quantize == "nf4" and not packed:
        with quiet_libraries():
            hold_dequantized(model)
    keep_packed_weights_differentiable(model)  # also those that the model's files hold in 4 bits
    model.requires_grad_(False)
    model.eval()
    fingerprint = weight_fingerprint(path, revision=revision)
    revision = commit_of(path, revision)
    packed = packed and quantize == "nf4"
    return Base(model, tokenizer, name, revision, quantize, packed, str(compute).removeprefix("torch."), fingerprint)


def _refuse_quantised(name: str, path: str, **common: Any) -> None:
    """Raise `ModelError` for a base whose stored weights are quantised: they cannot be made NF4 once more."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=looks_local(path), **common)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{name} is stored quantised, so quantize: nf4 cannot be made of it. Set model.quantize: none (on a "
            "command line --quantize none): its weights are then used as they are stored."
        )


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's files on this disk are of: "main" moves, a commit does not.

    Args:
        path: as `resolve_model` returns it.
        revision: the branch, tag or commit that was asked for.

    Returns:
        The commit; for a model folder, and where nothing is on this disk yet, `revision` itself.
    """
    from huggingface_hub import try_to_load_from_cache

    found = None if Path(path).exists() else try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision  # …/snapshots/COMMIT/config.json


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model. Raises `ModelError` if there is none or no (default) chat template."""
    from transformers import AutoTokenizer

    with quiet_libraries(), _load_errors(name):
        path = resolve_model(name)
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
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_libraries(), _load_errors(name), torch.device("meta"):
        path = resolve_model(name)
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(path, local_files_only=looks_local(path), **common)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def pick_device() -> torch.device:
    """The GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_model(name: str) -> str:
    """A packaged model's folder, else the name itself. Raises `ModelError` with the next step."""
    name = os.path.expanduser(name)
    if name in PACKAGED_MODELS:
        folder = MODELS_DIR / name
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


def pick_dtype(dtype: Dtype, device: torch.device) -> str:
    """The compute dtype for "auto": what the hardware multiplies fast without losing the adapter's signal.

    bfloat16 on Ampere and newer, float16 on older GPUs. float32 on every CPU: without AMX or
    AVX512-BF16 a bf16 product runs 4 to 7 times slower, and with them the whole step gained less
    than a half (docs/decisions.md), at the price of log-probabilities good to 2 digits.
    """
    import torch

    if dtype != "auto":
        return dtype
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def share_weights(base: Base) -> Base:
    """The same base once more, as another tree of modules over the same weights: no tensor is copied but buffers.

    What is done to one tree (an adapter, hooks, checkpointing, train mode) does not touch the other, so one can
    be trained while the other answers. It costs the modules themselves: megabytes, and a fraction of a second.

    Args:
        base: without an adapter on it.
    """
    weights = list(base.model.parameters())
    states = [getattr(weight, "quant_state", None) for weight in weights]  # bitsandbytes' scales
    memo = {id(shared): shared for shared in [*weights, *states] if shared is not None}
    return replace(base, model=copy.deepcopy(base.model, memo))


def attach_lora(base: PreTrainedModel, lora: LoraSection, *, seed: int) -> PeftModel:
    """Put a fresh adapter on a base model: B = 0, so the policy starts as the reference.

    Raises:
        ConfigError: `targets` or `layers` match nothing in this model.
    """
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, lora_config(base, lora))
    except ValueError as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ConfigError(f"lora: {reason}. Linear layers here: {', '.join(linear_names(base))}.") from None
    to_fp32_masters(model)
    return model


def lora_config(model: PreTrainedModel, lora: LoraSection) -> LoraConfig:
    """The recipe's `lora` section in peft's terms, `top-N` resolved to layer numbers."""
    from peft import LoraConfig

    count = model.config.get_text_config().num_hidden_layers
    layers: list[int] | None = None
    if isinstance(lora.layers, list):
        layers = lora.layers
    elif lora.layers.startswith("top-"):
        layers = list(range(count))[-int(lora.layers.removeprefix("top-")) :]
    if layers and (max(layers) >= count or min(layers) < 0):
        raise ConfigError(f"lora.layers is {shown(lora.layers)}: this model has layers 0 to {count - 1}.")
    targets = lora.targets
    if layers is not None and targets == "all-linear":
        targets = linear_names(model)  # peft picks layers by number only for named targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # 32 and 32.0 are one file
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


def to_fp32_masters(model: torch.nn.Module) -> None:
    """Hold every trainable parameter in float32.

    Adam's updates at small learning rates are below bf16's resolution (8 bits): they would round to zero.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


@contextlib.contextmanager
def reference(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The same model as the reference π_ref, for the length of the block.

    Adapters are off; or, where training continues from an adapter, its frozen copy "ref" is on. A
    model without adapters is its own reference.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield model
    elif REFERENCE in model.peft_config:
        before = model.active_adapter
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter(before)
    else:
        with model.disable_adapter():
            yield model


def is_reference(model: PeftModel) -> bool:
    """Whether the policy's weights still make it the reference: B = 0 everywhere, or all equal to the copy "ref"."""
    import torch

    parameters = dict(model.named_parameters())
    copied = REFERENCE in model.peft_config
    for name, parameter in parameters.items():
        before, policy, after = name.partition(f".{POLICY}")
        if not policy or not parameter.requires_grad:
            continue
        if not copied and before.endswith("lora_B"):
            if parameter.any():
                return False
        elif copied or before.endswith("modules_to_save"):
            start = f"{before}.{REFERENCE}" if copied else f"{before.removesuffix('modules_to_save')}original_module"
            twin = parameters.get(start + after)
            if twin is None or not torch.equal(twin.to(parameter), parameter):
                return False
        elif "lora_" not in before or (before.endswith("lora_embedding_B") and parameter.any()):
            return False
    return True


def detach(model: PeftModel) -> PreTrainedModel:
    """Take all adapters off again: the base as it was before any was put on, the same object."""
    base: PreTrainedModel = model.unload()
    if not hasattr(base, "_hf_hook"):  # an offloading hook of accelerate sits on the forward, too, and stays
        vars(base).pop("forward", None)  # TRL leaves its own there, one around the other with each training
    base.gradient_checkpointing_disable()
    hooks = base.get_input_embeddings()._forward_hooks
    for number, hook in list(hooks.items()):
        # For checkpointing, TRL and peft each add one, and transformers remembers only the last to remove it.
        if hook.__name__.startswith("make_inputs_require_grad"):
            del hooks[number]
    for handle in ("_require_grads_hook", "_require_grads_hooks"):
        vars(base).pop(handle, None)
    base.config.use_cache = True  # TRL switches it off for training
    base.requires_grad_(False)
    base.eval()
    return base


def bare(model: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel (adapters stay in its layers), or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last name parts of the model's linear layers, without the head: what `targets` may name."""
    import torch

    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return sorted(names - {"lm_head"})


def hold_dequantized(model: PreTrainedModel) -> None:
    """Replace each linear weight but the head's by its NF4 value, in place and in the compute dtype.

    The function is that of the packed 4-bit model; no pass has to dequantise again.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    head = model.get_output_embeddings()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and part is not head:
            weight = part.weight.data
            codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            part.weight.data = dequantize_4bit(codes, state).to(weight.dtype).reshape(weight.shape)


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
                "lora_dpo.model.keep_packed_weights_differentiable(model) before its first pass."
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


def weight_fingerprint(path: str, *, revision: str | None = None) -> str | None:
    """A hash that tells base models apart without reading all their weights.

    Covers each stored tensor's name, shape and up to 64 elements of its middle row, as multiples of 2^-12 after
    rounding to bf16: bf16 weights have the same fingerprint in bf16, fp16 and float32 files, whatever the shards.
    (float32 weights keep theirs in bf16, not in fp16, which rounds them elsewhere.) A head that is tied to the
    embeddings is left out, since some files store it and some do not. None without safetensors files.
    """
    import torch

    digest = hashlib.sha256()
    found: dict[str, Path] = {}
    for file in weight_files(path, revision=revision):
        with open_tensors(file) as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    if found and _is_tied(path, revision):
        found.pop("lm_head.weight", None)
    by_file: dict[Path, Any] = {file: open_tensors(file) for file in set(found.values())}
    for name in sorted(found):
        part = by_file[found[name]].get_slice(name)
        shape = part.get_shape()
        digest.update(f"{name}{shape}".encode())
        row = part[shape[0] // 2] if shape and shape[0] else torch.zeros(0)
        values = torch.as_tensor(row).reshape(-1)
        values = values[:: max(1, values.numel() // 64)][:64]
        # fp16 has no exponent for bf16's smallest weights: on this grid they are 0 in both
        steps = (values.to(torch.bfloat16).float() * 4096).round().clamp(-(2**31), 2**31 - 128)
        digest.update(steps.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()[:32] if found else None


def weight_files(path: str, *, revision: str | None = None) -> list[Path]:
    """The safetensors files that hold a model's weights; those of its index, if it has one."""
    from transformers.utils import cached_file

    config = cached_file(path, "config.json", revision=revision, local_files_only=looks_local(path))
    folder = Path(config).parent
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / name for name in names)
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _is_tied(path: str, revision: str | None) -> bool:
    from transformers.utils import cached_file

    found = cached_file(path, "config.json", revision=revision, local_files_only=looks_local(path))
    config = json.loads(Path(found).read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False))
    return bool(tied)


def _nf4_config(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def decide_packed(skeleton: PreTrainedModel, device: torch.device, compute: torch.dtype) -> bool:
    """For `packed: auto`: on a CPU hold the weights dequantised if they take at most half of the free memory."""
    import psutil

    if device.type == "cuda":
        return True
    weights = sum(parameter.numel() for parameter in skeleton.parameters()) * compute.itemsize
    return bool(weights > psutil.virtual_memory().available / 2)


@contextlib.contextmanager
def _load_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = re.split(r"\n|(?<=\.) ", str(error).strip())[0]
        raise ModelError(
            f"The model {name} could not be loaded: {reason} "
            "Give a model folder, a hub id (with network), or a name of: lora-dpo models list"
        ) from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
