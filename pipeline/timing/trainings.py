"""Times the pieces of one training, with the code of the real one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pipeline.data.batch import Batch
from pipeline.data.batches import plan_order
from pipeline.data.order import Share
from pipeline.data.samples import IMAGE_CACHE_BYTES
from pipeline.networks.cores import use_cores
from pipeline.networks.diffusion_loss import draws_of
from pipeline.recipe.schedule import logical_cpus
from pipeline.timing.clock import Clock
from pipeline.timing.units import TrainingUnits
from pipeline.train.assemble import CAPTION_TABLE_BYTES, TrainJob, assemble, caption_bytes
from pipeline.train.job import start_training
from pipeline.train.loop import make_step
from pipeline.train.resume import Keep, save_checkpoint
from pipeline.train.state import create_state
from pipeline.train.validation import Validation

_STEPS_S = 0.5
_STEPS_TOGETHER_S = 2.0
"""By the wall clock single steps differ more."""


class RehearsedTraining:
    """The parts of a training and its first steps.

    Args:
        job: The training, on a few rows. Of the fewest workers, as which it is planned, each takes its share of the
            batch: the first one alone, or all together in their process group, if the job has a ``world_size``.
    """

    def __init__(self, job: TrainJob) -> None:
        use_cores(job.num_threads)
        self.job = job
        is_alone = job.world_size == 1
        self.clock = Clock(job.device, job.num_threads, waits=not is_alone)
        start = self.clock.now()
        self._parts = assemble(job)
        self._share = Share(job.section.train.batch_size, job.rank, job.section.resources.fewest_workers)
        if is_alone:
            self.state = create_state(self._parts.network, job.section.train, job.device)
            objective = self._parts.objective(self.state.network).train()
            self.state.draws = draws_of(objective)
        else:
            objective, self.state = start_training(job, self._parts)
        # Alone, the others are not there to exchange anything with.
        self._step = make_step(
            objective, job.section, Share(len(self._share)) if is_alone else self._share, seed=job.seed
        )
        self._order = plan_order(self._parts.train, job.seed, where=job.name, batch_size=job.section.train.batch_size)
        self._build_s = self.clock.now() - start

    def take_step(self) -> None:
        """One step on rows that are in memory after the first call."""
        self._step(self.state, self._read())
        self.state.step += 1

    def step_s(self) -> float:
        """Seconds of a step."""
        return self.clock.repeat(self.take_step, least_s=_STEPS_S if self.job.world_size == 1 else _STEPS_TOGETHER_S)

    def units(self, process_s: float) -> TrainingUnits:
        """All times of one worker; writes the artifact.

        Args:
            process_s: Start of a process, as of a validation beside the training.
        """
        job, clock, parts, state = self.job, self.clock, self._parts, self.state
        read_s = clock.time(self._read)
        row_s = max(0.0, read_s - clock.time(self._read)) / self._num_distinct
        step_s = self.step_s()
        clip = None if job.reads_states else parts.clip
        captions = parts.train.reader.captions() if clip is not None else []
        caption_s = 0.0
        if clip is not None:
            encode = clip.encode_text
            caption_s = clock.time(lambda: encode(captions)) / max(1, len(captions))
        save_s = end_s = 0.0
        if parts.validation.num_rows:
            resources = job.section.resources
            if resources.validates_beside:
                end_s = process_s + clock.time(lambda: Validation.alone(job)(state.ema))
                # It shares the CPUs of the machine with the workers, or has its own.
                share = min(1.0, job.num_threads / logical_cpus())
                save_s = end_s * share if resources.shares_cpus_with_validation else 0.0
            else:
                end_s = save_s = clock.time(lambda: Validation(job, parts.clip, parts.validation)(state.ema))
        save_s += _wall_s(lambda: save_checkpoint(state, job.output, job.digest, Keep(1)))
        end_s += _wall_s(lambda: parts.publish(state.ema))
        return TrainingUnits(
            step_s=step_s,
            start_s=max(0.0, self._build_s - len(captions) * caption_s),
            row_s=row_s,
            caption_s=caption_s,
            most_cached_rows=IMAGE_CACHE_BYTES / max(1, parts.train.row_bytes),
            most_encoded_rows=math.inf if clip is None else CAPTION_TABLE_BYTES / caption_bytes(clip.dims),
            save_s=save_s,
            end_s=end_s,
        )

    def _read(self) -> Batch:
        """The first batch of this worker."""
        return self._parts.train.batch(self._order.locations(self._share.start, self._share.stop))

    @property
    def _num_distinct(self) -> int:
        return min(len(self._share), self._parts.train.num_rows)


def _wall_s(work: Callable[[], object]) -> float:
    """Seconds of a call that waits for the disk."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
