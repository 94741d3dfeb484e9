"""The contrastive loss of one worker; of several, and in parts: tests/train/test_layouts.py."""

import torch
import torch.nn.functional as F

from pipeline.networks.contrast import Pairs, contrastive_loss


def _pairs(scale: float, dtype: torch.dtype = torch.float32) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    image, text = (F.normalize(torch.randn(3, 4, generator=generator), dim=-1).to(dtype) for _ in range(2))
    return Pairs(image, text, torch.tensor(scale))


def test_contrastive_loss_is_the_mean_of_both_ways() -> None:
    pairs = _pairs(14.0)
    logits = 14 * pairs.image @ pairs.text.T
    rows = -sum(logits[i, i] - logits[i].logsumexp(0) for i in range(3)) / 3
    columns = -sum(logits[i, i] - logits[:, i].logsumexp(0) for i in range(3)) / 3
    torch.testing.assert_close(contrastive_loss(pairs), (rows + columns) / 2)


def test_contrastive_loss_has_its_logits_in_full_precision() -> None:
    pairs = _pairs(100.0, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = contrastive_loss(pairs)
    logits, own = 100 * pairs.image.float() @ pairs.text.float().T, torch.arange(3)
    torch.testing.assert_close(actual, (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
