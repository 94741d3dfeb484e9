"""Validation of a network in training: its loss and its measures on the first rows of the split."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from models.diffusion.noise import derive_seed
from models.sample_random import SampleRandom
from pipeline.data.batches import Batch
from pipeline.networks.measuring import NUM_EMBEDDINGS, ValidationRows, num_pictures
from pipeline.train.assemble import Parts, TrainJob

_LOSS_ROWS = 128


class Validation:
    """Loss and measures of one training, with the same seeds at every call.

    Args:
        job: The training.
        parts: Its parts.
    """

    def __init__(self, job: TrainJob, parts: Parts) -> None:
        self._job = job
        self._parts = parts

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, float]:
        """``val_loss`` and the measures of the kind as ``val_<name>``; nothing if there are no validation rows."""
        rows = self._parts.validation.first(_LOSS_ROWS)
        if rows is None:
            return {}
        measure = self._job.kind.measure
        measures = {} if measure is None else measure(network, self._metric_rows)
        return {"val_loss": self._loss(network, rows)} | {f"val_{name}": value for name, value in measures.items()}

    @cached_property
    def _metric_rows(self) -> ValidationRows:
        job, parts = self._job, self._parts
        image_px: int = getattr(job.section.model, "image_px", 0)
        rows = parts.validation.first(num_pictures(image_px) if job.kind.pictures else NUM_EMBEDDINGS)
        assert rows is not None
        return ValidationRows(rows.to(job.device), parts.clip, job.seed)

    def _loss(self, network: nn.Module, rows: Batch) -> float:
        objective, size = self._parts.objective(network).eval(), self._job.section.train.batch_size
        random = SampleRandom.of_samples(derive_seed(self._job.seed, "validation"), range(len(rows)))
        total = 0.0
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            batch = rows.rows(part).to(self._job.device)
            total += float(objective(batch, random.rows(part))) * len(batch)
        return total / len(rows)
