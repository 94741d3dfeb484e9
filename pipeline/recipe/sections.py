"""The sections of a recipe, one for each step.

Fields that change bytes are in the section itself and are hashed into the step's key; the others (workers, devices,
cadence) are in its ``resources`` table. The type of a field checks its value alone; ``__post_init__`` checks it against
other fields.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from models.clip_config import ClipConfig
from models.configclass import configclass
from models.noisy_clip.config import NoisyClipConfig

ModelT_co = TypeVar("ModelT_co", covariant=True)
"""Shape of the network that a step trains."""

Port = Annotated[int, Field(ge=1, le=65535)]
Prob = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""Below 1."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


class StepSection:
    """What the plan asks a step's section; these answers hold for most sections."""

    @property
    def reads_inputs(self) -> bool:
        """Whether the step reads the artifacts of its row's inputs."""
        return True

    @property
    def finished_network(self) -> str:
        """Folder of the network that the section uses unchanged; empty if the step trains or downloads one."""
        return ""

    def local_paths(self, fields: Iterable[str]) -> dict[str, str]:
        """Those of ``fields`` that name a file or folder of this machine, with the path."""
        paths = {name: str(getattr(self, name)) for name in fields}
        return {name: path for name, path in paths.items() if path and "://" not in path}

    def path_in_key(self, path: str) -> str:
        """What the key holds of a local path itself, beside its content."""
        del path
        return ""

    def files_in_key(self, path: str) -> list[str]:
        """Files (or one folder) whose content stands in the key for a local path."""
        return [path]

    @property
    def known_by_size(self) -> tuple[str, ...]:
        """Suffixes of files whose size stands in the key for their content."""
        return ()


@configclass
class TaskResources:
    """Where and how wide a data step runs; changes no bytes."""

    num_workers: PositiveInt = 2
    """Tasks or actors at a time."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs of each worker."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Device of the networks in this step."""
    max_retries: NonNegativeInt = 2
    """Retries after a lost worker, for each shard."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that the workers' machines must have, for example {"ray.io/accelerator-type" = "H100"}. Empty: the
    step's role (unclip-role), if the cluster's machines have such a label, as those of cluster.yaml do."""
    memory_gb_per_worker: NonNegativeFloat = 0.0
    """Memory that Ray sets aside for each worker, in GB; 0: none, and Ray counts CPUs and GPUs alone."""


@configclass
class DrawnConfig:
    """Captioned pictures that the project draws itself and serves on 127.0.0.1 while they are downloaded."""

    num_pairs: PositiveInt = 8000
    """Pictures to draw, in images."""
    image_px: Annotated[int, Field(ge=16, le=1024)] = 128
    """Side of a picture, in pixels."""
    port: Port = 8976
    """Port of the picture server on 127.0.0.1; part of every URL, so it changes the uids."""
    num_faulty: NonNegativeInt = 12
    """URLs added that are dead, slow, corrupt or not pictures, in rows."""


@configclass
class PairsConfig(StepSection):
    """Where the image-text pairs come from; the step writes one list of (uid, url, caption, split)."""

    source: Literal["drawn", "list", "folder", "shards"] = "drawn"
    """drawn: shapes drawn by the project; list: URLs and captions; folder: pictures with captions; shards: tars of
    pictures and texts, as webdataset and img2dataset write them, which are taken in as they are."""
    path: str = ""
    """The list (txt, csv, tsv, json, jsonl, ndjson, each also .gz or .zst, or parquet), a folder of its parts, or a
    pattern such as data/*.parquet; here or under s3://, gs://, https://. Or the folder of pictures, or of shards."""
    url_column: str = ""
    """Column that holds the URL (list); empty: found by its name."""
    caption_column: str = ""
    """Column that holds the caption; empty: found by its name; "-": the list has no captions."""
    validation_prob: Share = 0.02
    """Share of pictures set aside for validation, by hash of the URL: all captions of a picture are on one side."""
    max_pairs: NonNegativeInt = 0
    """Rows to read from the start of the list, by one worker; 0: all."""
    drawn: DrawnConfig = DrawnConfig()
    """Settings of the drawn source."""
    resources: TaskResources = TaskResources()
    """Workers of this step, for a list of more than one piece (256 MB)."""

    def __post_init__(self) -> None:
        if self.source != "drawn" and not self.path:
            raise ValueError(f"path is required when source is {self.source!r}")

    def local_paths(self, fields: Iterable[str]) -> dict[str, str]:
        """The list or folder, which may be in an object store too."""
        return {name: self.path for name in fields if self.source != "drawn"}

    @property
    def known_by_size(self) -> tuple[str, ...]:
        """Tars: a plan does not read terabytes."""
        return (".tar",) if self.source == "shards" else ()

    def path_in_key(self, path: str) -> str:
        """A folder's absolute path, because the URLs of its pictures contain it."""
        return str(Path(path).resolve()) if self.source == "folder" else ""


