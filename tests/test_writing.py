"""What has `generate` write faster: the same products, the same cache, the same distribution."""

import re
from typing import Any

import pytest

import tiny
from delib.training import writing


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the second's attention has biases
def test_products_are_the_same_and_of_the_weights_as_they_are(family, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    if not torch.backends.mkl.is_available():
        pytest.skip("torch without MKL lays nothing out")
    tiny.save(tmp_path / "model", family, "gpt-2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(12).reshape(4, 3)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert any(layer.bias is not None for layer in layers) == (family == "qwen2")
    for layer in layers:
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    used: list[tuple[int, int]] = []

    def product(linear: Any, laid: Any, weight: Any, bias: Any, rows: int, given: Any) -> Any:
        used.append((rows, given.numel() // given.size(-1)))
        return linear(given, laid, weight, bias, rows)

    def close(found: Any, expected: Any) -> bool:
        return bool((found - expected).norm() < 1e-6 * expected.norm())

    monkeypatch.setattr(writing, "_product", product)
    with torch.no_grad():
        for _ in range(2):
            with writing.laid_out(model, 12):
                found, fewer = model(ids).logits, model(ids[:, :1]).logits  # 12 rows, and 4, which go as before
            assert used == [(12, 12)] * len(layers) + [(12, 4)] * len(layers)
            assert close(found, model(ids).logits) and close(fewer, model(ids[:, :1]).logits)
            assert len(used) == 2 * len(layers)
            layers[0].weight.mul_(2.0)
            assert not close(found, model(ids).logits)
            used.clear()


def test_afterwards_all_is_as_it_was(tmp_path):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).bfloat16())
    wrapped = model[1].forward = lambda given: given
    multinomial = torch.multinomial
    with pytest.raises(RuntimeError, match="cut off"), writing.faster(model, 4):
        assert torch.multinomial is not multinomial and model[1].forward is wrapped
        assert ("forward" in model[0].__dict__) == torch.backends.mkl.is_available()
        assert "forward" not in model[2].__dict__
        raise RuntimeError("cut off")
    assert torch.multinomial is multinomial and model[1].forward is wrapped
    assert "forward" not in model[0].__dict__


def test_draws_have_their_probabilities_and_a_seed(monkeypatch):
    import torch

    draws = 40_000
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    torch.manual_seed(0)
    found = writing.drawn(torch.multinomial, probabilities.expand(draws, -1), num_samples=1)
    assert found.shape == (draws, 1)
    shares = found.flatten().bincount(minlength=7) / draws
    spread = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((shares - probabilities).abs() <= 4 * spread).all()  # 0 where the probability is
    torch.manual_seed(0)
    assert torch.equal(found, writing.drawn(torch.multinomial, probabilities.expand(draws, -1), num_samples=1))
    points = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)  # what `rand` gives at most is the last
    monkeypatch.setattr(torch, "rand", lambda *_, **__: points)
    rare = torch.tensor([0.0, 0.5, 1e-9, 0.5, 0.0]).expand(3, -1)  # lost in float32 beside 0.5
    assert writing.drawn(torch.multinomial, rare, 1).flatten().tolist() == [1, 2, 3]


def test_what_else_is_asked_of_a_draw_is_torchs():
    import torch

    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    several = writing.drawn(torch.multinomial, probabilities, 3)
    assert [sorted(row) for row in several.tolist()] == [[0, 1, 2]] * 2
    assert writing.drawn(torch.multinomial, probabilities[0], 1).shape == (1,)
    assert writing.drawn(torch.multinomial, probabilities, 1, True).shape == (2, 1)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match=re.escape("either `inf`, `nan`")):
            writing.drawn(torch.multinomial, torch.tensor([[0.5, broken], [0.5, 0.5]]), 1)
    with pytest.raises(RuntimeError, match="sum of probabilities <= 0"):
        writing.drawn(torch.multinomial, torch.tensor([[0.0, 0.0], [0.5, 0.5]]), 1)


def test_a_cache_with_room_holds_what_one_without_holds():
    import torch
    from transformers.cache_utils import DynamicLayer

    torch.manual_seed(0)
    first = torch.randn(2, 3, 2, 5, 4)
    plain: Any = DynamicLayer()
    plain.update(*first)
    roomy = writing.with_room(*first, 4)
    assert roomy.get_seq_length() == 5

    def grow(tokens: int) -> bool:
        """Whether the new tokens were written into the room."""
        new, before = torch.randn(2, len(plain.keys), 2, tokens, 4), roomy.keys.data_ptr()
        for found, expected in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)
        return roomy.keys.data_ptr() == before

    assert [grow(tokens) for tokens in (1, 1, 2, 1, 1)] == [True, True, True, False, False]
    roomy = writing.with_room(plain.keys, plain.values, 40)
    for change in (
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.crop(-3),
        lambda layer: layer.reset(),
    ):
        change(roomy)
        change(plain)
        if plain.keys is not None:
            grow(1)
    plain.update(*first)
    assert all(torch.equal(a, b) for a, b in zip(roomy.update(*first), (plain.keys, plain.values), strict=True))
