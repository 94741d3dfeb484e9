"""The sections of a recipe that train a network: what is trained, how, and where."""

from collections.abc import Iterable
from dataclasses import field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from models.clip_config import ClipConfig
from models.configclass import configclass
from models.noisy_clip.config import NoisyClipConfig
from pipeline.recipe.sections import Share, StepSection

ModelT_co = TypeVar("ModelT_co", covariant=True)
"""Shape of the network that a step trains."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


@configclass
class TrainPhase:
    """Settings of a training that change at a step; what is None stays as it was."""

    from_step: PositiveInt
    """First step (0-based) of the phase; a training that has come further continues from a checkpoint before it."""
    learning_rate: PositiveFloat | None = None
    """Peak rate from here on."""
    lr_schedule: Literal["constant", "cosine"] | None = None
    """Schedule from here on."""
    warmup_steps: NonNegativeInt = 0
    """Linear rise of the rate after from_step, in steps."""
    num_steps: PositiveInt | None = None
    """Steps of the whole training."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of the forward pass."""
    grad_clip_norm: NonNegativeFloat | None = None
    """Largest gradient norm; 0 switches clipping off."""

    @property
    def restarts_schedule(self) -> bool:
        """Whether the rate follows a schedule of its own from here on: to num_steps, with this warm-up."""
        return bool(self.warmup_steps or self.learning_rate or self.lr_schedule or self.num_steps)


@configclass
class TrainConfig:
    """Optimisation of one network: what changes its weights."""

    num_steps: NonNegativeInt = 1000
    """Optimizer steps; 0 takes the weights of ``init_from`` as they are."""
    batch_size: PositiveInt = 64
    """Global batch, over all workers, in samples."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw (the paper's), or muon for the kernels and matrices inside the network and adamw for the rest: fewer steps
    for a small network, a little more work a step."""
    learning_rate: PositiveFloat = 1e-4
    """Peak rate; an update of muon is about as large as one of adamw at the same rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant, or half a cosine down to zero over num_steps."""
    warmup_steps: NonNegativeInt = 0
    """Linear rise of the rate, in steps (paper: none stated)."""
    beta1: Share = 0.9
    """AdamW beta 1 (paper: 0.9)."""
    beta2: Share = 0.999
    """AdamW beta 2."""
    eps: NonNegativeFloat = 1e-8
    """AdamW epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    grad_clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_decay: Share = 0.9999
    """Decay of the weight average that is saved and sampled from; ramps up as (1 + step) / (10 + step)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; weights, loss and optimizer stay float32."""
    clip_precision: Literal["float32", "bfloat16"] = "float32"
    """Weights and arithmetic of the frozen CLIP that encodes the captions while a prior, a decoder or a noisy CLIP is
    trained; bfloat16 halves its memory, and rounds what it says. Stored embeddings and sampling are not affected."""
    shuffle_rows: PositiveInt = 200_000
    """Rows that are shuffled together, shard by shard; two such windows are open at a time (0.1 GB of texts each)."""
    num_streams: PositiveInt = 1
    """Runs into which the shards of an epoch are divided, each shuffled by itself; every batch takes an equal part of
    each. With as many as machines, or a multiple of that, a machine fetches the shards of its own runs alone: an epoch
    takes each shard from the storage once, and with 1 once for every machine. The order is the same on any number of
    machines, so 12 serves 1, 2, 3, 4, 6 and 12 well."""
    phases: tuple[TrainPhase, ...] = ()
    """Changes from a step on: tables with from_step (0-based) and any of learning_rate, lr_schedule, warmup_steps,
    num_steps, precision, grad_clip_norm. A training under the same recipe without the last phases is continued from its
    newest checkpoint before them, a finished one from the state that resources.keep_state kept. After a change of rate,
    schedule, warm-up or num_steps the schedule begins anew, and ends at num_steps."""

    def __post_init__(self) -> None:
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps must be in 0..num_steps, got {self.warmup_steps}")
        if self.num_streams > self.batch_size:
            raise ValueError(f"num_streams is {self.num_streams}: at most batch_size, which is {self.batch_size}")
        first, last = 0, self.num_steps
        for number, phase in enumerate(self.phases):
            if not first < phase.from_step <= last:
                place = f"phases[{number}].from_step is {phase.from_step}: after {first} and at most {last}"
                raise ValueError(f"{place}; lower it, or set phases=[]" if phase.from_step > last else place)
            first, last = phase.from_step, phase.num_steps or last
            if first + phase.warmup_steps >= last:
                raise ValueError(f"phases[{number}] ends its warm-up at {first + phase.warmup_steps} of {last} steps")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases together."""
        return self.at(self.phases[-1].from_step).num_steps if self.phases else self.num_steps

    @property
    def precisions(self) -> set[str]:
        """Arithmetic of the forward passes of all phases."""
        return {self.precision, *(phase.precision or self.precision for phase in self.phases)}

    def at(self, step: int) -> "TrainConfig":
        """The settings of step ``step`` (0-based)."""
        settings = self
        for phase in self.phases:
            if phase.from_step <= step:
                values = {name: value for name in _OF_PHASE if (value := getattr(phase, name)) is not None}
                settings = replace(settings, **values, warmup_steps=0, phases=())  # see schedule_at
        return settings

    def schedule_at(self, step: int) -> tuple[int, int]:
        """The first step of the schedule that the rate of step ``step`` follows, and the steps of its warm-up."""
        starts = [
            (phase.from_step, phase.warmup_steps)
            for phase in self.phases
            if phase.from_step <= step and phase.restarts_schedule
        ]
        return starts[-1] if starts else (0, self.warmup_steps)


