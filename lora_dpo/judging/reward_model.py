"""A reward model as the judge: a sequence classifier with one output, loaded beside the policy.

Shape suffixes: K answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_dpo.data import Message
from lora_dpo.data.chat_template import encode, render
from lora_dpo.data.prompts import Prompt
from lora_dpo.errors import JudgeError, ModelError
from lora_dpo.files import looks_local
from lora_dpo.judging.judge import Judge, Scores
from lora_dpo.model.base import load_lock, resolve_model
from lora_dpo.model.decoding import Answer
from lora_dpo.model.device import pick_device, pick_dtype
from lora_dpo.model.identity import weight_fingerprint
from lora_dpo.quiet import errors_only, quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8


def reward_judge(spec: str, name: str) -> Judge:
    """Load the reward model `name` (a folder or a hub id). Only safetensors are read, and no code is run.

    Raises:
        JudgeError: it cannot be loaded, or is no reward model.
    """
    model, tokenizer, path = _load(spec, name)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def score(prompt: Prompt, answers: Sequence[Answer]) -> Scores:
        ids = [conversation_ids(tokenizer, prompt, answer.text) for answer in answers]
        fitting = [index for index, row in enumerate(ids) if window is None or len(row) <= window]
        fitting.sort(key=lambda index: len(ids[index]))
        scores: list[float | None] = [None] * len(answers)
        for start in range(0, len(fitting), BATCH):
            batch = fitting[start : start + BATCH]
            for index, value in zip(batch, _rewards(model, [ids[index] for index in batch]), strict=True):
                scores[index] = value
        return scores

    count = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    about = f"{name}, {count / 1e6:,.0f} M parameters, {size / 1e9:.2f} GB of memory beside the policy"
    return Judge(spec, score, {"fingerprint": weight_fingerprint(path)}, about=about)


def conversation_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> list[int]:
    """The conversation as the reward model reads it: its own chat template, else prompt and answer as two texts."""
    if tokenizer.chat_template:
        turns = [*prompt.messages, Message(role="assistant", content=answer)]
        return encode(tokenizer, render(tokenizer, turns).rstrip())
    asked = "\n\n".join(message["content"] for message in prompt.messages)
    return list(tokenizer(asked, answer)["input_ids"])


def _rewards(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """One reward a row. Padded on the right: the classifier finds each row's last token itself."""
    import torch

    longest = max(map(len, rows))
    ids_KT = torch.full((len(rows), longest), model.config.get_text_config().pad_token_id)
    mask_KT = torch.zeros_like(ids_KT)
    for index, row in enumerate(rows):
        ids_KT[index, : len(row)] = torch.tensor(list(row))
        mask_KT[index, : len(row)] = 1
    with torch.no_grad():
        logits = model(input_ids=ids_KT.to(model.device), attention_mask=mask_KT.to(model.device)).logits
    return [float(value) for value in logits[:, 0].float().tolist()]


def _load(spec: str, name: str) -> tuple[Any, PreTrainedTokenizerBase, str]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = pick_device()
    dtype = getattr(torch, pick_dtype("auto", device))
    try:
        path = resolve_model(name)
        with quiet_libraries(), errors_only("transformers"), load_lock:  # missing weights are told of below
            here_alone = looks_local(path)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=here_alone)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=here_alone,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, ModelError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise JudgeError(f"The judge {spec} cannot be loaded: {reason}. Give a folder or a hub id.") from error
    if loading["missing_keys"]:
        # transformers fills what is missing with random numbers: a chat model would judge by dice.
        raise JudgeError(
            f"The judge {spec} is no reward model: {', '.join(sorted(loading['missing_keys'])[:2])} is not among its "
            "weights. Give a model that was trained as a reward model (a sequence classifier)."
        )
    if model.config.num_labels != 1:
        raise JudgeError(
            f"The judge {spec} sorts into {model.config.num_labels} classes; a reward model has one output. "
            "Give another model."
        )
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        text_config.pad_token_id = model.config.pad_token_id = pad
    model.requires_grad_(False)
    model.eval()
    return model, tokenizer, path
