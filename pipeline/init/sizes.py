"""Recipe tables that `unclip init` proposes for a number of pairs, for a CPU and for one GPU."""

import json
from dataclasses import dataclass
from typing import Any

from pipeline.recipe.sections import EvaluateConfig

Tables = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """One size of the networks, from which only the number of steps varies."""

    sides_px: tuple[int, ...]
    """Sides of the pictures that the decoder and the upsamplers make."""
    least_steps: int
    """Steps of CLIP below which a smaller size makes better use of the time."""
    num_prompts: int = 240
    """Prompts of the evaluation."""

    @property
    def text(self) -> str:
        """The sides in words."""
        return " -> ".join(map(str, self.sides_px)) + " px"


CPU_SIZES = (Size((32, 64, 128), 500), Size((16, 64, 128), 500), Size((16, 64), 200, num_prompts=64))
"""From the largest to the smallest; the second has the sides of the demo."""
GPU_SIZES = (Size((64, 256), 1_000),)
_MIN_CPU_STEPS, MOST_CPU_STEPS = 200, 4_000
_MIN_GPU_STEPS, MOST_GPU_STEPS = 5_000, 200_000
_DECODER_BATCH, _LEAST_SHARE = 64, 16
"""Samples of a decoder's batch, and the fewest of one worker: with 16 for 32 a step still takes .73 of the time, and
smaller shares were not measured (docs/lab.md)."""