_OF_PHASE = ("learning_rate", "lr_schedule", "num_steps", "precision", "grad_clip_norm")


@configclass
class TrainResources:
    """Where a training runs and how often it saves and logs; changes no sample and no order."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-parallel workers. They divide every global batch among them, to within one sample. With [fewest, most] the
    training starts with as many as there is room for on machines with the workers' labels, beside what else runs there,
    goes on with fewer when a machine is lost, and with more when there is room again: the same training up to rounding.
    Not so for a CLIP with a ResNet, whose batch norms see one worker's share: it takes one number, and another number
    is another training."""
    micro_batch_size: NonNegativeInt | Literal["auto"] = 0
    """Most samples in one forward and backward pass of a worker, which bounds its memory; 0: its whole share of the
    batch; "auto": all of it or the largest power of two that fits, counted as `plan --cost` counts it, once, before the
    first step, against the GPU's memory, or on CPUs against memory_gb_per_worker or the worker's share of its machine,
    less 1.5 GB for its process, or half of a share below 3 GB.
    The parts' gradients are added up: the same training up to rounding. A contrastive loss (clip, noisy_clip) computes
    its features twice then. Not for a CLIP with a ResNet, whose batch norms depend on the part."""
    num_shards: NonNegativeInt = 1
    """Workers that divide one copy of the training's state (weights, gradients, average, moments) among them, for
    networks that are too large for one GPU. 1: every worker has all of it (DDP); 0: all workers together have one copy
    (FSDP2); a divisor of num_workers: as many, such as the GPUs of one machine, inside which most traffic then stays
    (HSDP). The same training up to rounding."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs of each worker; also its torch threads."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Device of the network; cuda takes one GPU a worker."""
    gpu_memory_gb: NonNegativeFloat = 0.0
    """Memory of that GPU, in 10^9 bytes (an A100 or H100 with 80 GB: 80): `plan --cost` says whether the training fits,
    and if not, what would make it fit; 0: it only counts."""
    save_every_steps: PositiveInt = 200
    """Steps between checkpoints."""
    log_every_steps: PositiveInt = 20
    """Steps between reads of the loss from the device."""
    num_checkpoints: PositiveInt = 2
    """Newest checkpoints kept while training. A damaged one is passed over for the one before, so two are better."""
    keep_best: str = ""
    """A measure of the validation, such as val_loss or val_cos_z_image: while training, the best checkpoint by it is
    kept beside the newest, of a loss the lowest, of others the highest; empty: none."""
    validation: Literal["auto", "in_line", "beside"] = "auto"
    """Who computes loss and measures of each checkpoint on validation rows: in_line, the first worker, for whom the
    others wait; beside, another process on a machine with the workers' labels, for which nobody waits: if none has
    room, or the one before still runs, the checkpoint is skipped, which the progress says. The finished network is
    always validated. auto: beside if there may be several workers, else in_line."""
    validation_cpus: NonNegativeFloat = 0.0
    """CPUs that must be free for a validation beside the training; also its torch threads. 0: as many as a worker has;
    with workers on CPUs none need be free, because it takes their CPUs as far as they leave them (nice 5)."""
    validation_gpus: NonNegativeFloat = 0.0
    """GPUs of a validation beside the training: 1, or the share of one; 0: it computes on its CPUs."""
    keep_state: bool = False
    """Keep weights, average and moments of the last step with the finished network, so that the training can be
    lengthened by a phase: four times the weights on the disk."""
    max_bad_steps: NonNegativeInt = 0
    """Steps in all whose loss or gradient may be not finite: they change no weight and are counted. One more stops the
    training, which says in which step, samples and parameters; run again with a larger number it goes on."""
    max_failures: NonNegativeInt = 2
    """Restarts from the newest checkpoint after an error, or a lost worker whose machine is still there: so many
    without a new checkpoint in between. After a later checkpoint than at the failure before, they are counted anew."""
    max_preemptions: NonNegativeInt = 1000
    """Restarts after a machine was lost or taken away, or a worker got SIGTERM. Where there is notice, the training
    writes a checkpoint first, so that nothing is lost."""
    max_out_of_memory: NonNegativeInt = 4
    """Restarts after memory did not suffice, of the GPU or of the machine (Ray or the kernel has ended a worker), each
    with half the micro_batch_size: the same training up to rounding. With "auto" later runs begin with the half."""
    resize_every_s: PositiveFloat = 300.0
    """With [fewest, most] workers: seconds between looks whether there is room for more; if so, all end with a
    checkpoint and begin there with the others."""
    max_wait_s: PositiveFloat = 86_400.0
    """Seconds that a training waits for machines with room for its workers, at its start and after a loss; then it
    fails and says what it waited for. Its checkpoints are kept, and the next run continues it."""
    hang_timeout_s: PositiveInt = 1800
    """Seconds that a worker waits for the others within a step before the training counts as hung, and begins again at
    the newest checkpoint, as after a lost worker. Of a single worker it is the longest time for a step, or twice its
    slowest step so far, if that is more; the first step of a start (a network is compiled in it), checkpoints and
    validations may take longer. Where there are several, a validation in line must end within it too; one beside the
    training that does not counts as failed."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that the workers' machines must have, for example {"ray.io/accelerator-type" = "H100"}. Empty: the
    step's role (unclip-role), if the cluster's machines have such a label, as those of cluster.yaml do."""
    memory_gb_per_worker: NonNegativeFloat = 0.0
    """Memory that Ray sets aside for each worker, in GB; 0: none, and Ray counts CPUs and GPUs alone."""
    disk_gb_per_worker: NonNegativeFloat = 0.0
    """Disk that Ray sets aside for each worker, in GB, on machines that say how much they have (the resource disk_gb,
    as in cluster.yaml and deploy/; on one machine, what is free for the cache); 0: none."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: the same numbers from less memory, in about a
    third more time. Of a CLIP with a ResNet only the text tower."""
    compiled: bool = False
    """Train through torch.compile: faster on a GPU after some minutes at the start; numbers differ by rounding. Not for
    CLIP."""

    def __post_init__(self) -> None:
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"num_workers is {list(self.workers)}: give the fewest first, then the most")
        if self.num_shards > 1 and self.fewest_workers < self.most_workers:
            raise ValueError(
                f"num_shards is {self.num_shards}: with a varying number of workers only 0 or 1 is possible"
            )
        if self.num_shards and self.most_workers % self.num_shards:
            raise ValueError(f"num_shards is {self.num_shards}: no divisor of num_workers, which is {self.num_workers}")

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def samples_a_pass(self) -> int:
        """``micro_batch_size`` as a number; 0 while "auto" has not been counted."""
        return 0 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def fewest_workers(self) -> int:
        """Workers without which the training waits."""
        return self.workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that it takes if there is room."""
        return self.workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.fewest_workers < self.most_workers

    @property
    def validates_beside(self) -> bool:
        """Whether checkpoints are validated by another process."""
        if self.validation == "auto":
            return self.most_workers > 1
        return self.validation == "beside"

    @property
    def cpus_of_validation(self) -> float:
        """CPUs that a validation beside the training uses."""
        return self.validation_cpus or self.cpus_per_worker

    @property
    def shares_cpus_with_validation(self) -> bool:
        """Whether a validation beside the training runs on its workers' CPUs, and waits for none to be free."""
        return self.accelerator == "cpu" and not self.validation_cpus

    @property
    def shards(self) -> int:
        """Workers that divide one copy of the state, of the fewest."""
        return self.shards_of(self.fewest_workers)

    def shards_of(self, world_size: int) -> int:
        """Workers that divide one copy of the state, of so many; 1: each has all of it."""
        return self.num_shards or world_size


