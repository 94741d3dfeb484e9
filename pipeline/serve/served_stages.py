"""The stages that requests pass, by number, and those of them whose networks an engine has."""

from collections.abc import Collection
from dataclasses import replace

import torch

from models.cascade import Cascade, Phase
from models.decoder.stage import DecoderStage
from models.edit_phases import edit_phase
from models.editor import Editor, EditSettings
from models.request import WALK_STEPS, EditError, SampleRequest
from models.stage import Stage
from pipeline.serve.work import Work, on_device


class ServedStages:
    """The stages of a cascade and of its edits, the earliest first.

    Args:
        cascade: The trained networks.
        steps: Steps of the recipe whose networks the engine has; None: all.
        device: Of its networks.
    """

    def __init__(self, cascade: Cascade, steps: Collection[str] | None, device: torch.device | str) -> None:
        self._cascade = cascade
        self._editor = _editor_of(cascade)
        self._stages = _all_stages(cascade, self._editor)
        self._steps = None if steps is None else frozenset(steps)
        self._device = device

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, number: int) -> Stage:
        return self._stages[number]

    def number(self, stage: Stage) -> int:
        """Number of a stage."""
        return next(number for number, one in enumerate(self._stages) if one is stage)

    def step_of(self, number: int) -> str:
        """Step of the recipe whose network does a stage."""
        stage, editor = self._stages[number], self._editor
        return editor.decoder.name if editor is not None and stage is editor.inversion else stage.name

    def split(self, phase: Phase) -> tuple[Phase, tuple[int, ...]]:
        """A phase with those stages alone that come first and are the engine's, and the numbers of the rest."""
        numbers = [self.number(stage) for stage in phase.stages]
        count = next((place for place, number in enumerate(numbers) if not self.has(number)), len(numbers))
        return replace(phase, stages=phase.stages[:count]), tuple(numbers[count:])

    def phase_of(self, request: SampleRequest, work: Work | None) -> tuple[Phase, bool]:
        """The phase in which a request is, and whether it is its last.

        Raises:
            ValueError: If the cascade cannot do what is requested.
        """
        if work is not None and work.stages:
            stages = tuple(self._stages[number] for number in work.stages)
            return Phase(len(work.batch), stages, lambda: on_device(work.batch, self._device)), work.is_last
        phase = self._first_phase(request)
        if work is not None and phase.then is not None:
            phase = phase.then(on_device(work.batch, self._device).values)
        return phase, phase.then is None

    def _first_phase(self, request: SampleRequest) -> Phase:
        if request.edit is None:
            return self._cascade.phase_of(request)
        if self._editor is None:
            raise ValueError(
                "this server's networks cannot start from pictures: that takes a decoder, and a CLIP for pictures"
            )
        return edit_phase(self._editor, request)

    def has(self, number: int) -> bool:
        """Whether the engine has the network of a stage."""
        return self._steps is None or self.step_of(number) in self._steps

    @property
    def has_clip(self) -> bool:
        """Whether the engine has CLIP."""
        return self._steps is None or "clip" in self._steps


def _editor_of(cascade: Cascade) -> Editor | None:
    """The editor of a cascade, with as many steps as its decoder's chain allows; None if it cannot edit."""
    longest = min(
        (stage.diffusion.num_timesteps for stage in cascade.stages if isinstance(stage, DecoderStage)), default=0
    )
    try:
        return Editor(cascade, EditSettings(num_steps=min(WALK_STEPS, longest)))
    except EditError:
        return None


def _all_stages(cascade: Cascade, editor: Editor | None) -> list[Stage]:
    """The stages that pictures pass, the earliest first: those of the cascade, and the two of edits."""
    stages = list(cascade.stages)
    if editor is not None:
        place = stages.index(editor.decoder)
        stages[place:place] = [editor.inversion, editor.latent_walk]
    return stages
