"""The autoregressive prior: its components and buckets, its loss, its measures and its cost.

arXiv:2204.06125, section 2.2. Legend: B samples, D features, K components, V buckets.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ar_prior.buckets import DotHistogram
from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import iterate_embeddings
from models.ar_prior.stage import ArPriorStage
from models.clip_config import ClipDims
from models.layers.transformer import TokenCache
from models.pca import PcaSums
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch, TextEncoder
from pipeline.data.vectors import VECTOR_COLUMNS, training_batches
from pipeline.errors import ConfigError, DataError
from pipeline.networks.counting import Work, count, first_steps, full_captions
from pipeline.networks.kind import NetworkKind
from pipeline.networks.measuring import COSINES_TO_CAPTIONS, ValidationRows, cosines_to_captions
from pipeline.workspace.store import Artifact

MEASURED_ROWS = 200_000
"""About how many rows components and buckets are measured from: whole shards, evenly spaced; where shards have more
rows than that, such as parts of imported embeddings, the first one alone."""


class ArPriorObjective(nn.Module):
    """Cross entropy of the components of z_image; captions are dropped at random.

    Args:
        network: The prior, after ``set_code``.
        encode_text: The frozen CLIP's text tower.
    """

    def __init__(self, network: ArPrior, encode_text: TextEncoder) -> None:
        super().__init__()
        self.network = network
        self._encode_text = encode_text

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        """Mean loss of the batch, in nats per component."""
        network, z_image = self.network, batch.require_z_image()
        text = batch.encoded(self._encode_text)
        drop_prob = network.config.text_drop_prob
        keep = random.keep("text", drop_prob, z_image.device) if self.training else None
        tokens = network.tokenize(z_image)
        dot = network.dot_tokens(z_image, text.z_text, keep)
        logits = network(tokens, dot, network.encode_condition(text, keep=keep))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def build_ar_prior(config: ArPriorConfig, dims: ClipDims, embed: Artifact, *, max_rows: int = MEASURED_ROWS) -> ArPrior:
    """A prior with random weights, and components and buckets measured on training rows.

    Args:
        config: Shape; if ``num_components`` is 0, it is measured.
        dims: CLIP's widths.
        embed: The embed step.
        max_rows: About how many rows are read.

    Raises:
        ConfigError: If ``num_components`` is above the number of features.
        DataError: If there are fewer than two training rows, or a shard is damaged.
    """
    if config.num_components > dims.embed_dim:
        raise ConfigError(f"model.num_components is {config.num_components}, but z_image has {dims.embed_dim} features")
    sums, dots = measure_embeddings(embed, dims.embed_dim, max_rows)
    try:
        pca = sums.pca()
    except ValueError as error:
        raise DataError(f"{embed.uri}: {error}") from error
    pca = pca.keep(config.num_components) if config.num_components else pca.keep_by_energy(config.max_pca_error)
    network = ArPrior(replace(config, num_components=len(pca.components)), dims)
    network.set_code(pca, dots.edges(config.num_dot_buckets))
    return network


def measure_embeddings(embed: Artifact, num_features: int, max_rows: int) -> tuple[PcaSums, DotHistogram]:
    """Sums and counts over training rows, always of the same shards.

    Memory grows with the widths (D x D sums) and a batch of rows, but not with the rows of a shard: a part of imported
    embeddings may have a million (see ``training_batches``).

    Raises:
        DataError: If a shard is damaged.
    """
    records = embed.shard_records()
    every = max(1, sum(record.counts.get("ok", 0) for record in records.values()) // max_rows)
    sums, dots = PcaSums(num_features), DotHistogram()
    for shard in sorted(records)[::every]:
        for z_image, z_text in training_batches(embed.path(f"{shard}.parquet"), VECTOR_COLUMNS):
            sums.update(torch.from_numpy(z_image))
            dots.update((torch.from_numpy(z_image) * torch.from_numpy(z_text)).sum(1))
    return sums, dots


def _measure(prior: ArPrior, rows: ValidationRows) -> dict[str, float]:
    *_, z_image = iterate_embeddings(prior, rows.text, rows.noise(), TokenSamplerConfig())
    return cosines_to_captions(z_image, rows)


def _work(prior: ArPrior, _clip: object) -> Work:
    """If the data decide the number of components, the cost is that of all of them."""
    config, calls = prior.config, prior.num_components
    caches: list[TokenCache] = []

    def run(size: int) -> Tensor:
        tokens = torch.zeros(size, calls, dtype=torch.int64)
        condition = prior.encode_condition(full_captions(prior.dims, size))
        return prior(tokens, first_steps(size), condition).sum()

    with torch.no_grad():
        before = count(lambda: caches.append(prior.start(prior.encode_condition(full_captions(prior.dims, 1)))))
        flops = before + calls * count(lambda: prior.next_logits(caches[0], first_steps(1), first_steps(1)))
    sequences = config.num_candidates * (1 if config.sampler.guidance_scale == 1 else 2)
    return Work(run, flops * sequences, calls)


AR_PRIOR = NetworkKind(
    name="ar_prior",
    config=ArPriorConfig,
    create=ArPrior,
    objective=ArPriorObjective,
    work=_work,
    measure=_measure,
    measures=COSINES_TO_CAPTIONS,
    stage=lambda name, networks: ArPriorStage.of(networks[name], name),
    embeddings=True,
    captions=True,
    create_on_data=build_ar_prior,
    meaning=("bucket_range_std",),
)
