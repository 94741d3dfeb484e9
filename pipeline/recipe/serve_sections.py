"""The section of a recipe that says how its networks are served; it changes no artifact."""

from dataclasses import field
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from models.configclass import configclass
from pipeline.recipe.sections import Port, Precision


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
    scale_down_after_s: NonNegativeFloat = 600.0
    """How long fewer copies would do before one is ended, in seconds; it finishes its requests."""
    cpus_per_replica: PositiveFloat = 1.0
    """Logical CPUs of each; also its torch threads."""
    gpus_per_replica: PositiveFloat = 1.0
    """GPUs of each with serve.accelerator = "cuda"; parts that share one have fractions."""
    memory_gb_per_replica: NonNegativeFloat = 0.0
    """Memory of each that Ray reserves, in GB, and above which one on CPUs takes no second picture into a step; 0:
    none."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that its machines must have, beside those of serve.label_selector."""
    max_batch_size: int = 0
    """Pictures in one forward pass; 0: serve.max_batch_size."""

    def __post_init__(self) -> None:
        _require_order(self.replicas)


@configclass
class ServeGatewayConfig:
    """The processes that speak HTTP, where Ray Serve places them: with --config-only and --manifest."""

    replicas: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Fewest and most of them. Limits of keys hold over all of them, to what is used within half a second."""
    target_requests: PositiveFloat = 100.0
    """Requests of each, above which another one is started."""
    scale_down_after_s: NonNegativeFloat = 600.0
    """How long fewer of them would do before one is ended, in seconds; it finishes its requests."""
    cpus_per_replica: NonNegativeFloat = 0.0
    """Logical CPUs that each reserves."""
    memory_gb_per_replica: NonNegativeFloat = 0.0
    """Memory of each that Ray reserves, in GB; 0: none. Each reads the index, unless serve.neighbours does."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that their machines must have."""

    def __post_init__(self) -> None:
        _require_order(self.replicas)


