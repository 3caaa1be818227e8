"""One base in memory, LoRA on it, and how it answers.

device        what computes, what it computes fast, how much memory is free
tensor_file   safetensors files that others may write to meanwhile
packaged      base models that come from a package index
identity      what a base is: fingerprint, commit, tokenizer and template
stored_form   how a checkpoint's weights are stored quantised, if they are
quantised     quantised layers, and what their weights stand for
held_size     how many bytes its weights take, and how many of them on the device
origin        whether two checkpoints are one model, stored in two forms
visiting      frozen weights in main memory that visit the device, for a base larger than a card
base          loading it, once, in 4 bits or as stored
stored_size   how many bytes its weights have, and how many are here
experts       a mixture's stacked experts
whole_parts   modules that are trained whole beside an adapter
lora          adapters on it: policy with them on, reference with them off
eva           a fresh adapter's A from what its layers read
plain_lora    whether a layer's adapter is LoRA and no more
answering     those layers while answers are written, in few kernels
decoding      answers from it: one loop for chat, evaluation and sampling
"""

from __future__ import annotations

from lora_dpo.model.base import Base, load_base
from lora_dpo.model.decoding import Sampling, generate, stream
from lora_dpo.model.lora import POLICY, REFERENCE, attach_lora, detach, reference, share_weights
from lora_dpo.model.packaged import fetch_model

__all__ = [
    "POLICY",
    "REFERENCE",
    "Base",
    "Sampling",
    "attach_lora",
    "detach",
    "fetch_model",
    "generate",
    "load_base",
    "reference",
    "share_weights",
    "stream",
]