@configclass
class DownloadResources(TaskResources):
    """Where and how wide the download runs; changes no bytes."""

    num_connections: PositiveInt = 256
    """URLs of one worker that are fetched or decoded at once (img2dataset: thread_count)."""
    max_per_host: NonNegativeInt = 0
    """Most requests of all workers together to one host at once; 0: no limit."""
    max_rate_per_host: NonNegativeFloat = 0.0
    """Most requests of all workers together to one host, per second; 0: no limit."""


@configclass
class DownloadConfig(StepSection):
    """What is fetched and how it is stored; the shard format is img2dataset's, with its options under our names."""

    samples_per_shard: PositiveInt = 1000
    """Rows in a shard (img2dataset: number_sample_per_shard), in rows."""
    image_px: PositiveInt = 256
    """Target side, in pixels (img2dataset: image_size)."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "center_crop"
    """How a picture is resized to the target side."""
    resize_only_if_bigger: bool = False
    """Leave smaller pictures as they are."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    """Format of the stored picture."""
    encode_quality: Annotated[int, Field(ge=0, le=100)] = 95
    """jpg and webp: quality 0..100; png: compression 0..9."""
    skip_reencode: bool = False
    """Store the bytes as downloaded when no resize is needed."""
    min_image_px: NonNegativeInt = 0
    """Smallest shorter side accepted, in pixels."""
    max_image_area_px: PositiveFloat = 178_956_970.0
    """Largest area decoded, in pixels: a decompression bomb is refused, not decoded."""
    max_memory_bytes: PositiveInt = 256 << 20
    """Most memory that decoding one picture may take, in bytes: by its header, before any pixel is decoded."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 20.0
    """Largest longer side over shorter side."""
    blur_column: str = ""
    """Column with boxes to blur, such as faces: a list of [x_min, y_min, x_max, y_max] for each row, as shares of the
    picture's sides (img2dataset: bbox_col). Empty: nothing is blurred."""
    timeout_s: PositiveInt = 10
    """Longest wait for one network operation, in seconds."""
    deadline_s: PositiveFloat = 30.0
    """Longest time for one URL in all, in seconds: name, connection, redirects, body and further tries. Waiting for its
    host's turn is not counted."""
    retries: NonNegativeInt = 1
    """Further tries of a URL after a temporary failure (no connection, a timeout, a lost connection, a busy server)."""
    max_body_bytes: PositiveInt = 64 << 20
    """Largest file downloaded, in bytes."""
    allowed_networks: tuple[str, ...] = ()
    """Networks that URLs may reach beside the public internet, such as "10.0.0.0/8". The demo's server is allowed."""
    allowed_folders: tuple[str, ...] = ()
    """Folders of the workers whose files a list may name by file: URLs. A folder source needs none."""
    compute_hash: Literal["sha256", "md5", "sha512", "none"] = "sha256"
    """Checksum of the downloaded file, stored under this name."""
    hash_column: str = ""
    """Column with the checksum that the file must have: MD5, SHA-256 or SHA-512 (img2dataset: verify_hash)."""
    extra_columns: tuple[str, ...] = ()
    """Columns of the list that are copied into the shards, besides uid and split; no other column is read."""
    user_agent_token: str = "unclip"
    """Name of the user agent, by which hosts and their robots.txt identify the client."""
    contact: str = ""
    """Page or mail address in the user agent, where hosts can complain."""
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """X-Robots-Tag directives that opt a picture out."""
    robots_txt: bool = True
    """Leave out what a host's robots.txt forbids."""
    tdm_reservation: bool = True
    """Leave out what is reserved by the header tdm-reservation or by /.well-known/tdmrep.json."""
    min_success_prob: Prob = 0.05
    """The step fails below this share of good rows: something is wrong with the list or the network."""
    resources: DownloadResources = DownloadResources()
    """Workers of this step."""

    def __post_init__(self) -> None:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError(f"encode_quality must be 0..9 for png, got {self.encode_quality}")
        for network in self.allowed_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"allowed_networks: {error}; write it like 10.0.0.0/8") from None


