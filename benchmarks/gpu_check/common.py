"""What all parts use: random bases in NF4, trainers on them, and a file for what was found."""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import Row

ROOT = Path(__file__).resolve().parents[2]
GB = 1 << 30
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """A Llama's sizes."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    tied: bool


SIZES = {
    "tiny": Size(64, 128, 3, 4, 2, 16, 512, False),
    "small": Size(256, 512, 4, 8, 2, 32, 2048, False),
    "middle": Size(1024, 2816, 8, 16, 4, 64, 32000, False),
    "1b": Size(2048, 8192, 16, 32, 8, 64, 128256, True),
    "3b": Size(3072, 8192, 28, 24, 8, 128, 128256, True),
    "8b": Size(4096, 14336, 32, 32, 8, 128, 128256, False),
}


@dataclass
class Notes:
    """What is found, printed and kept in a JSON file, which other parts add to."""

    path: Path
    failed: list[str] = field(default_factory=list)
    """What was found to be wrong."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def save(self, name: str, value: Any) -> None:
        old = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        old[name] = value
        self.path.write_text(json.dumps(old, indent=1, default=str) + "\n", encoding="utf-8")

    def fail(self, text: str) -> None:
        self.failed.append(text)
        self.say(f"NOT OK: {text}")


@dataclass(frozen=True)
class Check:
    """One part's run: where, how large, and where its results go."""

    options: argparse.Namespace
    notes: Notes

    @property
    def device(self) -> str:
        name: str = self.options.device
        return name

    @property
    def on_card(self) -> bool:
        return self.device != "cpu"


def file_name(card: str) -> str:
    """`gpu-` and a card's name as a part of a file's name."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def tokenizer() -> Any:
    """A tokenizer of four words: trainers ask one for its padding, and no text is read here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "word": 3}
    plain = Tokenizer(models.WordLevel(words, unk_token="word"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def random_base(size: Size, device: str) -> Any:
    """A random Llama, drawn on the device, its linear layers quantised one by one; all trainers share its weights."""
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_dpo.model.base import Base

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.mlp,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
        head_dim=size.head_width, max_position_embeddings=8192, tie_word_embeddings=size.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device) * 0.02

    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, torch.nn.Linear) and part is not model.lm_head:
                packed = bitsandbytes.nn.Linear4bit(
                    1, 1, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )  # a layer of its true size would be drawn on the CPU first
                packed.in_features, packed.out_features = part.in_features, part.out_features
                drawn = draw(part.out_features, part.in_features)
                packed.weight = bitsandbytes.nn.Params4bit(drawn, requires_grad=False, quant_type="nf4")
                setattr(parent, name, packed.to(device))
    for part in model.modules():  # what is left: embeddings, norms, the head
        for name, value in list(part.named_parameters(recurse=False)):
            if value.is_meta:
                ones = value.dim() == 1
                made = torch.ones_like(value, device=device) if ones else draw(*value.shape)
                setattr(part, name, torch.nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    model.is_loaded_in_4bit = True
    model.requires_grad_(False).eval()
    return Base(model, tokenizer(), "a random Llama", None, "nf4", True, "bfloat16", None)


def stock_trainer() -> Any:
    """Stock TRL's trainer, on pairs that are token ids already."""
    import trl

    class Stock(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    return Stock


def trainer_of(
    kind: Any, base: Any, rows: Sequence[Row], batch: int, device: str, *, bf16: bool = True, **settings: Any
) -> Any:
    """A trainer with an all-linear adapter of rank 16 on its own tree of modules, prepared as `train` prepares it."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    from lora_dpo import DPOTrainer, EngineSection
    from lora_dpo.model.lora import share_weights

    tree, cpu = share_weights(base), device == "cpu"
    args = trl.DPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        report_to="none",
        bf16=bf16 and not cpu,
        use_cpu=cpu,
        disable_tqdm=True,
        loss_type=["sigmoid"],
        **settings,
    )
    trainer = kind(
        tree.model,
        args=args,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tree.tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=PROJECTIONS),
        **({"engine": EngineSection(reference_cache="off")} if issubclass(kind, DPOTrainer) else {}),
    )
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.accelerator.prepare_model(trainer.model)  # as `train` does: puts autocast around its forward
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps, trainer.state.logging_steps = 10**9, 10
    trainer.model.train()
    return trainer


def step(trainer: Any, rows: Sequence[Row]) -> None:
    """Forward and backward of one batch, as the training loop calls it."""
    trainer.training_step(trainer.model, trainer.data_collator(list(rows)))
    trainer.state.global_step += 1
    trainer._metrics["train"].clear()


def step_and_forget(trainer: Any, rows: Sequence[Row]) -> None:
    """The same, without its gradients afterwards."""
    step(trainer, rows)
    trainer.model.zero_grad(set_to_none=True)


def with_moments(trainer: Any) -> None:
    """Give the adapter Adam's moments, as after the first step."""
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def unknown(batch: Sequence[Row]) -> list[dict[str, Any]]:
    """The batch with made-up references, for a trainer that reads them from its rows."""
    return [{**row, "ref_chosen_logps": -100.0, "ref_rejected_logps": -101.0} for row in batch]


def one_pair(length: int, prompt: int = 128) -> Row:
    """A pair whose answers differ from their first token on."""
    prompt = min(prompt, length // 2)
    return {
        "prompt_ids": [number % 400 + 50 for number in range(prompt)],
        "chosen_ids": [number % 397 + 50 for number in range(length - prompt)],
        "rejected_ids": [number % 389 + 60 for number in range(length - prompt)],
    }


def wait() -> None:
    """Until the card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_of(run: Callable[[], None]) -> tuple[float, float]:
    """GiB of tensors and GiB taken from the card at the peak of a run; 0 where there is no card."""
    gc.collect()
    if not torch.cuda.is_available():
        run()
        return 0.0, 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return torch.cuda.max_memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB
