"""What the time of a step is computed from, held against the engine's own passes."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_dpo.engine import PairForward
from lora_dpo.model.lora import base_of
from lora_dpo.training.planning.step_time import TRAFFIC_BYTES

PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product")


class Traffic(TorchDispatchMode):
    """Bytes that operations other than products read and write, and how many of all operations there are."""

    def __init__(self):
        super().__init__()
        self.bytes, self.kernels = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        read, made = ([one for one in tree_leaves(tree) if torch.is_tensor(one)] for tree in ((args, kwargs), result))
        sources = {one.untyped_storage().data_ptr() for one in read}
        if all(one.untyped_storage().data_ptr() in sources for one in made) and not name.endswith("_"):
            return result  # a view
        self.kernels += 1
        if not name.startswith(PRODUCTS):
            self.bytes += sum(self.seen(one) for one in (*read, *made))
        return result

    @staticmethod
    def seen(tensor):
        """Bytes of a tensor, what is repeated by a stride of 0 read once."""
        numbers = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numbers *= size if stride else 1
        return numbers * tensor.element_size()


def test_what_passes_move_is_what_time_is_computed_from():
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    model.to(torch.bfloat16)  # as autocast has it
    forward = PairForward(base_of(model))
    forward.logged = False
    rows = torch.arange(2 * 200).reshape(2, 200) % 290 + 3
    rows[1, :60] = rows[0, :60]
    labels = rows.clone()
    labels[:, :60] = -100
    with Traffic() as traffic:
        output = base_of(model)(
            input_ids=rows, attention_mask=torch.ones_like(rows), labels=labels, use_cache=False, fused_lm_head=True
        )
        output.log_probs.sum().backward()
    assert traffic.bytes / (forward.tokens * 4 * 256) == pytest.approx(TRAFFIC_BYTES, rel=0.3)
    assert 200 < traffic.kernels / 4 < 450  # a layer, of one pair; each further pair has about 25