@configclass
class ClipStepConfig(StepSection):
    """The frozen CLIP: trained here on the shards, or pretrained."""

    source: Literal["train", "pretrained"] = "train"
    """train: a new open_clip model on the shards; pretrained: an open_clip name with a tag, or a local folder."""
    name: str = "ViT-L-14"
    """pretrained: open_clip model name, hf-hub:OWNER/REPOSITORY, or a folder in open_clip's local-dir layout."""
    tag: str = "laion2b_s32b_b82k"
    """pretrained: open_clip's pretrained tag, or the path of a checkpoint; ignored for a folder and for hf-hub."""
    model: ClipConfig = ClipConfig()
    """train: the network."""
    train: TrainConfig = TrainConfig()
    """train: its optimisation."""
    resources: TrainResources = TrainResources()
    """train: its workers."""

    def __post_init__(self) -> None:
        if self.source == "train" and self.train.num_steps == 0:
            raise ValueError("train.num_steps is 0: random weights are of no use; set source = 'pretrained'")
        if self.source == "train" and self.resources.micro_batch_size and self.model.vision == "resnet":
            raise ValueError(
                f"resources.micro_batch_size is {self.resources.micro_batch_size}: the batch norms of model.vision = "
                "'resnet' need the batch undivided; set 0, or model.vision = 'vit'"
            )
        if self.source == "train" and self.resources.is_elastic and self.model.vision == "resnet":
            raise ValueError(
                f"resources.num_workers is {list(self.resources.workers)}: the batch norms of model.vision = 'resnet' "
                "see one worker's share, so another number of workers is another training; give one number, or set "
                "model.vision = 'vit'"
            )

    @property
    def reads_inputs(self) -> bool:
        """See ``StepSection``."""
        return self.source == "train"

    @property
    def finished_network(self) -> str:
        """See ``StepSection``."""
        is_folder = self.source == "pretrained" and (Path(self.name) / "open_clip_model.safetensors").is_file()
        return self.name if is_folder else ""

    def local_paths(self, fields: Iterable[str]) -> dict[str, str]:
        """The one of name and tag that is a path on this machine: a folder, or the checkpoint of a named model."""
        if self.source != "pretrained" or self.name.startswith("hf-hub:"):
            return {}
        is_path = {"name": "/" in self.name or Path(self.name).is_dir(), "tag": Path(self.tag).is_file()}
        return super().local_paths([name for name in fields if is_path[name]][:1])

    def files_in_key(self, path: str) -> list[str]:
        """Configuration and weights of a folder, because networks of the same shape have files of the same size."""
        if not Path(path).is_dir():
            return [path]
        weights = sorted(str(file) for file in Path(path).iterdir() if file.suffix in _WEIGHTS)
        return [str(Path(path) / "open_clip_config.json"), *weights]


