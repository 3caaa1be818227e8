"""What of a base model works here, from its configuration and tokenizer alone: no weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.data.chat_template import Message, render
from lora_dpo.data.keywords_read import keywords_of
from lora_dpo.errors import LoraDPOError, ModelError
from lora_dpo.model.base import load_skeleton, load_tokenizer
from lora_dpo.model.stored_form import DEQUANTISED, StoredForm, can_dequantise, form_of, missing_libraries
from lora_dpo.text import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GB = 1 << 30
PAIR = (512, 768, 768)
"""The pair that memory is said for: tokens of its prompt, and of its two whole sequences."""
RANK = 16
_TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
_USER = Message(role="user", content="What is the weather?")
_ANSWER = Message(role="assistant", content="Dry.")


@dataclass(frozen=True)
class Template:
    """What a model's chat template takes."""

    system: str
    """`yes`, `left out` (it takes the turn and does not write it), or `refused`."""
    tools: bool
    """Whether it writes the tools that it is given."""
    keywords: tuple[str, ...]
    """What it reads beside the conversation, such as `enable_thinking`."""
    end: str
    """What stands after an answer."""
    pad: str
    """The token that rows are padded with, if there is one."""


@dataclass(frozen=True)
class ModelCheck:
    """What works of a base model; bytes are of its weights or of a step."""

    name: str
    kind: str
    parameters: int
    layers: int
    context: int | None
    stored: str
    """How the files hold the weights."""
    download: int
    """Bytes of them that are not on this disk."""
    template: Template | str
    """Why it cannot be used, if it cannot."""
    engine: str
    streams: bool
    """Whether prompts are shared."""
    reached: int
    """Weights of the layers that `lora.targets: all-linear` adapts."""
    modules: int
    """Those layers."""
    packed: int | None
    """Bytes of the weights in 4 bits, or as they are stored quantised, with 16-bit parts; None if they never are."""
    half: int | None
    """Bytes of the weights, or of what quantised ones stand for, in 16 bits; None if they are never held so."""
    form: str | None
    """How the files hold the weights quantised, such as `INT8`; None for plain ones."""
    missing: tuple[str, ...]
    """Packages that such weights are loaded with, and that are not installed."""
    pair: int | None
    """Bytes that a pair of `PAIR` keeps in 16 bits; None where TRL's passes run, whose need is not computed."""
    export: str | None
    """Why it cannot be written as GGUF; None if it can."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def check_model(name: str, *, revision: str | None = None) -> ModelCheck:
    """Look at a base model.

    Args:
        name: a packaged model, a model folder, or a hub id: of that, configuration and tokenizer are fetched.

    Raises:
        ModelError: it is not there, or its files cannot be read.
    """
    from lora_dpo.config.recipe import LoraSection
    from lora_dpo.engine.cost_model import PairShape, footprint
    from lora_dpo.engine.pair_forward import structural_reason
    from lora_dpo.engine.proof import proof_of
    from lora_dpo.model.held_size import weight_bytes
    from lora_dpo.model.lora import attach_lora, base_of
    from lora_dpo.model.stored_size import stored_size

    skeleton = load_skeleton(name, revision=revision)
    config = skeleton.config
    form = form_of(config.to_dict(), name)
    stored = stored_size(name, skeleton, revision=revision)
    parameters = sum(weight.numel() for weight in skeleton.parameters())
    export = _export_reason(config, name)
    model = attach_lora(skeleton, LoraSection(rank=RANK), seed=0)  # freezes what is not the adapter's
    base = base_of(model)
    reason = structural_reason(base)
    proof = None if reason else proof_of(base)
    reason = reason or (proof.reason if proof else None)
    adapted = [part for part in model.modules() if hasattr(part, "lora_A") and hasattr(part, "get_base_layer")]
    packed = form is None or form.kind not in DEQUANTISED
    cost = footprint(model, itemsize=2, packed=packed, form=form) if reason is None else None
    return ModelCheck(
        name=name,
        kind=str(config.model_type),
        parameters=parameters,
        layers=int(config.get_text_config().num_hidden_layers),
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        stored=_stored(config, form),
        download=stored.total - stored.here,
        template=_template(name, revision),
        engine=reason or (proof.line if proof else ""),
        streams=reason is None,
        reached=sum(part.get_base_layer().weight.numel() for part in adapted),
        modules=len(adapted),
        packed=weight_bytes(base, itemsize=2, packed=True, form=form) if packed else None,
        half=weight_bytes(base, itemsize=2, packed=False, form=form) if form is None or can_dequantise(form) else None,
        form=None if form is None else form.label,
        missing=() if form is None else tuple(missing_libraries(form)),
        pair=None if cost is None else int(cost.kept_bytes(PairShape(*PAIR, common=PAIR[0])) + cost.pass_bytes()),
        export=export,
    )


def lines(found: ModelCheck) -> Iterator[tuple[str, str]]:
    """Rows `(label, value)` for people."""
    context = f", reads {found.context:,} tokens" if found.context else ""
    yield "model", f"{found.kind}, {found.parameters / 1e9:.2f} billion parameters in {found.layers} layers{context}"
    more = f", {found.download / GB:.1f} GB to download" if found.download else ", all of it here"
    yield "weights", f"{found.stored}{more}"
    if found.missing:
        named = " ".join(found.missing)
        yield "library", f"not installed: {' and '.join(found.missing)}, which loads such weights (pip install {named})"
    if isinstance(found.template, str):
        yield "chat", f"no: {found.template}"
    else:
        yield "chat", _of_template(found.template)
    yield (
        "engine",
        ("prompts are shared: " if found.streams else "TRL's own passes (slower, the same result): ") + found.engine,
    )
    share = found.reached / found.parameters
    yield "lora", f"all-linear adapts {found.modules} layers, {share:.0%} of the weights"
    packed = "in 4 bits" if found.form is None else f"packed as stored ({found.form})"
    held = [(found.packed, packed), (found.half, "in 16" if found.form is None else "as values in 16 bits")]
    yield "memory", f"weights {', '.join(f'{size / GB:.1f} GB {how}' for size, how in held if size is not None)}"
    if found.pair is not None:
        prompt, whole, _ = PAIR
        text = f"a pair of {prompt} + 2 × {whole - prompt} tokens {found.pair / GB:.1f} GB more, without checkpointing"
        yield "", f"{text}; computed, not measured. For your pairs: lora-dpo plan"
    yield "export", "GGUF, Ollama, PEFT" if found.export is None else f"PEFT, and merged. {found.export}"


def _of_template(template: Template) -> str:
    system = {"yes": "system turns", "left out": "system turns are left out", "refused": "no system turn"}[
        template.system
    ]
    parts = [system, "tools" if template.tools else "no tools"]
    if template.keywords:
        parts.append(f"reads {', '.join(map(plain, template.keywords))} (model.template)")
    end = f"answers end with {template.end}" if template.end else "nothing marks the end of an answer"
    return ", ".join([*parts, end, f"padding {template.pad or 'none'}"])


def _template(name: str, revision: str | None) -> Template | str:
    try:
        tokenizer = load_tokenizer(name, revision=revision)
        text = render(tokenizer, [_USER, _ANSWER])
        with_tools = render(tokenizer, [_USER, _ANSWER], tools=[_TOOL])
    except ModelError as error:
        return str(error)
    return Template(
        system=_system(tokenizer),
        tools="weather" in with_tools.replace(_USER["content"], ""),
        keywords=tuple(sorted(keywords_of(tokenizer))),
        end=plain(text.rpartition(_ANSWER["content"])[2].strip()),
        pad=plain(tokenizer.pad_token or ""),
    )


def _system(tokenizer: PreTrainedTokenizerBase) -> str:
    said = Message(role="system", content="Speak as a sailor.")
    try:
        return "yes" if said["content"] in render(tokenizer, [said, _USER]) else "left out"
    except ModelError:
        return "refused"


def _stored(config: Any, form: StoredForm | None) -> str:
    if form is None:
        dtype = getattr(config, "dtype", None)
        return (
            f"stored in {str(dtype).removeprefix('torch.')}"
            if dtype is not None
            else "stored in a dtype that is not said"
        )
    return f"stored quantised ({form.label})"


def _export_reason(config: Any, name: str) -> str | None:
    from lora_dpo.release.exports.gguf_arch import ARCHS, arch_of
    from lora_dpo.release.exports.llama_cpp_tools import CONVERTER, INSTALL, is_installed

    if config.model_type not in ARCHS:
        there = "which is installed" if is_installed(CONVERTER) else f"which is not installed ({INSTALL})"
        return f"GGUF of the merged model by llama.cpp's own converter, {there}"
    try:
        arch_of(config, name)
    except LoraDPOError as error:
        return f"No GGUF: {error}"
    return None
