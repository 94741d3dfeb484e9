"""``unclip init``: look at a person's pairs and write a short recipe for them and for this machine."""

import json
import os
from pathlib import Path

from pipeline.config import PairsConfig
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import load_recipe
from pipeline.stages.folders import PICTURES
from pipeline.stages.lists import list_columns, list_files
from pipeline.stages.pairs import PairsSummary, source_batches

_URL_COLUMNS = ("url", "image_url", "img_url", "link", "image", "src")
_CAPTION_COLUMNS = ("caption", "text", "title", "description", "alt_text", "alt", "prompt", "top_caption")

_CPU = """
# A small cascade for a machine without a GPU: {base_px} -> {mid_px} -> {final_px} px.
[clip.model]
embed_dim = 64
image_px = {clip_px}
vision_layers = [1, 1, 1, 1]
vision_width = 24
text_width = 64
text_heads = 4
text_layers = 2
context_length = 32
[clip.train]
num_steps = {clip_steps}
batch_size = 64
learning_rate = 1e-3
lr_schedule = "cosine"
ema_decay = 0.99

[prior.model]
width = 192
depth = 4
num_heads = 4
[prior.train]
num_steps = {prior_steps}
batch_size = 128
learning_rate = 6e-4
lr_schedule = "cosine"
ema_decay = 0.995

[decoder.model]
image_px = {base_px}
[decoder.model.unet]
channels = 48
channel_mults = [1, 2, 3]
num_res_blocks = 1
attention_resolutions = [{attention_px}]
head_channels = 24
norm_groups = 8
dropout = 0.0
[decoder.model.sampler]
method = "dpmpp_2m"
num_steps = 20
guidance_scale = 2.0
[decoder.train]
num_steps = {decoder_steps}
batch_size = 48
learning_rate = 1e-3
lr_schedule = "cosine"
ema_decay = 0.995

[upsampler_1.model]
low_res_px = {base_px}
image_px = {mid_px}
crop_px = {mid_crop_px}
[upsampler_1.model.unet]
channels = 24
channel_mults = [1, 2]
num_res_blocks = 1
attention_resolutions = []
norm_groups = 8
dropout = 0.0
[upsampler_1.model.sampler]
method = "dpmpp_2m"
respacing = ""
num_steps = 10
[upsampler_1.train]
num_steps = {upsampler_steps}
batch_size = 32
learning_rate = 1e-3
lr_schedule = "cosine"
ema_decay = 0.99

[upsampler_2.model]
low_res_px = {mid_px}
image_px = {final_px}
crop_px = {final_crop_px}
[upsampler_2.model.unet]
channels = 16
channel_mults = [1, 2]
num_res_blocks = 1
attention_resolutions = []
norm_groups = 8
dropout = 0.0
[upsampler_2.model.sampler]
method = "dpmpp_2m"
respacing = ""
num_steps = 8
[upsampler_2.train]
num_steps = {upsampler_steps}
batch_size = 32
learning_rate = 1e-3
lr_schedule = "cosine"
ema_decay = 0.99
"""

_GPU = """
# A frozen public CLIP and a 64 -> 256 px cascade for one GPU.
[clip]
source = "pretrained"
name = "ViT-L-14"
tag = "laion2b_s32b_b82k"

[embed.resources]
num_workers = 1
accelerator = "cuda"

[prior.train]
num_steps = {prior_steps}
batch_size = 512
learning_rate = 1.1e-4
beta2 = 0.96
eps = 1e-6
weight_decay = 0.06
precision = "bfloat16"
[prior.resources]
accelerator = "cuda"
cpus_per_worker = 4.0
save_every_steps = 1000

[decoder.train]
num_steps = {decoder_steps}
batch_size = 64
learning_rate = 1.2e-4
precision = "bfloat16"
[decoder.resources]
accelerator = "cuda"
cpus_per_worker = 4.0
save_every_steps = 1000

[upsampler_1.model]
low_res_px = 64
image_px = 256
crop_px = 64
[upsampler_1.train]
num_steps = {decoder_steps}
batch_size = 64
learning_rate = 1.2e-4
precision = "bfloat16"
[upsampler_1.resources]
accelerator = "cuda"
cpus_per_worker = 4.0
save_every_steps = 1000

[evaluate.resources]
num_workers = 1
accelerator = "cuda"

[serve]
accelerator = "cuda"
"""


