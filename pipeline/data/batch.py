"""A batch of samples, and its captions encoded by the frozen CLIP.

Legend: B samples of one worker's share of a batch, D features, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.rows import concat_rows
from models.text import TextEncoding, padded_length
from pipeline.data.token_states import PackedText

TextEncoder = Callable[[Sequence[str]], TextEncoding]


@dataclass(frozen=True)
class Batch:
    """B samples; a field that a training does not read is None."""

    uids: Sequence[str]
    """Often not yet read: a training needs them only to name a sample."""
    captions: tuple[str, ...]
    images: Tensor | None = None
    """uint8 (B, H, W, 3)."""
    z_image: Tensor | None = None
    """(B, D) in float16, as stored, or in float32, of length one; ``require_z_image`` gives the second."""
    negatives: tuple[str, ...] | None = None
    """Hard negatives of the captions."""
    text: PackedText | None = None
    """The captions as the embed step encoded them, if it stored that."""

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        tensors = sum(tensor.nbytes for tensor in (self.images, self.z_image) if tensor is not None)
        return tensors + (0 if self.text is None else self.text.num_bytes)

    def rows(self, part: slice) -> Batch:
        """Some of the samples; shares their memory."""
        return replace(
            self,
            uids=self.uids[part],
            captions=self.captions[part],
            images=None if self.images is None else self.images[part],
            z_image=None if self.z_image is None else self.z_image[part],
            negatives=None if self.negatives is None else self.negatives[part],
            text=None if self.text is None else self.text.rows(part),
        )

    def encoded(self, encode: TextEncoder) -> TextEncoding:
        """The captions as the frozen CLIP encodes them: stored, or else by ``encode``."""
        return encode(self.captions) if self.text is None else self.text.encoding()

    def require_images(self) -> Tensor:
        """The pictures, for a training that reads them."""
        assert self.images is not None
        return self.images

    def require_z_image(self) -> Tensor:
        """The image embeddings, float32 (B, D) of length one, for a training that reads them.

        They are made where the batch is: the reader would take longer for that than for all else, and send twice the
        bytes to a GPU.
        """
        assert self.z_image is not None
        return self.z_image if self.z_image.dtype == torch.float32 else normalize(self.z_image.float(), dim=-1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        tensors = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in (("images", self.images), ("z_image", self.z_image))
            if tensor is not None
        }
        return replace(self, **tensors, text=None if self.text is None else self.text.to(device))


class CaptionTable:
    """Captions encoded by the frozen CLIP: all at once if they are few, else batch by batch.

    One fixed order of encoding gives bit-identical encodings, whichever step a run resumes from.

    Args:
        encode: The text tower, under ``torch.no_grad``.
        captions: Every caption of the training, sorted; None encodes each batch when it is requested.
        batch_size: Captions encoded at a time.
    """

    def __init__(self, encode: TextEncoder, captions: Sequence[str] | None, *, batch_size: int = 256) -> None:
        self._encode = encode
        self._row_of: dict[str, int] = {}
        self._table: TextEncoding | None = None
        if captions:
            parts = [encode(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size)]
            self._table = concat_rows(parts)
            self._row_of = {caption: row for row, caption in enumerate(captions)}

    def __call__(self, captions: Sequence[str]) -> TextEncoding:
        """Encode captions, cut to the length of the longest (rounded up to a multiple of 8 tokens)."""
        table = self._table
        if table is None or any(caption not in self._row_of for caption in captions):
            return self._encode(captions)
        rows = torch.tensor([self._row_of[caption] for caption in captions], device=table.mask.device)
        text: Any = table[rows]
        length = padded_length(int(text.mask.sum(1).max()), text.mask.shape[1])
        return TextEncoding(text.pooled, text.hidden[:, :length], text.mask[:, :length], text.tokens[:, :length])