def default_steps(num_pairs: int, *, gpu: bool) -> int:
    """Steps of CLIP on a CPU, of the prior on a GPU: they grow with the pairs and stay within an evening."""
    least, most, per_step = (_MIN_GPU_STEPS, MOST_GPU_STEPS, 2) if gpu else (_MIN_CPU_STEPS, MOST_CPU_STEPS, 4)
    return max(least, min(most, num_pairs // per_step))


def cpu_tables(num_pairs: int, validation_prob: float, size: Size, steps: int, num_cpus: int) -> Tables:
    """A small cascade with the settings of the demo (docs/decisions.md).

    The decoder takes most of the arithmetic, so its batches are divided among the cores, as far as that pays. The other
    trainings have one core each, and run side by side: the batch norms of CLIP's ResNet would see a share of each batch
    alone, and nothing waits for prior and upsamplers that does not wait for the decoder.

    Args:
        num_pairs: Pairs of the source.
        validation_prob: Share of them that is not trained on.
        size: Sides of the pictures.
        steps: Steps of CLIP and the upsamplers; decoder and prior take twice as many.
        num_cpus: Logical CPUs of the machine.
    """
    base_px, mid_px, *others = size.sides_px
    final_px = size.sides_px[-1]
    tables: Tables = {
        "download": _download(num_pairs, final_px),
        "clip": {
            "model": {
                "embed_dim": 64,
                "image_px": 32,
                "vision_layers": [1, 1, 1, 1],
                "vision_width": 24,
                "text_width": 64,
                "text_heads": 2,
                "text_layers": 2,
                "context_length": 32,
            },
            "train": _cpu_training(steps, _clip_batch(num_pairs, validation_prob), weight_decay=0.05, ema_decay=0.98),
        },
        "prior": {
            "model": {
                "width": 192,
                "depth": 4,
                "num_heads": 4,
                "sampler": {"method": "ddim", "num_steps": 16, "clip_x0": False},
            },
            "train": _cpu_training(2 * steps, 128, optimizer="muon", ema_decay=0.99),
        },
        "decoder": {
            "model": {
                "image_px": base_px,
                "context_width": 64,
                "text_drop_prob": 0.1,
                # On these networks it made the decoder read from the tokens which colour belongs to what (docs/lab.md).
                "pooled_drop_prob": 0.1,
                # It made the demo's decoder draw things where the caption puts them; photographs were not measured.
                "sketch_px": base_px // 2,
                "text_adapter": {"depth": 2, "code_width": 64},
                "unet": _unet(64, patch_px=2)
                | {
                    "channel_mults": [1, 1],
                    "attention_resolutions": [base_px // 2, base_px // 4],
                    "head_channels": 32,
                    "position_bands": 3,
                },
                "diffusion": {"prediction": "v", "variance": "fixed_small", "loss_weighting": "min_snr"},
                "sampler": {"method": "ddpm", "num_steps": 50, "guidance_scale": 2.0},
            },
            "train": _cpu_training(2 * steps, _DECODER_BATCH, optimizer="muon", learning_rate=4e-3, ema_decay=0.995),
            "resources": {"num_workers": max(1, min(num_cpus, _DECODER_BATCH // _LEAST_SHARE))},
        },
        "upsampler_1": _cpu_upsampler(base_px, mid_px, steps, patch_px=2, sampling_steps=8),
    }
    if others:
        tables["upsampler_2"] = _cpu_upsampler(mid_px, final_px, steps, patch_px=4, sampling_steps=6)
    if size.num_prompts != EvaluateConfig().num_prompts:
        tables["evaluate"] = {"num_prompts": size.num_prompts}
    return tables


def gpu_tables(num_pairs: int, steps: int) -> Tables:
    """A 64 -> 256 px cascade for one GPU, with the networks of configs/single-gpu.toml over a frozen public CLIP.

    To train a CLIP on photographs takes millions of pairs; the preset trains one because its pictures are only shapes.
    """
    unet = {"num_res_blocks": 2}
    return {
        "download": _download(num_pairs, 256),
        "clip": {"source": "pretrained", "name": "ViT-L-14", "tag": "laion2b_s32b_b82k"},
        "embed": {"resources": {"accelerator": "cuda"}},
        "prior": _on_gpu(steps, 512, 3e-4),
        "decoder": {
            "model": {
                "unet": unet | {"channels": 96, "head_channels": 48},
                "sampler": {"method": "dpmpp_2m", "num_steps": 25, "guidance_scale": 2.0},
            },
            **_on_gpu(steps, 64, 2e-4),
        },
        "upsampler_1": {
            "model": {"unet": unet | {"channels": 64, "channel_mults": [1, 2, 3]}},
            **_on_gpu(steps // 2, 32, 2e-4),
        },
        "evaluate": {"resources": {"num_workers": 1, "accelerator": "cuda"}},
        "serve": {"accelerator": "cuda"},
    }


def _on_gpu(num_steps: int, batch_size: int, learning_rate: float) -> Tables:
    fixed = {"lr_schedule": "cosine", "warmup_steps": 500, "ema_decay": 0.999, "precision": "bfloat16"}
    resources = {"accelerator": "cuda", "gpu_memory_gb": 24, "cpus_per_worker": 4.0, "save_every_steps": 1000}
    return {
        "train": {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate} | fixed,
        "resources": resources,
    }


def as_toml(tables: Tables, name: str = "") -> str:
    """Tables as TOML with short lists on one line.

    A value is written as JSON without escapes for non-ASCII characters, because TOML has no surrogate pairs. DEL is the
    one character that TOML requires to be escaped and JSON does not.
    """
    texts = {key: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") for key, value in tables.items()}
    lines = [f"{key} = {texts[key]}\n" for key, value in tables.items() if not isinstance(value, dict)]
    head = f"\n[{name}]\n" if lines and name else ""
    prefix = f"{name}." if name else ""
    inner = [as_toml(value, f"{prefix}{key}") for key, value in tables.items() if isinstance(value, dict)]
    return head + "".join(lines) + "".join(inner)


def _download(num_pairs: int, image_px: int) -> Tables:
    """A shard holds a few minutes of work, and there are enough shards for several workers."""
    return {"samples_per_shard": max(16, min(10_000, num_pairs // 8)), "image_px": image_px}


def _clip_batch(num_pairs: int, validation_prob: float) -> int:
    """128 rows, or fewer than the training pairs: the contrastive loss would take a repeated pair for a negative."""
    num_train = int(num_pairs * (1 - validation_prob))
    return next((size for size in (128, 64, 32, 16, 8) if size <= num_train), 4)


def _cpu_training(num_steps: int, batch_size: int, *, learning_rate: float = 2e-3, **other: Any) -> Tables:
    fixed = {"lr_schedule": "cosine", "warmup_steps": 20, "beta2": 0.99}
    return {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate} | fixed | other


def _unet(channels: int, *, patch_px: int) -> Tables:
    return {
        "channels": channels,
        "channel_mults": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "norm_groups": 8,
        "dropout": 0.0,
        "patch_px": patch_px,
    }


def _cpu_upsampler(low_res_px: int, image_px: int, num_steps: int, *, patch_px: int, sampling_steps: int) -> Tables:
    return {
        "model": {
            "low_res_px": low_res_px,
            "image_px": image_px,
            "crop_px": image_px // 2,
            "degradation": "blur",
            "residual": True,
            "unet": _unet(32, patch_px=patch_px),
            "diffusion": {"prediction": "x0", "loss_weighting": "min_snr"},
            "sampler": {"method": "dpmpp_2m", "respacing": "", "num_steps": sampling_steps},
        },
        "train": _cpu_training(num_steps, 32, optimizer="muon", ema_decay=0.99),
    }
