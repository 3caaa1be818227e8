"""A tokenizer in GGUF: its tokens, merges, special tokens and chat template, from `tokenizer.json`.

Two kinds exist: byte-level BPE (`gpt2`), where llama.cpp must know by name how text is split before merging, and
SentencePiece's BPE with byte fallback (`llama`), where scores order the merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dpo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as llama.cpp numbers them."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}
"""How text is split, by the regular expression in tokenizer.json: llama.cpp's names."""


def add_vocabulary(
    writer: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, *, size: int, stops: list[int]
) -> None:
    """Write the tokenizer into a GGUF file.

    Args:
        folder: the model folder, with `tokenizer.json`.
        size: rows of the embedding; ids that the tokenizer does not use become padding.
        stops: ids that end a turn.

    Raises:
        ModelError: a tokenizer of another kind, or a split that llama.cpp has no known name for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json, which a GGUF file needs. Save the tokenizer there first.")
    whole = json.loads(path.read_text(encoding="utf-8"))
    model = whole["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"{path} is a {model.get('type')} tokenizer; GGUF export knows BPE alone.")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    tokens, kinds = _tokens(whole, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, kinds, merges))
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(_puts_a_space_first(whole))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(whole.get("pre_tokenizer"), path))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer, stops)
    named = tokenizer.chat_template
    if isinstance(named, dict):  # several, by their use: the default one and tokenizer.chat_template.NAME
        named = [{"name": name, "template": template} for name, template in named.items()]
    if named:
        writer.add_chat_template(named)


def split_name(pre_tokenizer: Any, path: Path) -> str:
    """llama.cpp's name for how a byte-level BPE splits text before it merges. Raises `ModelError`."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    shape = [step["type"] for step in steps]
    if shape == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if shape == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if shape == ["Split", "ByteLevel"]:
        name = _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
        if name:
            return name
    raise ModelError(
        f"{path} splits text in a way ({', '.join(shape) or 'none'}) that has no known name in llama.cpp. "
        "Merge the adapter and use llama.cpp's own converter."
    )


def _tokens(whole: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = whole["model"]["vocab"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    unknown = whole["model"].get("unk_token")
    fallback = bool(whole["model"].get("byte_fallback"))
    for text, index in vocabulary.items():
        if index < size:
            is_byte = fallback and len(text) == 6 and text.startswith("<0x")
            tokens[index] = text
            kinds[index] = BYTE if is_byte else UNKNOWN if text == unknown and fallback else NORMAL
    for added in whole.get("added_tokens", []):
        if added["id"] < size and not (fallback and added["content"] == unknown):
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[str]) -> list[float]:
    """Scores that make llama.cpp merge in the order of tokenizer.json: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), index)
    last = len(merges)
    return [
        -float(rank.get(text, last)) if kind == NORMAL else 0.0 if kind in (BYTE, UNKNOWN) else -1000.0
        for text, kind in zip(tokens, kinds, strict=True)
    ]


def _puts_a_space_first(whole: dict[str, Any]) -> bool:
    text = json.dumps([whole.get("normalizer"), whole.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> None:
    for name, index in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("pad", tokenizer.pad_token_id),
        ("unk", tokenizer.unk_token_id),
    ):
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    others = [index for index in stops if index != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
