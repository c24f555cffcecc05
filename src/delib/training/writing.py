"""What has `generate` write faster on a CPU, in float32, from the same distribution.

Three things that it does for each token and need not: matrices laid out anew for each product, a random number for each
entry of the vocabulary, a cache that is copied whole (docs/results.md has what each is worth). The products are of an
operator that torch's own compiler uses for frozen weights on Intel's library; where it is not there, nothing is laid
out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
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

    operators: Any = getattr(torch.ops, "mkl", None)
    layers = []
    if torch.backends.mkl.is_available() and hasattr(operators, "_mkl_linear"):  # type: ignore[no-untyped-call]
        linear = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32]
        layers = [m for m in linear if "forward" not in m.__dict__]  # one that something else wrapped stays so
    try:
        for layer in layers:
            weight = layer.weight.detach()
            laid = operators._mkl_reorder_linear_weight(weight, rows)
            layer.__dict__["forward"] = partial(_product, operators._mkl_linear, laid, weight, layer.bias, rows)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _product(linear: Any, laid: Any, weight: Any, bias: Any, rows: int, given: Any) -> Any:
    return linear(given, laid, weight, bias, rows)


def drawn(multinomial: Any, probabilities: Any, num_samples: int, *more: Any, **named: Any) -> Any:
    """As `torch.multinomial` (rows, choices) → (rows, 1), from one random number a row, by inverting the cumulated
    probabilities in float64; a choice of probability 0 is never drawn. What else it is asked, and what it refuses, is
    torch's."""
    import torch

    if num_samples != 1 or more or named or probabilities.dim() != 2:
        return multinomial(probabilities, num_samples, *more, **named)
    edges = probabilities.cumsum(-1, dtype=torch.float64)
    whole = edges[:, -1:]
    if not (whole.isfinite() & (whole > 0)).all():
        return multinomial(probabilities, num_samples)
    return torch.searchsorted(edges, torch.rand(len(edges), 1, dtype=torch.float64) * whole, right=True)


def with_room(keys: Any, values: Any, tokens: int) -> Any:
    """A cache's layer that holds these (rows, heads, tokens, width) and has room for so many tokens more, which are
    written there instead of copying all. Past the room, or cut or put in another order, it copies as others do."""
    import torch

    layer = _roomy()()
    layer.lazy_initialization(keys, values)
    held = keys.size(-2)
    layer.room = [torch.empty(*t.shape[:2], held + tokens, t.size(-1), dtype=t.dtype) for t in (keys, values)]
    for room, known in zip(layer.room, (keys, values), strict=True):
        room[..., :held, :] = known
    layer.keys, layer.values = (room[..., :held, :] for room in layer.room)
    return layer


@cache
def _roomy() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        keys: Any
        room: list[Any]

        def update(self, key_states: Any, value_states: Any, *more: Any, **named: Any) -> tuple[Any, Any]:
            start = self.get_seq_length()
            end = start + key_states.size(-2)
            inside = start and self.keys.data_ptr() == self.room[0].data_ptr()
            if not inside or end > self.room[0].size(-2):
                return super().update(key_states, value_states, *more, **named)
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[..., start:end, :] = new
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

    return Roomy
