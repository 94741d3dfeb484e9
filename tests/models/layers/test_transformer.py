"""The causal transformer: what a token may read, and the cache."""

import pytest
import torch

from models.layers.transformer import CausalTransformer, KeysValues, causal_mask


def make(dropout: float = 0.0) -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(width=16, depth=3, num_heads=4, mlp_ratio=2, dropout=dropout).eval()


def test_weights_start_as_those_of_clips_text_tower() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(width=64, depth=8, num_heads=4, mlp_ratio=4, dropout=0.0)
    for name, std in (
        ("query", 1 / 8),
        ("key_value", 1 / 8),
        ("mlp_in", 128**-0.5),
        ("out", 1 / 32),
        ("mlp_out", 1 / 32),
    ):
        weights = torch.cat([getattr(block, name).weight.flatten() for block in model.blocks])
        assert weights.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("silent", ["out", "mlp_out"])
def test_dropout_spares_neither_branch_and_is_off_outside_training(silent: str) -> None:
    model, x, mask = make(dropout=0.5), torch.randn(1, 3, 16), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    for block in model.blocks:
        torch.nn.init.zeros_(getattr(block, silent).weight)
    assert torch.equal(model(x, mask), model(x, mask))
    model.train()
    assert not torch.allclose(model(x, mask), model(x, mask))


def test_causal_mask_shows_earlier_valid_tokens_only() -> None:
    valid = torch.tensor([[True, True, False]])
    mask = causal_mask(valid, 2, num_appended=1)
    assert mask[0, 0].tolist() == [[True, True, False, False], [True, True, False, True]]


def test_forward_does_not_read_later_tokens() -> None:
    model = make()
    x = torch.randn(2, 6, 16)
    mask = causal_mask(torch.ones(2, 6, dtype=torch.bool), 6)
    changed = x.clone()
    changed[:, 4:] *= -1
    before, after = model(x, mask), model(changed, mask)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(-1).min() > 1e-3


def test_forward_does_not_read_masked_tokens() -> None:
    model = make()
    x = torch.randn(2, 6, 16)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[:, 2] = False
    changed = x.clone()
    changed[:, 2] *= -1
    before, after = model(x, causal_mask(valid, 6)), model(changed, causal_mask(valid, 6))
    assert torch.equal(before[:, 3:], after[:, 3:])
    unmasked = model(changed, causal_mask(torch.ones_like(valid), 6))
    assert (unmasked[:, 3:] - before[:, 3:]).abs().amax(-1).min() > 1e-3


def test_num_out_gives_the_last_tokens_of_the_whole_output() -> None:
    model = make()
    x = torch.randn(2, 6, 16)
    mask = causal_mask(torch.ones(2, 6, dtype=torch.bool), 6)
    torch.testing.assert_close(model(x, mask, num_out=1), model(x, mask)[:, -1:], rtol=0, atol=1e-6)


def test_cache_gives_the_same_as_one_pass() -> None:
    model = make()
    x = torch.randn(2, 7, 16)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 1] = False
    whole = model(x, causal_mask(valid, 7))
    first = model.cache(x[:, :3], causal_mask(valid[:, :3], 3))
    second = model.cache(x[:, 3:5], causal_mask(valid[:, :5], 2), first)
    assert isinstance(second[0], KeysValues)
    last = model(x[:, 5:], causal_mask(valid, 2), second)
    torch.testing.assert_close(last, whole[:, 5:], rtol=0, atol=1e-6)


def test_checkpointing_changes_no_gradient() -> None:
    x = torch.randn(2, 5, 16)
    mask = causal_mask(torch.ones(2, 5, dtype=torch.bool), 5)
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        model.checkpointing = checkpointing
        model(x, mask, num_out=1).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
