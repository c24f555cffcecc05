"""What has `generate` write faster: the same products, the same cache, the same distribution."""

from typing import Any

import pytest

import tiny
from delib.training import writing


@pytest.fixture
def model(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    tiny.save(tmp_path / "model", "llama", "gpt-2")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)


def test_products_are_the_same_and_follow_the_weights_afterwards(model):
    import torch

    if not torch.backends.mkl.is_available():
        pytest.skip("torch without MKL lays nothing out")
    used, torch_linear = [], writing._product
    ids = torch.arange(12).reshape(4, 3)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert layers and not any("forward" in layer.__dict__ for layer in layers)

    def product(*given: Any) -> Any:
        used.append(given[-1].reshape(-1, given[-1].size(-1)).size(0))
        return torch_linear(*given)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        expected = model(ids).logits
        patched.setattr(writing, "_product", product)
        with writing.laid_out(model, 12):
            found, fewer = model(ids).logits, model(ids[:, :1]).logits  # 12 rows, and 4, which go as before
        assert len(used) == 2 * len(layers) and set(used) == {4, 12}
        assert (found - expected).norm() < 1e-6 * expected.norm()
        assert (fewer - model(ids[:, :1]).logits).norm() < 1e-6 * fewer.norm()
        layers[0].weight.mul_(2.0)
        assert (model(ids).logits - expected).norm() > 1e-3 * expected.norm()
    with pytest.raises(RuntimeError, match="cut off"), writing.faster(model, 4):
        raise RuntimeError("cut off")
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert torch.multinomial.__module__ != writing.__name__


def test_draws_have_their_probabilities_and_a_seed():
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
    several = writing.drawn(torch.multinomial, probabilities[1:].expand(2, -1), 3)
    assert several.shape == (2, 3) and all(len(set(row)) == 3 for row in several.tolist())


def test_a_cache_with_room_holds_what_one_without_holds():
    import torch
    from transformers.cache_utils import DynamicLayer

    torch.manual_seed(0)
    first = torch.randn(2, 3, 2, 5, 4)
    plain = DynamicLayer()
    plain.update(*first)
    roomy = writing.with_room(*first)
    assert roomy.get_seq_length() == 5
    for tokens in (1, 1, 20, 1, 1, 1):
        new = torch.randn(2, 3, 2, tokens, 4)
        for found, expected in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)