@configclass
class FilterConfig(StepSection):
    """Rules on captions, sizes, languages, the list's own columns and duplicates; they need no embedding.

    A row that breaks a rule is left out before CLIP is trained and pictures are embedded. Every rule is off by default.
    """

    min_caption_chars: NonNegativeInt = 0
    """Shortest caption, in characters without the spaces around it."""
    min_caption_words: NonNegativeInt = 0
    """Shortest caption, in words between spaces."""
    max_caption_chars: NonNegativeInt = 0
    """Longest caption, in characters; 0: no limit."""
    min_image_px: NonNegativeInt = 0
    """Smallest shorter side of the downloaded picture, in pixels."""
    max_aspect_ratio: NonNegativeFloat = 0.0
    """Largest longer side over shorter side of the downloaded picture; 0: no limit."""
    languages: tuple[Annotated[str, Field(pattern="^[a-z]{2,3}$")], ...] = ()
    """Languages of captions that stay (ISO 639 codes, as en, de, zh); empty: all."""
    min_language_prob: Prob = 0.08
    """Least probability that a caption is in one of ``languages``, if another one is more probable; low, because a few
    words say little about theirs."""
    max_watermark: Prob = 1.0
    """Largest pwatermark (LAION) or watermark_score (COYO); 1: no rule. This column and those below must be in
    download.extra_columns."""
    max_nsfw: Prob = 1.0
    """Largest punsafe (LAION) or nsfw_score_opennsfw2 (COYO); 1: no rule."""
    nsfw_tags: tuple[str, ...] = ()
    """Values of the column NSFW that stay (LAION-400M: UNLIKELY, UNSURE, NSFW); empty: no rule."""
    max_faces: Annotated[int, Field(ge=-1)] = -1
    """Most faces: boxes in face_bboxes (DataComp), or num_faces (COYO); -1: no rule."""
    min_similarity: Annotated[float, Field(ge=-1, le=1)] = -1.0
    """Least similarity of picture and caption by the list: similarity (LAION), clip_l14_similarity_score (DataComp),
    clip_similarity_vitl14 (COYO); -1: no rule."""
    min_aesthetic: NonNegativeFloat = 0.0
    """Least aesthetic score by the list: aesthetic, AESTHETIC_SCORE or aesthetic_score_laion_v2; 0: no rule."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Pictures that occur again are left out, except the first. exact: the same file; near: also its copies that were
    encoded again, resized or mirrored, by a perceptual hash."""
    max_hash_distance: Annotated[int, Field(ge=0, le=8)] = 4
    """near: most bits, of 64, in which two hashes differ."""
    same_caption_only: bool = False
    """Only rows with the same caption are duplicates, so that a picture keeps all its captions."""
    num_examples: NonNegativeInt = 6
    """Rows of each reason that the report shows."""
    resources: TaskResources = TaskResources()
    """Workers of this step."""


