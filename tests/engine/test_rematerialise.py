"""A forward pass that nothing runs backward, such as one that ran out of memory, is free again."""

import gc

import pytest
import torch
from tiny import tiny

from lora_dpo.engine.layout import lay_out
from lora_dpo.engine.pair_forward import stream_attention, stream_hidden
from lora_dpo.engine.rematerialise import Rematerialiser


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_a_pass_without_a_backward_pass_leaves_nothing(kind):
    model = tiny(kind)
    rows = [[1, 5, 6, 7, 8, 9, 2], [1, 5, 6, 7, 10, 2]]
    layout = lay_out(rows, [[False] * 4 + [True] * (len(row) - 4) for row in rows], width=7)
    rematerialiser = Rematerialiser(model)
    gc.collect()
    before = sum(isinstance(thing, torch.Tensor) and thing.grad_fn is not None for thing in gc.get_objects())
    with rematerialiser.active(), stream_attention(model):
        hidden = stream_hidden(model, layout)
    assert hidden.grad_fn is not None
    del hidden
    gc.collect()
    after = sum(isinstance(thing, torch.Tensor) and thing.grad_fn is not None for thing in gc.get_objects())
    assert after == before
