"""The sections of a recipe, one for each step; others are in files of their own: pairs, trainings, serving.

Fields that change bytes are in the section itself and are hashed into the step's key; the others (workers, devices,
cadence) are in its ``resources`` table. The type of a field checks its value alone; ``__post_init__`` checks it against
other fields.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from models.configclass import configclass

Port = Annotated[int, Field(ge=1, le=65535)]
Prob = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""Below 1."""
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""Of networks that are not trained."""

FILTER_COLUMNS = {
    "max_watermark": ("pwatermark", "watermark_score"),
    "max_nsfw": ("punsafe", "nsfw_score_opennsfw2"),
    "nsfw_tags": ("NSFW",),
    "max_faces": ("face_bboxes", "num_faces"),
    "min_similarity": (
        "similarity",
        "clip_l14_similarity_score",
        "clip_similarity_vitl14",
        "clip_b32_similarity_score",
    ),
    "min_aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
}
"""For fields of ``[filter]`` that read a column of the list, its names in LAION-400M and LAION-5B, DataComp and
COYO-700M; the first one that a shard has is read."""
SHARD_COLUMNS = frozenset(
    {"url", "caption", "key", "status", "error_message", "exif", "md5", "sha256", "sha512"}
    | {"width", "height", "original_width", "original_height"}
    | {"picture_offset", "picture_bytes", "picture_crc32"}
)
"""Columns that a shard has of its own, beside uid and split."""
PAIRS_COLUMNS = frozenset({"uid", "url", "caption", "split"})
"""Columns that every list of pairs has; a list's own column of such a name is ``source_<name>``."""


class StepSection:
    """What the plan asks a step's section; these answers hold for most sections."""

    @property
    def reads_inputs(self) -> bool:
        """Whether the step reads the artifacts of its row's inputs."""
        return True

    def each(self) -> "Sequence[StepSection]":
        """The sections that name its files: itself, or one for each of its lists."""
        return [self]

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
    disk_gb_per_worker: NonNegativeFloat = 0.0
    """Disk that Ray sets aside for each worker, in GB, on machines that say how much they have (the resource disk_gb,
    as in cluster.yaml and deploy/; on one machine, what is free for the cache); 0: none."""