@configclass
class FilterEmbeddingsConfig(StepSection):
    """Rules on embeddings: CLIP score, heads, semantic duplicates. Every rule is off by default.

    A row that breaks a rule is left out of every training but CLIP's, of the index and of the evaluation.
    """

    min_clip_score: Annotated[float, Field(ge=-1, le=1)] = -1.0
    """Least cosine similarity of picture and caption; -1: no rule."""
    clip_score_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of rows that stay, those with the highest CLIP score, among the rows that break no rule above and no head's
    rule; 1: no rule."""
    aesthetic_weights: str = ""
    """Weights of an aesthetic head on z_image (.safetensors, .pth): LAION's linear head, or the MLP of
    improved-aesthetic-predictor."""
    min_aesthetic: float = 0.0
    """Least score of the aesthetic head."""
    nsfw_weights: str = ""
    """Weights of an NSFW head on z_image (.safetensors, .pth): LAION's CLIP-based-NSFW-Detector."""
    max_nsfw: float = 1.0
    """Largest score of the NSFW head."""
    max_similarity: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest cosine similarity of two pictures that stay, within a cluster of similar ones (SemDeDup,
    arXiv:2303.09540: 0.95 and less); the row with the highest CLIP score stays. 1: no rule."""
    same_caption_only: bool = False
    """Only rows with the same caption are semantic duplicates, so that a picture keeps all its captions."""
    num_examples: NonNegativeInt = 6
    """Rows of each reason that the report shows."""
    resources: TaskResources = TaskResources(num_workers=1)
    """Workers of this step."""

    def __post_init__(self) -> None:
        for limit, weights, default in (("min_aesthetic", "aesthetic_weights", 0.0), ("max_nsfw", "nsfw_weights", 1.0)):
            if getattr(self, limit) != default and not getattr(self, weights):
                raise ValueError(f"{limit} needs {weights}")


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
    shuffle_rows: PositiveInt = 200_000
    """Rows that are shuffled together, shard by shard; two such windows are open at a time (0.1 GB of texts each)."""
    phases: tuple[TrainPhase, ...] = ()
    """Changes from a step on: tables with from_step (0-based) and any of learning_rate, lr_schedule, warmup_steps,
    num_steps, precision, grad_clip_norm. A training under the same recipe without the last phases is continued from its
    newest checkpoint before them, a finished one from the state that resources.keep_state kept. After a change of rate,
    schedule, warm-up or num_steps the schedule begins anew, and ends at num_steps."""

    def __post_init__(self) -> None:
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps must be in 0..num_steps, got {self.warmup_steps}")
        first, last = 0, self.num_steps
        for number, phase in enumerate(self.phases):
            if not first < phase.from_step <= last:
                raise ValueError(f"phases[{number}].from_step is {phase.from_step}: after {first} and at most {last}")
            first, last = phase.from_step, phase.num_steps or last
            if first + phase.warmup_steps >= last:
                raise ValueError(f"phases[{number}] ends its warm-up at {first + phase.warmup_steps} of {last} steps")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases together."""
        return self.at(self.phases[-1].from_step).num_steps if self.phases else self.num_steps

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
    training starts with as many as there is room for, goes on with fewer when a machine is lost, and with more when
    there is room again: the same training up to rounding."""
    micro_batch_size: NonNegativeInt = 0
    """Most samples in one forward and backward pass of a worker, which bounds its memory; 0: its whole share of the
    batch. The parts' gradients are added up: the same training up to rounding. A contrastive loss (clip, noisy_clip)
    computes its features twice then. Not for a CLIP with a ResNet, whose batch norms depend on the part."""
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
    kept besides the newest, of a loss the lowest, of others the highest; empty: none."""
    keep_state: bool = False
    """Keep weights, average and moments of the last step with the finished network, so that the training can be
    lengthened by a phase: four times the weights on the disk."""
    max_bad_steps: NonNegativeInt = 0
    """Steps in all whose loss or gradient may be not finite: they change no weight and are counted. One more stops the
    training, which says in which step, samples and parameters; run again with a larger number it goes on."""
    max_failures: NonNegativeInt = 2
    """Restarts from the newest checkpoint after a lost worker."""
    resize_every_s: PositiveFloat = 300.0
    """With [fewest, most] workers: seconds between looks whether there is room for more, who then begin with all others
    at the newest checkpoint."""
    hang_timeout_s: PositiveInt = 1800
    """Seconds that a worker waits for the others within a step before the training counts as hung, and begins again at
    the newest checkpoint, as after a lost worker. A validation must end within it."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that the workers' machines must have, for example {"ray.io/accelerator-type" = "H100"}. Empty: the
    step's role (unclip-role), if the cluster's machines have such a label, as those of cluster.yaml do."""
    memory_gb_per_worker: NonNegativeFloat = 0.0
    """Memory that Ray sets aside for each worker, in GB; 0: none, and Ray counts CPUs and GPUs alone."""
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
    def fewest_workers(self) -> int:
        """Workers without which the training waits."""
        return self.workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that it takes if there is room."""
        return self.workers[1]

    @property
    def shards(self) -> int:
        """Workers that divide one copy of the state, of the fewest."""
        return self.num_shards or self.fewest_workers


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
        if self.resources.micro_batch_size and self.model.vision == "resnet":
            raise ValueError(
                "resources.micro_batch_size: the batch norms of model.vision = 'resnet' need the batch undivided"
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


@configclass
class EmbedConfig(StepSection):
    """z_image and z_text of every good row, as Parquet, one file a shard."""

    batch_size: PositiveInt = 256
    """Images in one forward pass."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Arithmetic of CLIP; all but float32 are for a GPU (bfloat16 also for a CPU), where tf32 rounds the factors of
    float32 to 10 bits. The vectors are stored in float16 whatever this is."""
    compiled: bool = False
    """Run CLIP through torch.compile: faster on a GPU after a minute or two at the start of each worker."""
    import_from: str = ""
    """Folder of embeddings in clip-retrieval's layout (img_emb, text_emb, metadata) to take over in place of computing
    them; then the step reads no pictures, and ``clip`` must be the model that made them."""
    import_validation_prob: Share = 0.02
    """Share of the rows of ``import_from`` set aside for validation, where its metadata has no split."""
    resources: TaskResources = TaskResources(num_workers=1)
    """Workers of this step. With cuda, each CPU of a worker beyond its first is a process that decodes pictures."""

    def __post_init__(self) -> None:
        if self.precision in {"tf32", "float16"} and self.resources.accelerator == "cpu":
            raise ValueError(f'precision = "{self.precision}" needs resources.accelerator = "cuda"')

    @property
    def reads_inputs(self) -> bool:
        """See ``StepSection``."""
        return not self.import_from

    @property
    def has_tf32(self) -> bool:
        """Whether a GPU rounds the factors of float32 products."""
        return self.precision == "tf32"


@configclass
class IndexConfig(StepSection):
    """The neighbour index over z_image and z_text (FAISS, inner product)."""

    kind: Literal["auto", "flat", "ivf_sq8", "ivf_rabitq", "hnsw"] = "auto"
    """flat: exact; ivf_sq8 and ivf_rabitq: lists of rows of 8 bits and 1 bit a feature, re-ranked with the exact
    vectors; hnsw: a graph. auto: flat below 4,000 rows; else the fastest of flat (up to 50,000 rows), hnsw (up to
    20,000) and ivf_sq8 that reaches the recall target within the memory budget, for each of z_image and z_text;
    ivf_rabitq if none of them fits."""
    memory_gb: PositiveFloat = 20.0
    """Budget of the index over z_image, and of that over z_text, in GB of memory; auto tries what fits."""
    num_train_rows: PositiveInt = 200_000
    """Random sample on which the lists and quantisers are trained, in rows; lists are as many as it allows (39 rows
    each), at most four times the root of all rows."""
    recall_target: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Recall at 10, 100 and 1,000 neighbours that the search effort is tuned to, measured against exact search."""
    num_recall_queries: Annotated[int, Field(ge=2)] = 500
    """Queries for that measurement: embeddings of validation rows, half for tuning, half for the reported recall."""
    resources: TaskResources = TaskResources(num_workers=1)
    """Workers of this step."""


