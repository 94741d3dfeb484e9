"""A stage of a cascade: one network and how it is sampled. A batch enters, is denoised step by step, and leaves.

The items of a batch that enter a stage together are a chain. Chains can be joined, even at different steps: one call of
the network then advances all of them by one step. Sampling a batch advances one chain to its end; a server joins the
chains of its requests. Each item gets the same result as alone, up to the rounding of a batched matrix product.

Legend: B items of a batch; R rows of a chain, R = B, or B times the candidates of a prior.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from models.clip_config import ClipDims
from models.diffusion.config import SamplerConfig, require_steps
from models.diffusion.guidance import classifier_free
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import config_timesteps, make_step
from models.diffusion.steps import SamplerState, Step, initial_state
from models.request import SampleRequest
from models.rows import concat_rows, take_rows
from models.text import TextEncoding

Z_IMAGE, PIXELS = "z_image", "pixels"
"""Values that stages make: image embeddings (B, D) of length one, and pictures (B, 3, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class Batch:
    """Items that pass the stages together."""

    text: TextEncoding
    """B captions."""
    seeds: tuple[int, ...]
    """B seeds."""
    values: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Tensors by name, each with B rows: the results of earlier stages, and the inputs of an edit."""
    request: SampleRequest | None = None
    """Changes to the stages' settings for these items."""
    negative: TextEncoding | None = None
    """B captions that guidance leads away from; None: the empty caption."""

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, part: slice) -> Batch:
        values = {name: value[part] for name, value in self.values.items()}
        negative = None if self.negative is None else self.negative[part]
        return replace(self, text=self.text[part], seeds=self.seeds[part], values=values, negative=negative)

    def with_values(self, **values: Tensor) -> Batch:
        """The same items; ``values`` are added, or replace those of the same name."""
        return replace(self, values={**self.values, **values})


@dataclass(eq=False)
class Chain:
    """The items of a batch in one stage."""

    batch: Batch
    state: Any
    """State of the R rows after the last step."""
    timesteps: tuple[int, ...]
    """One for each step."""
    condition: Any = None
    """Input of the network: R rows, or 2R rows [uncond, cond] if they are guided."""
    noise: NoiseSource = field(default_factory=lambda: NoiseSource(()))
    """R sources."""
    guidance_scale: float = 1.0
    position: int = 0
    """Steps taken."""
    end: int = -1
    """Timestep that the last step reaches; -1 is the clean sample."""

    @property
    def finished(self) -> bool:
        """Whether every step is taken."""
        return self.position == len(self.timesteps)

    def saved(self) -> Callable[[], None]:
        """A function that puts the chain back to where it is now, so that a step that fails can be taken again.

        It may be called once, and then the chain has to be joined anew.
        """
        state, position = self.state, self.position
        noise = [(generator, generator.get_state()) for generator in self.noise.generators]

        def put_back() -> None:
            self.state, self.position = state, position
            for generator, before in noise:
                generator.set_state(before)

        return put_back


class JoinedChains(Protocol):
    """Chains that take their steps together."""

    @property
    def chains(self) -> Sequence[Chain]:
        """The chains in the order in which they were joined."""
        ...

    def advance(self) -> None:
        """Take every chain one step further; none may be finished."""
        ...