@configclass
class DownloadResources(TaskResources):
    """Where and how wide the download runs, and when it stops; changes no bytes."""

    num_connections: PositiveInt = 256
    """URLs of one worker that are fetched or decoded at once (img2dataset: thread_count)."""
    max_per_host: NonNegativeInt = 0
    """Most requests of all workers together to one host at once; 0: no limit."""
    max_rate_per_host: NonNegativeFloat = 0.0
    """Most requests of all workers together to one host, per second; 0: no limit."""
    trust_proxy: bool = False
    """Behind a proxy (http_proxy, https_proxy): names are resolved by the proxy alone, which must refuse your own side.
    Else they are resolved here first, and refused if an address is not public."""
    min_success_prob: Prob = 0.05
    """The step stops below this share of good rows: something is wrong with the list or the network. Another value
    keeps what was downloaded."""


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
    """Most memory that decoding one picture may take, in bytes: by its header, before any pixel is decoded. One of a
    tar that is taken in may take 1 GiB, as with all that read it later."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 20.0
    """Largest longer side over shorter side."""
    blur_column: str = ""
    """Column with boxes to blur, such as faces: a list of [x_min, y_min, x_max, y_max] for each row, as shares of the
    picture's sides (img2dataset: bbox_col). Empty: nothing is blurred."""
    timeout_s: PositiveInt = 10
    """Longest wait for one network operation, in seconds."""
    deadline_s: PositiveFloat = 30.0
    """Longest time for one URL in all, in seconds: name, connection, redirects, body and further tries. Waiting for its
    host's turn, and for a connection after it, is not counted."""
    retries: NonNegativeInt = 1
    """Further tries of a URL after a temporary failure (no connection, a timeout, a lost connection, a busy server)."""
    max_body_bytes: PositiveInt = 64 << 20
    """Largest file downloaded, in bytes."""
    allowed_networks: tuple[str, ...] = ()
    """Networks that URLs may reach beside the public internet, such as "10.0.0.0/8". The demo's server is allowed."""
    allowed_folders: tuple[str, ...] = ()
    """Folders whose files a list may name: of the workers' disks by file: URLs, of a store by their URIs, such as
    "s3://bucket/pictures". A folder source needs none."""
    compute_hash: Literal["sha256", "md5", "sha512", "none"] = "sha256"
    """Checksum of the downloaded file, stored under this name."""
    hash_column: str = ""
    """Column with the checksum that the file must have: MD5, SHA-256 or SHA-512 (img2dataset: verify_hash)."""
    extra_columns: tuple[str, ...] = ()
    """Columns of the list that are copied into the shards, beside our uid and split; no other column is read. The
    list's own uid is source_uid, and its split source_split."""
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
    clip_similarity_vitl14 (COYO), clip_b32_similarity_score (DataComp); -1: no rule."""
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

    def __post_init__(self) -> None:
        if self.min_language_prob != FilterConfig.min_language_prob and not self.languages:
            raise ValueError("min_language_prob needs languages")
        if self.max_hash_distance != FilterConfig.max_hash_distance and self.duplicates != "near":
            raise ValueError('max_hash_distance needs duplicates = "near"')
        if self.same_caption_only and self.duplicates == "keep":
            raise ValueError("same_caption_only needs duplicates")


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
    """Rows of each reason that the report shows; those of imported embeddings without their pictures."""
    resources: TaskResources = TaskResources(num_workers=1)
    """Workers of this step."""

    def __post_init__(self) -> None:
        for limit, weights, default in (("min_aesthetic", "aesthetic_weights", 0.0), ("max_nsfw", "nsfw_weights", 1.0)):
            if getattr(self, limit) != default and not getattr(self, weights):
                raise ValueError(f"{limit} needs {weights}")
        if self.same_caption_only and self.max_similarity == 1:
            raise ValueError("same_caption_only needs max_similarity")


@configclass
class EmbedConfig(StepSection):
    """z_image and z_text of every good row, as Parquet, one file a shard."""

    batch_size: PositiveInt = 256
    """Images in one forward pass."""
    precision: Precision = "float32"
    """Arithmetic of CLIP; all but float32 are for a GPU (bfloat16 also for a CPU), where tf32 rounds the factors of
    float32 to 10 bits. The vectors are stored in float16 whatever this is."""
    compiled: bool = False
    """Run CLIP through torch.compile: faster on a GPU after a minute or two at the start of each worker."""
    token_states: bool = False
    """Also store what CLIP's text tower says of every token of a caption, in float16. Priors and decoder then read that
    and run no text tower, whatever their clip_precision: a quarter of the step of a prior of the tower's size. It takes
    twice the width of the text tower in bytes for each token of each row: with 20 tokens and width 768 31 kB a row, ten
    times its embeddings and more than its picture at 256 px; 3 TB for 100 million rows, which each training reads in
    each epoch. Two windows of train.shuffle_rows (12 GB) are in use at a time on each of its machines."""
    import_from: str = ""
    """Folder of embeddings in clip-retrieval's layout (img_emb, text_emb, metadata) to take over in place of computing
    them; then the step reads no pictures, and ``clip`` must be the model that made them."""
    import_validation_prob: Share = 0.02
    """Share of the rows of ``import_from`` set aside for validation, where its metadata has no split."""
    resources: TaskResources = TaskResources(num_workers=1)
    """Workers of this step. With cuda, each CPU of a worker beyond its first is a process that decodes pictures."""

    def __post_init__(self) -> None:
        if self.token_states and self.import_from:
            raise ValueError("token_states: the folder of import_from has none, and no caption is run through CLIP")
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
    20,000), ivf_sq8 and ivf_rabitq that reaches the recall target within the memory budget, each built and measured,
    for each of z_image and z_text; ivf_rabitq if none of them fits."""
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
class EvaluateConfig(StepSection):
    """Pictures and numbers from the finished cascade."""

    num_prompts: PositiveInt = 240
    """Most prompts sampled for the numbers. None of them was trained on, unless there are no validation rows; of a file
    the first ones are taken."""
    num_trained_prompts: Annotated[int, Field(ge=0, le=280)] = 240
    """Drawn source: held-out prompts, the first ones, that are compared with prompts of the same shapes, sizes and
    places whose combinations training shows; 0: no comparison."""
    prompts_path: str = ""
    """Text file of prompts, one a line; empty: the drawn source's held-out scenes, or validation captions (training
    captions if there are no validation rows)."""
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


@configclass
class PricesConfig:
    """What a cloud asks for, for `unclip plan --cost`; what has no price is not in the bill."""

    currency: str = "USD"
    """Name of the money."""
    gpu: Literal["a100", "h100"] = "h100"
    """The GPU that ``gpu_hour`` is for. Trainings and embeddings that no time is known of are counted for it."""
    gpu_hour: NonNegativeFloat = 0.0
    """One GPU for an hour, with the CPUs that come with it."""
    cpu_hour: NonNegativeFloat = 0.0
    """One logical CPU for an hour, of a step without a GPU."""
    storage_gb_month: NonNegativeFloat = 0.0
    """10^9 bytes for a month."""
    storage_months: PositiveFloat = 1.0
    """How long the files are kept, in months."""
    reads_1000: NonNegativeFloat = 0.0
    """1,000 requests of an object store that read: GET, HEAD."""
    writes_1000: NonNegativeFloat = 0.0
    """1,000 requests of an object store that write or list: PUT, LIST."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing has a price."""
        return not any((self.gpu_hour, self.cpu_hour, self.storage_gb_month, self.reads_1000, self.writes_1000))


@configclass
class TrackingConfig:
    """MLflow; changes no artifact."""

    uri: str = ""
    """Tracking server; empty: sqlite beside the workspace; "off": none. A recipe is written beside the artifacts: give
    user and password of an MLflow server in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: str = ""
    """Experiment name; empty: the recipe's name."""
