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


@pytest.mark.parametrize(
    ("view", "again"),
    [
        (lambda made: made, True),
        (lambda made: made.reshape(-1), True),
        (lambda made: made[:2], False),  # begins where the tensor does, and is a part of it
        (lambda made: made.t(), False),  # all of it, in another order
    ],
    ids=["itself", "another shape", "its first rows", "transposed"],
)
def test_a_tensor_is_made_again_but_not_a_part_of_it_nor_another_order(view, again):
    rematerialiser, made_again = Rematerialiser(tiny("llama")), []
    source = torch.arange(12.0).reshape(3, 4)

    def recipe():
        made_again.append(True)
        return source * 2

    weight = torch.ones(view(source).shape, requires_grad=True)
    with rematerialiser.active():
        made = source * 2
        rematerialiser.note(made, recipe, source)
        total = (view(made) * weight).sum()
        del made
    total.backward()
    assert torch.equal(weight.grad, view(source * 2))
    assert bool(made_again) == again


def test_what_a_graph_lets_go_within_a_pass_is_not_counted():
    rematerialiser = Rematerialiser(tiny("llama"))
    weight = torch.ones(8, 8, requires_grad=True)
    rematerialiser.kept = counted = {}
    with rematerialiser.active():
        (torch.ones(8, 8) * weight).detach()  # saves the left factor, and its graph ends here
        kept = torch.ones(4, 8) @ weight
    assert list(counted.values()) == [4 * 8 * 4]
    del kept