@configclass
class ServeConfig:
    """The server; changes no artifact."""

    name: str = ""
    """Name of the model, and of the server on its cluster; empty: the recipe's."""
    networks: str = ""
    """Alias of a version of the tracker's registered model, for example "champion", whose networks are served as they
    were measured: at the start, and again at each SIGHUP. Empty: the recipe's own networks."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach is refused without a key."""
    port: Port = 8000
    """Port to listen on."""
    drain_s: NonNegativeFloat = 60.0
    """Longest time that requests under way are waited for at the end, in seconds; so long, and while requests of them
    are under way, networks also stay in memory once others are swapped in."""
    timeout_s: NonNegativeFloat = 0.0
    """Longest time from when a request's body has come until pictures, embeddings or neighbours are there, in seconds;
    then it is dropped, and answered with 504. A request may have a shorter one (`timeout`). 0: none."""
    mode: Literal["replica", "chain", "process"] = "replica"
    """replica: every copy has all networks. chain: CLIP and the prior, the decoder and each upsampler run apart, each
    as its table below says, and requests pass from one to the next. process: the networks run in the process that
    speaks HTTP, without Ray: for a laptop, and for one GPU."""
    prior: ServeStageConfig = ServeStageConfig()
    """CLIP and the prior, in a chain."""
    decoder: ServeStageConfig = ServeStageConfig()
    """The decoder, in a chain."""
    upsampler_1: ServeStageConfig = ServeStageConfig()
    """The first upsampler, in a chain."""
    upsampler_2: ServeStageConfig = ServeStageConfig()
    """The second upsampler, in a chain."""
    gateway: ServeGatewayConfig = ServeGatewayConfig()
    """The processes that speak HTTP; `unclip serve` itself is always one."""
    neighbours: ServeStageConfig | None = None
    """The index of the pairs, in a chain; without this table it is read by the process that speaks HTTP."""
    replicas: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Fewest and most copies of the cascade; Ray Serve starts more while requests wait, and ends them again."""
    spare: bool = True
    """Whether `unclip serve` on a Ray of its own keeps a process idle, about .45 GB, in which a copy that was killed is
    started again: that takes some seconds then, and two to four times as many in a new process."""
    target_requests: PositiveFloat = 16.0
    """Requests of each copy, under way or waiting, above which another one is started."""
    scale_down_after_s: NonNegativeFloat = 600.0
    """How long fewer copies would do before one is ended, in seconds; it finishes its requests."""
    cpus_per_replica: PositiveFloat = 1.0
    """Logical CPUs of each; also its torch threads."""
    gpus_per_replica: PositiveFloat = 1.0
    """GPUs of each with serve.accelerator = "cuda"; copies that share one have fractions, and as much of its memory."""
    memory_gb_per_replica: NonNegativeFloat = 0.0
    """Memory of each that Ray reserves, in GB, and above which one on CPUs takes no second picture into a step; 0:
    none."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Device of each."""
    precision: Precision = "float32"
    """Of the products in a step of a diffusion network (docs/lab.md has what it costs and saves). With float32 no GPU
    rounds to TF32, and a seed gives the same picture whatever requests are in the batch, to a grey level; in halves it
    does not, up to 26 levels. tf32 and float16 need a GPU."""
    compiled: bool = False
    """Whether torch.compile makes the diffusion networks quicker, and their start some minutes longer."""
    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    """Labels of Ray that its machines must have, for example {"unclip-role" = "serve"} with cluster.yaml."""
    max_batch_size: PositiveInt = 16
    """Pictures in one forward pass."""
    max_queued_requests: PositiveInt = 64
    """Requests waiting before new ones get 429; a client without its share of them is still let in (docs/http.md)."""
    keys: str = ""
    """File of `unclip keys`; when set, requests must carry one of its keys: Authorization: Bearer KEY."""
    hosts: tuple[str, ...] = ()
    """Names of this server, beside localhost and addresses; requests to other names are refused."""
    access_log: str = ""
    """File that gets a JSON object a line for each request; empty: none."""
    log_prompts: bool = False
    """Whether the access log holds prompts."""
    traces: str = ""
    """URL of a collector of OpenTelemetry that takes OTLP over HTTP, for example "http://127.0.0.1:4318"; every request
    is then a trace. It needs `make setup EXTRA=cpu,traces`, or `gpu,traces`. Empty: none."""
    safety_hook: str = ""
    """MODULE:FUNCTION that may refuse a prompt or blank a picture (docs/serving.md)."""
    provenance: str = ""
    """File of an Ed25519 private key (PEM) that signs the PNG files, so that `unclip lineage` shows who made a picture,
    and that it is unchanged; empty: no signature."""
    image_urls: bool = False
    """Whether a search may name a picture by its URL, which the server then fetches: from public addresses alone, up to
    16 MB, within 10 s."""
    safe_rows: str = ""
    """Which rows a search with use_safety_model or use_violence_detector finds, as `unclip search --where` takes it
    ("punsafe < 0.1"). clip-retrieval's client sends both by default. Empty: they have no effect."""
    aliases: tuple[str, ...] = ()
    """Other names of the model, for clients that are built with one ("dall-e-2", "gpt-image-1")."""

    def __post_init__(self) -> None:
        _require_order(self.replicas)
        if self.traces and not self.traces.startswith(("http://", "https://")):
            raise ValueError(f"traces = {self.traces!r} is no URL of http:// or https://")
        if self.precision in {"tf32", "float16"} and self.accelerator == "cpu":
            raise ValueError(f'precision = "{self.precision}" needs accelerator = "cuda"')
        stages = {name: getattr(self, name) for name in ("prior", "decoder", "upsampler_1", "upsampler_2")}
        unused = [f"serve.{name}" for name, stage in stages.items() if stage != ServeStageConfig()]
        if self.neighbours is not None:
            unused.append("serve.neighbours")
            if (self.neighbours.gpus_per_replica, self.neighbours.max_batch_size) != (1.0, 0):
                raise ValueError("neighbours: the index takes no GPU and has no batches")
        if self.mode == "process" and self.replicas != (1, 1):
            raise ValueError('replicas: one copy is all that serve.mode = "process" has')
        if self.mode != "chain" and unused:
            raise ValueError(f'{", ".join(unused)}: only read with serve.mode = "chain"')