@configclass
class NetworkStepConfig(StepSection, Generic[ModelT_co]):
    """A step that trains one network: its shape, its first weights, its optimisation, its workers."""

    model: ModelT_co
    """The network, its diffusion and its sampler."""
    init_from: str = ""
    """Folder of a trained network (config.json, model.safetensors) to start from, of the same shape: from `unclip
    import`, or another run's artifact. Empty: random weights."""
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
        return self.init_from if self.train.num_steps == 0 else ""

    def files_in_key(self, path: str) -> list[str]:
        """The weights of ``init_from``."""
        return [f"{path}/model.safetensors"]


@configclass
class NoisyClipStepConfig(StepSection):
    """The noise-aware CLIP, for CLIP guidance of the decoder: an optional step."""

    model: NoisyClipConfig = NoisyClipConfig()
    """The image tower and the noise it sees."""
    train: TrainConfig = TrainConfig()
    """Its optimisation."""
    resources: TrainResources = TrainResources()
    """Its workers."""


@configclass
class EvaluateConfig(StepSection):
    """Pictures and numbers from the finished cascade."""

    num_prompts: PositiveInt = 240
    """Prompts sampled for the numbers; none of them was trained on."""
    num_trained_prompts: Annotated[int, Field(ge=0, le=280)] = 120
    """Drawn source: prompts of trained combinations, to compare the held-out ones with; 0: no comparison."""
    prompts_path: str = ""
    """Text file of prompts, one a line; empty: the drawn source's held-out scenes, or validation captions."""
    features_path: str = ""
    """TorchScript file of a feature extractor, for a Frechet distance beside CLIP's (Inception: FID); runs its code."""
    num_shown: PositiveInt = 16
    """Prompts shown in the picture grids."""
    num_images_per_shown: PositiveInt = 4
    """Pictures of each shown prompt."""
    batch_size: PositiveInt = 64
    """Pictures sampled at a time."""
    resources: TaskResources = TaskResources(num_workers=2)
    """Workers of this step."""


def _require_order(replicas: tuple[int, int]) -> None:
    if replicas[0] > replicas[1]:
        raise ValueError(f"replicas: the fewest ({replicas[0]}) are more than the most ({replicas[1]})")