def write_recipe(
    source: str,
    out: str,
    *,
    url_column: str = "",
    caption_column: str = "",
    force: bool = False,
    gpu: bool | None = None,
) -> str:
    """Write a recipe for a list of URLs and captions, or for a folder of pictures.

    Args:
        source: The list or the folder.
        out: Recipe file to write.
        url_column: Column of the URLs; empty: found by name.
        caption_column: Column of the captions; empty: found by name.
        force: Replace ``out`` if it is there.
        gpu: Whether this machine trains on a GPU; None: look for one.

    Returns:
        What was found, for a person.

    Raises:
        ConfigError: If ``out`` exists, or the columns are not found; names the columns there are.
        DataError: If the source cannot be read, or holds no pair.
    """
    target, path = Path(out), Path(source)
    if target.exists() and not force:
        raise ConfigError(f"{out} exists; choose another --out, or replace it with --force")
    if not path.exists():
        raise ConfigError(f"{source}: no such list or folder")
    folder = path.is_dir() and any(file.suffix.lower() in PICTURES for file in path.rglob("*"))
    if folder:
        pairs = PairsConfig(source="folder", path=str(path))
        columns = ""
    else:
        names = list_columns(list_files(path)[0])
        url = _find(names, url_column, _URL_COLUMNS, source, "--url-column")
        caption = _find(names, caption_column, _CAPTION_COLUMNS, source, "--caption-column")
        pairs = PairsConfig(source="list", path=str(path), url_column=url, caption_column=caption)
        columns = f"url_column = {json.dumps(url)}\ncaption_column = {json.dumps(caption)}\n"
    num_pairs = sum(batch.num_rows for batch in source_batches(pairs, PairsSummary()))
    if num_pairs == 0:
        raise DataError(f"{source}: holds no pairs")
    on_gpu = Path("/proc/driver/nvidia/version").exists() if gpu is None else gpu
    text = _header(target.stem, pairs, columns, num_pairs) + _sized(num_pairs, on_gpu)
    target.write_text(text, encoding="utf-8")
    load_recipe(target)
    kind = "pictures in a folder" if folder else f"rows (url: {pairs.url_column}, caption: {pairs.caption_column})"
    return f"{num_pairs} {kind}; sized for {'one GPU' if on_gpu else f'{os.cpu_count()} CPU cores'}"


def _find(names: list[str], wanted: str, known: tuple[str, ...], source: str, option: str) -> str:
    by_lower = {name.lower(): name for name in reversed(names)}
    for candidate in (wanted,) if wanted else known:
        if candidate in names:
            return candidate
        if candidate.lower() in by_lower:
            return by_lower[candidate.lower()]
    what = f"no column {wanted}" if wanted else f"none of the columns {', '.join(known)}"
    raise ConfigError(f"{source}: {what}; it has {', '.join(names)}: name one with {option}")


def _header(name: str, pairs: PairsConfig, columns: str, num_pairs: int) -> str:
    return (
        f"name = {json.dumps(name)}\nworkspace = {json.dumps(f'workspace/{name}')}\n\n"
        f"[pairs]\nsource = {json.dumps(pairs.source)}\npath = {json.dumps(pairs.path)}\n{columns}"
        f"validation_prob = {0.02 if num_pairs >= 1000 else 0.1}\n"
    )


def _sized(num_pairs: int, on_gpu: bool) -> str:
    """Steps grow with the data and stay within an evening; a shard holds a few minutes of work."""
    shard = max(16, min(10_000, num_pairs // 8))
    lines = f"\n[download]\nsamples_per_shard = {shard}\nimage_px = {256 if on_gpu else 128}\n"
    if on_gpu:
        passes = max(5_000, min(200_000, num_pairs // 8))
        return lines + _GPU.format(prior_steps=passes, decoder_steps=passes)
    steps = max(200, min(4_000, num_pairs // 4))
    return lines + _CPU.format(
        clip_px=64,
        base_px=32,
        attention_px=8,
        mid_px=64,
        mid_crop_px=32,
        final_px=128,
        final_crop_px=64,
        clip_steps=steps,
        prior_steps=2 * steps,
        decoder_steps=2 * steps,
        upsampler_steps=steps,
    )
