"""The cascade: caption -> z_image -> small picture -> larger pictures. arXiv:2204.06125, section 2.

A cascade is a tuple of stages (models/stage.py). Every item has its own seed, and every stage its own noise stream of
that seed: a picture depends on its caption, its seed and the settings, and not on the other items of its batch.

Legend: B items, D joint space, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.clip_config import ClipDims
from models.pixels import to_uint8
from models.request import SampleRequest
from models.rows import map_rows
from models.stage import PIXELS, Z_IMAGE, Batch, Stage, Watch, run_stage
from models.text import TextEncoding

_Stage = TypeVar("_Stage", bound=Stage)


class TextEncoder(Protocol):
    """The part of the frozen CLIP that sampling needs (pipeline.clip.frozen.FrozenClip)."""

    @property
    def dims(self) -> ClipDims:
        """Widths of the text tower."""
        ...

    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        """Encode captions."""
        ...


@dataclass(frozen=True, eq=False)
class Phase:
    """Items of a request that pass the same stages.

    A request has one phase, or several, each made from the results of the one before.
    """

    num_items: int
    stages: tuple[Stage, ...]
    batch: Callable[[], Batch]
    """Computes the items before the first stage: embeddings of captions and pictures."""
    then: Callable[[Mapping[str, Tensor]], Phase] | None = None
    """The next phase, from the values of these items after their last stage; None: they are the answer."""


@dataclass(frozen=True)
class CascadeResult:
    """Results of the stages, item by item."""

    values: Mapping[str, Tensor]
    """Results by name; if several stages make one, that of the last."""
    pictures: Mapping[str, UInt8[Tensor, "B H W 3"]]
    """Pictures by the stage that made them, smallest first, on the CPU."""

    @property
    def z_image(self) -> Float[Tensor, "B D"]:
        """Image embeddings; KeyError if no stage makes them."""
        return self.values[Z_IMAGE]

    @property
    def images(self) -> UInt8[Tensor, "B H W 3"]:
        """The largest pictures."""
        return list(self.pictures.values())[-1]


class Cascade:
    """Stages and the CLIP that reads their captions, ready to sample.

    Args:
        clip: The frozen CLIP.
        stages: In the order in which a batch passes them.
        micro_batch: Largest number of items in a stage at a time, which bounds its memory; guidance and candidates
            multiply it.

    Raises:
        ValueError: If a stage was made for another CLIP or another size of pictures, or two share a name.
    """

    def __init__(self, clip: TextEncoder, stages: Sequence[Stage], *, micro_batch: int = 64) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch = {micro_batch}: at least 1")
        before_px: int | None = None
        for stage in stages:
            if stage.dims not in {None, clip.dims}:
                raise ValueError(f"the {stage.name} was made for {stage.dims}, but this CLIP has {clip.dims}")
            if stage.low_res_px is not None and stage.low_res_px != before_px:
                raise ValueError(f"{stage.name} starts from {stage.low_res_px} px, but gets {before_px or 'no'} px")
            before_px = before_px if stage.side_px is None else stage.side_px
            stage.eval()
        self.clip = clip
        self.stages = tuple(stages)
        self.micro_batch = micro_batch
        if len({stage.name for stage in stages}) < len(stages):
            raise ValueError(f"two stages have one name: {[stage.name for stage in stages]}")

    def stage(self, name: str, kind: type[_Stage]) -> _Stage:
        """The stage of a name.

        Raises:
            ValueError: If there is none, or it is of another kind.
        """
        for stage in self.stages:
            if stage.name == name and isinstance(stage, kind):
                return stage
        kinds = ", ".join(f"{stage.name} ({type(stage).__name__})" for stage in self.stages)
        raise ValueError(f"this cascade has no {kind.__name__} {name}; it has {kinds}")

    def after(self, value: str) -> tuple[Stage, ...]:
        """The stages after the last one that makes ``value``; all of them if none makes it."""
        last = max((number for number, stage in enumerate(self.stages) if stage.makes == value), default=-1)
        return self.stages[last + 1 :]

    def stages_of(self, request: SampleRequest) -> tuple[Stage, ...]:
        """The stages that a request passes: up to the first whose pictures have the requested side.

        Raises:
            ValueError: If the cascade's pictures are smaller.
        """
        largest_px = max(self.sides_px.values(), default=0)
        if request.side_px > largest_px:
            raise ValueError(f"side_px = {request.side_px}: this cascade ends at {largest_px} px")
        return up_to(self.stages, request.side_px)

    def phase_of(self, request: SampleRequest) -> Phase:
        """A request for pictures of its prompt alone, before the first stage.

        Raises:
            ValueError: If the request cannot be met; see ``check``.
        """
        self.check(request)
        return Phase(len(request.seeds), self.stages_of(request), lambda: self.batch_of(request))

    def batch_of(self, request: SampleRequest, seeds: Sequence[int] | None = None) -> Batch:
        """The items of a request before the first stage; ``seeds`` are some of its own (all of them if None)."""
        seeds = request.seeds if seeds is None else tuple(seeds)
        text = self.clip.encode_text([request.prompt])
        negative = self.clip.encode_text([request.negative_prompt]) if request.negative_prompt else None

        def repeat(row: Tensor) -> Tensor:
            return row.expand(len(seeds), *row.shape[1:])  # in the memory of one

        return Batch(map_rows(text, repeat), tuple(seeds), request=request, negative=map_rows(negative, repeat))

    @property
    def settings(self) -> dict[str, Any]:
        """How each stage is sampled, for the records."""
        return {stage.name: stage.settings for stage in self.stages}

    @property
    def sides_px(self) -> dict[str, int]:
        """Side of the pictures of each stage that makes them, smallest first."""
        return {stage.name: stage.side_px for stage in self.stages if stage.side_px is not None}

    def check(self, request: SampleRequest, stages: Sequence[Stage] | None = None) -> None:
        """Raise ValueError if a request names an unknown stage, or a setting that its stage does not support.

        Args:
            request: The request.
            stages: Those that it passes; by default ``stages_of`` it.
        """
        unknown = {*request.guidance_scale, *request.num_steps} - {stage.name for stage in self.stages}
        if unknown:
            raise ValueError(f"no stage {', '.join(sorted(unknown))}; this cascade has {', '.join(self.settings)}")
        for stage in self.stages_of(request) if stages is None else stages:
            stage.check(request)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], watch: Watch | None = None) -> CascadeResult:
        """Sample one picture for each prompt and seed.

        Args:
            prompts: B captions.
            seeds: B seeds; the same prompt with another seed is another picture.
            watch: Called after each step.

        Raises:
            ValueError: If the numbers of prompts and seeds differ, or there are none.
        """
        if not prompts or len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt")
        return self.run(Batch(self.clip.encode_text(prompts), tuple(seeds)), watch=watch)

    def sample_request(self, request: SampleRequest, watch: Watch | None = None) -> CascadeResult:
        """Sample the pictures of one request.

        Raises:
            ValueError: If the request cannot be met; see ``check``.
        """
        self.check(request)
        return self.run(self.batch_of(request), self.stages_of(request), watch=watch)

    def run(self, batch: Batch, stages: Sequence[Stage] | None = None, watch: Watch | None = None) -> CascadeResult:
        """Run a batch through ``stages`` (all of them if None), each to its end."""
        values, pictures = dict(batch.values), dict[str, Tensor]()
        for stage in self.stages if stages is None else stages:
            batch = batch.with_values(**values)
            values[stage.makes] = self.run_stage(stage, batch, watch)
            if stage.makes == PIXELS:
                pictures[stage.name] = to_uint8(values[PIXELS]).cpu()
        return CascadeResult(values, pictures)

    def run_stage(self, stage: Stage, batch: Batch, watch: Watch | None = None) -> Tensor:
        """The result of one stage for a batch, computed for ``micro_batch`` items at a time."""
        starts = range(0, len(batch), self.micro_batch)
        return torch.cat([run_stage(stage, batch[start : start + self.micro_batch], watch) for start in starts])


def up_to(stages: Sequence[Stage], side_px: int) -> tuple[Stage, ...]:
    """The stages up to the first whose pictures have at least this side, in pixels; all of them if it is 0."""
    for number, stage in enumerate(stages, 1):
        if side_px and (stage.side_px or 0) >= side_px:
            return tuple(stages[:number])
    return tuple(stages)
