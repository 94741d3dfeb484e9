"""The contrastive loss of pairs over the global batch, whoever holds them (arXiv:2103.00020, figure 3).

Legend: B samples of the global batch, b of them at hand, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.order import Share
from pipeline.networks.exchange import rows_of_all


class Pairs(NamedTuple):
    """What the loss reads of b samples."""

    image: Float[Tensor, "b D"]
    """Features of the pictures, of length one."""
    text: Float[Tensor, "b D"]
    """Features of their captions."""
    scale: Float[Tensor, ""]
    """Inverse temperature."""
    negative: Float[Tensor, "b D"] | None = None
    """Features of the captions' hard negatives."""


Gather = Callable[[Tensor, Share], Tensor]
"""(rows of this worker's share, the share) -> those of all workers."""


class ContrastiveObjective(nn.Module, ABC):
    """A loss that compares each sample with all others of the global batch; a network's own part is ``encode``.

    ``share`` says which samples of the global batch a call brings; None: they are the batch.
    """

    share: Share | None = None

    @abstractmethod
    def encode(self, batch: Batch, random: SampleRandom) -> Pairs:
        """The features of a batch."""

    def prepare(self, batch: Batch, random: SampleRandom) -> Batch:
        """Add what depends on the captions of the whole global batch, once a step; every worker calls it."""
        del random
        return batch

    def forward(
        self, batch: Batch, random: SampleRandom, gradients: Pairs | None = None, *, encodes: bool = False
    ) -> Tensor | Pairs:
        """Mean loss of the samples; with ``gradients``, a number with these gradients by its features.

        With ``encodes`` the features: a divided network is gathered only where the objective itself is called.
        """
        pairs = self.encode(batch, random)
        if encodes:
            return pairs
        return contrastive_loss(pairs, self.share) if gradients is None else product(pairs, gradients)


def contrastive_loss(pairs: Pairs, share: Share | None = None, gather: Gather = rows_of_all) -> Float[Tensor, ""]:
    """Mean loss of b pairs among all pictures and captions of the global batch, both ways.

    With hard negatives, each picture is also told from its own: the mean of -log P(caption) against that one caption
    is added. Where a negative is the caption itself, it adds a constant and no gradient.

    Args:
        pairs: Of this worker; under autocast too, because logits near 100 have no digits left in bfloat16.
        share: This worker's share of the global batch; None: it is alone.
        gather: How the features of the others come here.
    """
    with torch.autocast(pairs.image.device.type, enabled=False):
        image, text = pairs.image.float(), pairs.text.float()
        first, images, texts = 0, image, text
        if share is not None:
            first, images, texts = share.start, gather(image, share), gather(text, share)
        own = torch.arange(first, first + len(image), device=image.device)
        by_image, by_text = pairs.scale * image @ texts.T, pairs.scale * text @ images.T
        loss = (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own)) / 2
        if pairs.negative is None:
            return loss
        margins = (image * (text - pairs.negative.float())).sum(1)
        return loss + F.softplus(-pairs.scale * margins).mean()


def gradients_of(
    parts: Sequence[Pairs], share: Share, weight: float, gather: Gather = rows_of_all
) -> tuple[Tensor, list[Pairs]]:
    """The loss of a share whose features were computed in parts, and its gradients by them, part by part.

    The features of all parts are small, and what a backward pass needs of them is large. So the parts are encoded once
    without a graph, and once more, each with its gradients (Gao et al., arXiv:2101.06983).

    Args:
        parts: Features of this worker's share, in order, without a graph.
        share: This worker's share of the global batch.
        weight: Factor of the gradients.
        gather: How the features of the others come here.
    """
    image, text, scale, negative = concatenate(parts)
    columns = (image, text, negative, scale.clone())
    tensors = [column.requires_grad_() for column in columns if column is not None]
    image, text, *negatives, scale = tensors
    loss = contrastive_loss(Pairs(image, text, scale, *negatives), share, gather)
    image_grad, text_grad, *negative_grad, scale_grad = torch.autograd.grad(
        loss * weight, tensors, allow_unused=True, materialize_grads=True
    )
    sizes = [len(part.image) for part in parts]
    rows = zip(*(grad.split(sizes) for grad in (image_grad, text_grad, *negative_grad)), strict=True)
    scales = [scale_grad if number == 0 else torch.zeros_like(scale_grad) for number in range(len(parts))]
    return loss.detach(), [Pairs(row[0], row[1], one, *row[2:]) for row, one in zip(rows, scales, strict=True)]


def concatenate(parts: Sequence[Pairs]) -> Pairs:
    """The features of all parts, in their order."""
    image, text, negative = (
        None if column[0] is None else torch.cat(column) for column in zip(*map(_rows, parts), strict=True)
    )
    assert image is not None
    assert text is not None
    return Pairs(image, text, parts[0].scale, negative)


def resized(pairs: Pairs, num_rows: int) -> Pairs:
    """As many features of the same kind, with no values, for counts."""
    image, text, negative = (None if rows is None else rows.new_empty(num_rows, rows.shape[1]) for rows in _rows(pairs))
    assert image is not None
    assert text is not None
    return Pairs(image, text, pairs.scale.detach(), negative)


def sum_of(pairs: Pairs) -> Float[Tensor, ""]:
    """Something to differentiate that costs next to nothing."""
    total = pairs.image.sum() + pairs.text.sum()
    return total if pairs.negative is None else total + pairs.negative.sum()


def no_gradients(pairs: Pairs) -> Pairs:
    """Gradients by these features that are zero."""
    image, text, scale = (torch.zeros_like(feature) for feature in pairs[:3])
    return Pairs(image, text, scale, None if pairs.negative is None else torch.zeros_like(pairs.negative))


def _rows(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor | None]:
    return pairs.image, pairs.text, pairs.negative


def product(pairs: Pairs, gradients: Pairs) -> Tensor:
    """A number with these gradients by the features."""
    products = [
        (feature.float() * gradient).sum()
        for feature, gradient in zip(pairs, gradients, strict=True)
        if feature is not None and gradient is not None
    ]
    return torch.stack(products).sum()