class Stage(Protocol):
    """One network and how it is sampled. Any object with these methods can be a stage of a cascade."""

    @property
    def name(self) -> str:
        """Its name among the stages, and in recipes and requests."""
        ...

    @property
    def makes(self) -> str:
        """Name of the value that it adds to a batch: ``Z_IMAGE``, ``PIXELS``, or a name of its own."""
        ...

    @property
    def side_px(self) -> int | None:
        """Side of the pictures that it makes, in pixels; None if it makes none."""
        ...

    @property
    def low_res_px(self) -> int | None:
        """Side of the pictures that it reads, in pixels; None if it reads none."""
        ...

    @property
    def dims(self) -> ClipDims | None:
        """Widths of the CLIP that it was trained with; None if it does not read CLIP's output."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """How it is sampled, for the records."""
        ...

    def eval(self) -> None:
        """Put its networks in evaluation mode."""
        ...

    def check(self, request: SampleRequest) -> None:
        """Raise ValueError if the stage does not support a setting of the request."""
        ...

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """The chain of a batch before its first step. ``noise`` has R sources; None takes those of the seeds."""
        ...

    def join(self, chains: Sequence[Chain]) -> JoinedChains:
        """Join chains of this stage, which may be at different steps, so that they advance together."""
        ...

    def preview(self, chain: Chain) -> Tensor:
        """Current x0 prediction, as a preview."""
        ...

    def leave(self, chain: Chain) -> Tensor:
        """The result of a finished chain, (B, ...)."""
        ...


class StageStep(NamedTuple):
    """One step of one stage, as a ``Watch`` receives it."""

    stage: str
    """prior, decoder, upsampler_1, upsampler_2; inversion in an edit."""
    done: int
    """Steps taken so far."""
    total: int
    """Steps of the stage."""
    x0: Tensor
    """Current x0 prediction: (B, 3, H, W) pictures in [-1, 1], (B, D) in the prior."""


Watch = Callable[[StageStep], None]


def run_stage(stage: Stage, batch: Batch, watch: Watch | None = None, noise: NoiseSource | None = None) -> Tensor:
    """Take a batch through a stage, (B, ...); ``watch`` is called after each step."""
    with torch.no_grad():
        chain = stage.enter(batch, noise)
        joined = stage.join([chain])
        while not chain.finished:
            joined.advance()
            if watch is not None:
                watch(StageStep(stage.name, chain.position, len(chain.timesteps), stage.preview(chain)))
        return stage.leave(chain)


def enter_each(stage: Stage, batches: Sequence[Batch]) -> list[Chain]:
    """The chain of each batch before its first step; those that a stage would treat alike are computed together."""
    if not isinstance(stage, DiffusionStage):
        return [stage.enter(batch) for batch in batches]
    groups: dict[Hashable, list[int]] = {}
    for number, batch in enumerate(batches):
        groups.setdefault(stage.entry_kind(batch) or number, []).append(number)
    chains: dict[int, Chain] = {}
    for numbers in groups.values():
        parts = [batches[number] for number in numbers]
        entered = [stage.enter(parts[0])] if len(parts) == 1 else _split(stage.enter(_join_batches(parts)), parts)
        chains.update(zip(numbers, entered, strict=True))
    return [chains[number] for number in range(len(batches))]


def _join_batches(batches: Sequence[Batch]) -> Batch:
    first = batches[0]
    return replace(
        first,
        text=concat_rows([batch.text for batch in batches]),
        seeds=tuple(seed for batch in batches for seed in batch.seeds),
        values={name: torch.cat([batch.values[name] for batch in batches]) for name in first.values},
        negative=concat_rows([batch.negative for batch in batches]),
    )


def _split(chain: Chain, batches: Sequence[Batch]) -> list[Chain]:
    """The part of each batch of a chain that they entered together."""
    num_items, num_rows = len(chain.batch), len(chain.noise)
    device, parts = chain.state.x.device, list[Chain]()
    for end, batch in zip(accumulate(map(len, batches)), batches, strict=True):
        rows = [row + item for row in range(0, num_rows, num_items) for item in range(end - len(batch), end)]
        halves = [*rows, *(row + num_rows for row in rows)] if chain.guidance_scale != 1.0 else rows
        parts.append(
            replace(
                chain,
                batch=batch,
                state=take_rows(chain.state, torch.tensor(rows, device=device)),
                condition=take_rows(chain.condition, torch.tensor(halves, device=device)),
                noise=NoiseSource(chain.noise.generators[row] for row in rows),
            )
        )
    return parts


@dataclass(frozen=True, eq=False)
class DiffusionStage(ABC):
    """A stage whose network denoises: the code that all such stages share."""

    network: Any
    """With ``config.diffusion``; called with (x, t, condition)."""
    sampler: SamplerConfig
    name: str

    has_guidance: ClassVar[bool] = True
    """Whether the network was also trained without its condition, which guidance needs."""

    @cached_property
    def diffusion(self) -> Diffusion:
        """The network's process."""
        return Diffusion(self.network.config.diffusion)

    @property
    def makes(self) -> str:
        """See ``Stage``."""
        return PIXELS

    @property
    def side_px(self) -> int | None:
        """See ``Stage``."""
        return self.network.config.image_px

    @property
    def low_res_px(self) -> int | None:
        """See ``Stage``."""
        return None

    @property
    def dims(self) -> ClipDims | None:
        """See ``Stage``."""
        return self.network.dims

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Stage``."""
        return asdict(self.sampler)

    @property
    def x0_variance(self) -> Tensor | None:
        """Variance of x0 for the analytic method, (T,); None if it was not measured."""
        return None

    def eval(self) -> None:
        """See ``Stage``."""
        self.network.eval()

    def check(self, request: SampleRequest) -> None:
        """See ``Stage``."""
        self._sampler(request)

    # ---- what each network defines -----------------------------------------------------------

    @abstractmethod
    def begin(self, batch: Batch, noise: NoiseSource, *, guided: bool) -> tuple[Tensor, Any]:
        """Noised samples at the first timestep, R rows, and the condition: R rows, or 2R if it is guided."""

    @abstractmethod
    def finish(self, batch: Batch, x: Tensor) -> Tensor:
        """The stage's result from its finished samples, (B, ...)."""

    def step(self, chains: Sequence[Chain], noise: NoiseSource) -> Step:
        """The sampler's step for the rows of ``chains``."""
        del chains
        return make_step(self.sampler, noise, x0_variance=self.x0_variance)

    # ---- enter, denoise, leave ---------------------------------------------------------------

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """See ``Stage``."""
        sampler = self._sampler(batch.request)
        noise = self.noise(batch.seeds) if noise is None else noise
        x, condition = self.begin(batch, noise, guided=self.has_guidance and sampler.guidance_scale != 1.0)
        timesteps = config_timesteps(sampler, self.diffusion)
        scale = sampler.guidance_scale if self.has_guidance else 1.0
        return Chain(batch, initial_state(x, self.diffusion), timesteps, condition, noise, scale)

    def entry_kind(self, batch: Batch) -> tuple[Hashable, ...]:
        """What batches have in common that may enter together; empty: this one enters alone."""
        if batch.values.keys() - {Z_IMAGE, PIXELS}:  # the inputs of an edit may have any size
            return ()
        shapes = tuple((name, value.shape[1:]) for name, value in sorted(batch.values.items()))
        return self._sampler(batch.request), shapes, batch.negative is None

    def noise(self, seeds: Sequence[int]) -> NoiseSource:
        """This stage's stream of each seed."""
        return NoiseSource.from_seeds(seeds, self.name)

    def join(self, chains: Sequence[Chain]) -> JoinedChains:
        """See ``Stage``."""
        return _JoinedDiffusion(self, chains)

    def denoiser(self, condition: Any, scales: Sequence[float]) -> Denoise:
        """The network under a condition; rows whose scale is not 1 are guided.

        Args:
            condition: [uncond of the guided rows, cond of all R rows].
            scales: R guidance scales.
        """
        network = self.network

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return network(x, t, condition)

        guided = [row for row, scale in enumerate(scales) if scale != 1.0]
        if not guided:
            return denoise
        if len(set(scales)) == 1:
            return classifier_free(denoise, scales[0])
        return classifier_free(denoise, torch.tensor([scales[row] for row in guided]), torch.tensor(guided))

    def preview(self, chain: Chain) -> Tensor:
        """See ``Stage``."""
        return chain.state.x0

    def leave(self, chain: Chain) -> Tensor:
        """See ``Stage``."""
        return self.finish(chain.batch, chain.state.x)

    def _sampler(self, request: SampleRequest | None) -> SamplerConfig:
        """The sampler after the changes that a request makes."""
        if request is None:
            return self.sampler
        sampler, scale = self.sampler, request.guidance_scale.get(self.name)
        num_steps = request.num_steps.get(self.name)
        if scale is not None:
            if not self.has_guidance:
                raise ValueError(f"guidance_scale: {self.name} has no guidance")
            sampler = replace(sampler, guidance_scale=scale)
        if num_steps is not None:
            if sampler.method == "analytic":
                raise ValueError(f"num_steps: {self.name}'s analytic sampler is measured for {sampler.num_steps} alone")
            respacing = sampler.respacing if sampler.respacing == "trailing" else ""
            sampler = replace(sampler, num_steps=num_steps, respacing=respacing)
            require_steps(sampler, self.network.config.diffusion)
        return sampler


