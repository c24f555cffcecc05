"""What has `generate` write faster on a CPU, from the same distribution.

Three things that take most of a token's time and need not (docs/results.md): matrices laid out anew for each product,
a cache that is copied whole for each token, and a random number for each entry of the vocabulary. The products are of
an operator that torch's own compiler uses for frozen weights on Intel's library; where it is not there, nothing is laid
out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch


@contextmanager
def faster(model: Any, rows: int) -> Iterator[None]:
    """While `model` writes, in float32 on a CPU, `rows` sequences side by side from weights that do not change."""
    import torch

    with patch.object(torch, "multinomial", partial(drawn, torch.multinomial)), laid_out(model, rows):
        yield


@contextmanager
def laid_out(model: Any, rows: int) -> Iterator[None]:
    """Each linear layer's matrix a second time, as products with `rows` rows read it; other products go as before.
    Takes the memory of the weights once more."""
    import torch

    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32]
    operators: Any = getattr(torch.ops, "mkl", None)
    if not torch.backends.mkl.is_available() or not hasattr(operators, "_mkl_linear"):  # type: ignore[no-untyped-call]
        layers = []
    try:
        for layer in layers:
            weight = layer.weight.detach()
            laid = operators._mkl_reorder_linear_weight(weight, rows)
            linear = partial(_product, operators._mkl_linear, laid, weight, layer.bias, rows)
            layer.__dict__["forward"] = linear
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _product(linear: Any, laid: Any, weight: Any, bias: Any, rows: int, given: Any) -> Any:
    return linear(given, laid, weight, bias, rows)


def drawn(multinomial: Any, probabilities: Any, num_samples: int, **more: Any) -> Any:
    """As `torch.multinomial` (rows, choices) → (rows, 1), from one random number a row, by inverting the cumulated
    probabilities in float64; a choice of probability 0 is never drawn."""
    import torch

    if num_samples != 1 or more:
        return multinomial(probabilities, num_samples, **more)
    edges = probabilities.cumsum(-1, dtype=torch.float64)
    point = torch.rand(len(edges), 1, dtype=torch.float64) * edges[:, -1:]
    return torch.searchsorted(edges, point, right=True)


def with_room(keys: Any, values: Any) -> Any:
    """A cache's layer that holds these (rows, heads, tokens, width), and grows into room that is doubled when it ends,
    instead of being copied for each token."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        room: tuple[Any, ...] = (keys, values)

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            start = self.get_seq_length()
            end = start + key_states.size(-2)
            while end > self.room[0].size(-2):
                self.room = tuple(torch.cat([r, torch.empty_like(r)], -2) for r in self.room)
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

    layer: Any = Roomy()  # type: ignore[no-untyped-call]
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