@configclass
class ServeStageConfig:
    """Where a part of the cascade runs, with serve.mode = "chain"."""

    replicas: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Fewest and most copies; Ray Serve starts more while requests wait, and ends them again."""
    target_requests: PositiveFloat = 16.0
    """Requests of each copy, under way or waiting, above which another one is started."""
    cpus_per_replica: PositiveFloat = 1.0
    """Logical CPUs of each; also its torch threads."""
    gpus_per_replica: PositiveFloat = 1.0
    """GPUs of each with serve.accelerator = "cuda"; parts that share one have fractions."""
    memory_gb_per_replica: NonNegativeFloat = 0.0
    """Memory of each that Ray reserves, in GB; 0: none."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that its machines must have, beside those of serve.label_selector."""
    max_batch_size: int = 0
    """Pictures in one forward pass; 0: serve.max_batch_size."""

    def __post_init__(self) -> None:
        _require_order(self.replicas)


@configclass
class ServeConfig:
    """The server; changes no artifact."""

    name: str = ""
    """Name of the model, and of the server on its cluster; empty: the recipe's."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach is refused without a key."""
    port: Port = 8000
    """Port to listen on."""
    drain_s: NonNegativeFloat = 60.0
    """Longest time that requests under way are waited for at the end, in seconds."""
    mode: Literal["replica", "chain"] = "replica"
    """replica: every copy has all networks. chain: CLIP and the prior, the decoder and each upsampler run apart, each
    as its table below says, and requests pass from one to the next."""
    prior: ServeStageConfig = ServeStageConfig()
    """CLIP and the prior, in a chain."""
    decoder: ServeStageConfig = ServeStageConfig()
    """The decoder, in a chain."""
    upsampler_1: ServeStageConfig = ServeStageConfig()
    """The first upsampler, in a chain."""
    upsampler_2: ServeStageConfig = ServeStageConfig()
    """The second upsampler, in a chain."""
    replicas: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Fewest and most copies of the cascade; Ray Serve starts more while requests wait, and ends them again."""
    target_requests: PositiveFloat = 16.0
    """Requests of each copy, under way or waiting, above which another one is started."""
    cpus_per_replica: PositiveFloat = 1.0
    """Logical CPUs of each; also its torch threads."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Device of each."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Of the products in a step of a diffusion network (docs/lab.md has what it costs and saves). With float32 no GPU
    rounds to TF32; tf32 and float16 need a GPU."""
    compiled: bool = False
    """Whether torch.compile makes the diffusion networks quicker, and their start some minutes longer."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that its machines must have, for example {"unclip-role" = "serve"} with cluster.yaml."""
    max_batch_size: PositiveInt = 16
    """Pictures in one forward pass."""
    max_queued_requests: PositiveInt = 64
    """Requests waiting before new ones get 429."""
    keys: str = ""
    """File of `unclip keys`; when set, requests must carry one of its keys: Authorization: Bearer KEY."""
    hosts: tuple[str, ...] = ()
    """Names of this server, beside localhost and addresses; requests to other names are refused."""
    access_log: str = ""
    """File that gets a JSON object a line for each request; empty: none."""
    log_prompts: bool = False
    """Whether the access log holds prompts."""
    safety_hook: str = ""
    """MODULE:FUNCTION that may refuse a prompt or blank a picture (docs/operations.md)."""
    provenance: str = ""
    """File of an Ed25519 private key (PEM) that signs the PNG files, so that `unclip lineage` shows who made a picture,
    and that it is unchanged; empty: no signature."""
    image_urls: bool = False
    """Whether a search may name a picture by its URL, which the server then fetches: from public addresses alone, up to
    16 MB, within 10 s."""
    aliases: tuple[str, ...] = ()
    """Other names of the model, for clients that are built with one ("dall-e-2", "gpt-image-1")."""

    def __post_init__(self) -> None:
        _require_order(self.replicas)
        if self.precision in {"tf32", "float16"} and self.accelerator == "cpu":
            raise ValueError(f'precision = "{self.precision}" needs accelerator = "cuda"')
        stages = {name: getattr(self, name) for name in ("prior", "decoder", "upsampler_1", "upsampler_2")}
        unused = [f"serve.{name}" for name, stage in stages.items() if stage != ServeStageConfig()]
        if self.mode == "replica" and unused:
            raise ValueError(f'{", ".join(unused)}: only read with serve.mode = "chain"')


@configclass
class TrackingConfig:
    """MLflow; changes no artifact."""

    uri: str = ""
    """Tracking server; empty: sqlite beside the workspace; "off": none."""
    experiment: str = ""
    """Experiment name; empty: the recipe's name."""