class _JoinedDiffusion:
    """Chains of one diffusion stage; their conditions and noise sources are concatenated once for all steps."""

    def __init__(self, stage: DiffusionStage, chains: Sequence[Chain]) -> None:
        self.chains = list(chains)
        self._stage = stage
        ends = accumulate((len(chain.noise) for chain in chains), initial=0)
        self._rows = [slice(*span) for span in pairwise(ends)]
        noise = NoiseSource(generator for chain in chains for generator in chain.noise.generators)
        self._step = stage.step(chains, noise)
        scales = [chain.guidance_scale for chain in chains for _ in chain.noise.generators]
        self._denoise = stage.denoiser(_join_conditions(chains), scales)

    def advance(self) -> None:
        """See ``JoinedChains``."""
        state = concat_rows([chain.state for chain in self.chains])
        spans = [(*chain.timesteps, chain.end)[chain.position : chain.position + 2] for chain in self.chains]
        row_spans = [span for span, chain in zip(spans, self.chains, strict=True) for _ in chain.noise.generators]
        t, t_prev = (torch.tensor(column, device=state.x.device) for column in zip(*row_spans, strict=True))
        state: SamplerState = self._step(self._denoise, state, t, t_prev, self._stage.diffusion)
        for chain, rows in zip(self.chains, self._rows, strict=True):
            chain.state = take_rows(state, rows)
            chain.position += 1


def _join_conditions(chains: Sequence[Chain]) -> Any:
    """[uncond of the guided chains, cond of all chains]."""
    if len(chains) == 1:
        return chains[0].condition
    uncond: list[Any] = []
    cond: list[Any] = []
    for chain in chains:
        count = len(chain.noise)
        if chain.guidance_scale == 1.0:
            cond.append(chain.condition)
        else:
            uncond.append(take_rows(chain.condition, slice(count)))
            cond.append(take_rows(chain.condition, slice(count, None)))
    return concat_rows([*uncond, *cond])
