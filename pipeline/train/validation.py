"""Validation of a network in training: its loss and its measures on the first rows of the split.

Rows, timesteps and noise follow from the seed of the training, so every process computes the same numbers of the same
weights, to rounding on its device.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.diffusion.noise import derive_seed
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.samples import Samples
from pipeline.grid import Block, draw_grid
from pipeline.networks.files import CONFIG, config_content, create_network
from pipeline.networks.measuring import NUM_EMBEDDINGS, ValidationRows, num_pictures
from pipeline.networks.tensor_file import read_tensors
from pipeline.pictures.png import to_png
from pipeline.train.assemble import TrainJob, in_memory_order, load_frozen, samples_of, text_encoder
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.results import write_result
from pipeline.train.resume import checkpoint_name

if TYPE_CHECKING:
    from pipeline.clip.frozen import FrozenText

_LOSS_ROWS = 128
_CELL_PX = 96


class Validation:
    """Loss and measures of one training, with the same seeds at every call.

    Args:
        job: The training.
        clip: The frozen CLIP of ``load_frozen``, with its image tower for a kind that measures pictures.
        samples: The validation rows.
    """

    def __init__(self, job: TrainJob, clip: FrozenText | None, samples: Samples) -> None:
        self._job, self._clip, self._samples = job, clip, samples

    @staticmethod
    def alone(job: TrainJob) -> Validation:
        """A validation that shares nothing with a training in the same process."""
        return Validation(job, load_frozen(job, with_images=job.kind.measures_pictures), samples_of(job, "validation"))

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, float]:
        """``val_loss`` and the measures of the kind as ``val_<name>``; nothing if there are no validation rows."""
        rows = self._samples.first(_LOSS_ROWS)
        if rows is None:
            return {}
        measure = self._job.kind.measure
        measures = {} if measure is None else measure(network, self._metric_rows)
        return {"val_loss": self._loss(network, rows)} | {f"val_{name}": value for name, value in measures.items()}

    def write(self, network: nn.Module, step: int) -> None:
        """Validate the average of a step, and write its result and its grid."""
        measures = self(network)
        write_result(self._job.output, step, measures, self._grid(step) if measures else b"")

    def network(self, weights: dict[str, Tensor], content: dict[str, Any]) -> nn.Module:
        """The network of the training with these weights, to be validated.

        Args:
            weights: Its weights.
            content: Its config.json: data may have decided about its shape.
        """
        network = in_memory_order(self._job.kind, create_network(content, self._job.output.uri))
        network.load_state_dict(weights)
        # torch chooses other kernels, and rounds otherwise, for weights that may get gradients: an average gets none.
        return network.to(self._job.device).eval().requires_grad_(requires_grad=False)

    @cached_property
    def _metric_rows(self) -> ValidationRows:
        job = self._job
        image_px: int = getattr(job.section.model, "image_px", 0)
        rows = self._samples.first(num_pictures(image_px) if job.kind.pictures else NUM_EMBEDDINGS)
        assert rows is not None
        return ValidationRows(rows.to(job.device), self._clip, job.seed)

    def _grid(self, step: int) -> bytes:
        """The pictures that the measures have just sampled, each beside the true one; nothing if there are none."""
        rows = self._metric_rows
        if not rows.shown:
            return b""
        pairs = zip(rows.batch.require_images().cpu().numpy(), rows.shown[0].cpu().numpy(), strict=True)
        blocks = [
            Block(pair, caption, ("true", "sampled")) for pair, caption in zip(pairs, rows.batch.captions, strict=True)
        ]
        page = draw_grid(blocks, columns=2, cell_px=_CELL_PX, title=f"{self._job.name}, step {step}")
        return to_png(page)

    def _loss(self, network: nn.Module, rows: Batch) -> float:
        # The captions are encoded here and not taken from the training's table, in which others stand beside them.
        objective = self._job.kind.objective(network, text_encoder(self._clip)).eval()
        size = self._job.section.train.batch_size
        random = SampleRandom.of_samples(derive_seed(self._job.seed, "validation"), range(len(rows)))
        total = 0.0
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            batch = rows.rows(part).to(self._job.device)
            total += float(objective(batch, random.rows(part))) * len(batch)
        return total / len(rows)


def validate_beside(job: TrainJob, step: int) -> bool:
    """Validate a checkpoint of a training that goes on, or at the last step its finished network; write the result.

    Returns:
        Whether there was one: an old checkpoint may be gone.

    Raises:
        DamagedCheckpointError: If the checkpoint is not whole.
    """
    output = job.output
    if step == job.section.train.total_steps:
        files = [name for name in output.names() if "/" not in name and name.endswith(".safetensors")]
        weights = read_tensors(output.path(files[0]))
        content = output.read_json(CONFIG) if output.exists(CONFIG) else config_content(job.section.model, None)
    elif output.exists(checkpoint_name(step)):
        checkpoint = Checkpoint(output, checkpoint_name(step))
        weights, content = checkpoint.read("ema"), checkpoint.network
    else:
        return False
    validation = Validation.alone(job)
    validation.write(validation.network(weights, content), step)
    return True