def is_checkpoint(init_from: str) -> bool:
    """Whether weights to start from are named by the file of a checkpoint, and not by a network's folder."""
    return init_from.endswith(".safetensors")


@configclass
class NetworkStepConfig(StepSection, Generic[ModelT_co]):
    """A step that trains one network: its shape, its first weights, its optimisation, its workers."""

    model: ModelT_co
    """The network, its diffusion and its sampler."""
    init_from: str = ""
    """Folder of a trained network (config.json, model.safetensors) to start from, of the same shape: from `unclip
    import`, or another run's artifact. Or a checkpoint of a training, which gives its averaged weights: a file
    live/checkpoints/NUMBER.safetensors of its artifact, or a copy, because a training removes its old ones (of a state
    that was divided, copy all its files, NUMBER.*). Empty: random weights."""
    train: TrainConfig = TrainConfig()
    """Its optimisation."""
    resources: TrainResources = TrainResources()
    """Its workers."""

    def __post_init__(self) -> None:
        if self.train.num_steps == 0 and not self.init_from:
            raise ValueError("train.num_steps is 0, which needs init_from: an untrained network samples noise")

    @property
    def finished_network(self) -> str:
        """See ``StepSection``."""
        return self.init_from if self.train.num_steps == 0 and not is_checkpoint(self.init_from) else ""

    def files_in_key(self, path: str) -> list[str]:
        """The weights of ``init_from``."""
        return [path if is_checkpoint(path) else f"{path}/model.safetensors"]


@configclass
class NoisyClipStepConfig(StepSection):
    """The noise-aware CLIP, for CLIP guidance of the decoder: an optional step."""

    model: NoisyClipConfig = NoisyClipConfig()
    """The image tower and the noise it sees."""
    train: TrainConfig = TrainConfig()
    """Its optimisation."""
    resources: TrainResources = TrainResources()
    """Its workers."""
