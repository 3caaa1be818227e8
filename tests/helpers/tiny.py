"""Tiny random models of every supported architecture, a few pairs of token ids, and trainers on them."""

import copy

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig

from lora_dpo.data import Origin, TokenPair

SIZES = dict(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip
CONFIGS = {
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "granite": transformers.GraniteConfig,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "olmo2": transformers.Olmo2Config,
    "phi3": transformers.Phi3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "smollm3": transformers.SmolLM3Config,
}

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                        "long_factor": [4.0] * 4, "original_max_position_embeddings": 16},
}  # fmt: skip
"""Rotary frequencies that depend on the longest row of a call."""


def tiny(kind, **extra):
    torch.manual_seed(0)
    extra = {"head_dim": 8, **extra} if kind.startswith(("qwen3", "mistral", "gemma")) else extra
    # Gemma 2 and 3: rows of the tests are longer than this window, and every second layer is limited to it
    extra = {"sliding_window": 4, **extra} if kind in ("gemma2", "gemma3_text") else extra
    # soft caps near the size of the scores and logits, so that they matter
    extra = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **extra} if kind == "gemma2" else extra
    extra = {"layer_types": ["sliding_attention", "full_attention"], **extra} if kind == "gemma3_text" else extra
    extra = {"logits_scaling": 3.0, "attention_multiplier": 0.4, **extra} if kind == "granite" else extra
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SIZES, **extra})).eval()


def pair(prompt, chosen, rejected):
    return TokenPair(prompt, chosen, rejected, Origin("t", 1), False)


PAIRS = [
    pair([1, 5, 6, 7], [8, 9, 2], [10, 2]),
    pair([1, 20], [21, 22, 23, 24, 2], [21, 22, 30]),  # the answers begin alike
    pair([1, 20, 21, 33, 34, 35, 36], [40], [41, 42, 43, 44, 45, 2]),
    pair([1, 9], [10, 11], [10, 11, 12, 2]),  # one answer begins with the other
]


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


class Stock(trl.DPOTrainer):
    """Stock TRL on rows that are token ids already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def columns(pairs):
    return [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]


def build(trainer_class, model, folder, tmp_path, pairs=PAIRS, lora=LORA, engine=None, weights=None, **options):
    """A trainer on tiny data. Its adapter is not the zero one: B is drawn, the same for each trainer."""
    args = DPOConfig(
        str(tmp_path),
        **{
            **dict(per_device_train_batch_size=len(pairs), report_to="none", bf16=False, use_cpu=True, beta=0.3),
            **dict(disable_tqdm=True, gradient_checkpointing=False, save_strategy="no", max_steps=1),
            **options,
        },
    )
    rows = Dataset.from_list(columns(pairs))
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=rows if weights is None else rows.add_column("pair_weight", weights),
        eval_dataset=Dataset.from_list(columns(pairs)),
        peft_config=copy.deepcopy(lora),  # peft writes the names of a model into it
        processing_class=AutoTokenizer.from_pretrained(folder),
        **({"engine": engine} if engine is not None else {}),
        **({"pair_weights": True} if weights is not None else {}),
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.1))
    trainer.model.train()
    return trainer


def gradients_of(trainer):
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, rtol=1e-5):
    """Gradients by name, to `rtol` of the largest."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=rtol, atol=rtol * largest), name


def one_step(trainer_class, kind, folder, tmp_path, model=(), **options):
    trainer = build(trainer_class, tiny(kind, **dict(model)), folder, tmp_path, **options)
    batch = trainer._prepare_inputs(trainer.data_collator(columns(PAIRS)))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = gradients_of(trainer)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics, trainer
