"""Shapes and choices of every network, as data: frozen dataclasses that import neither torch nor pydantic.

Each class carries ``__pydantic_config__``, so that ``pipeline.config`` can check a recipe against it: unknown
keys and wrong types are refused there. What one field must be in view of another is checked here and raises
ValueError. Defaults follow table 3 of arXiv:2204.06125 (appendix C), scaled down to one GPU.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from models.config_base import configclass, require, require_prob
from models.config_clip import END_TOKEN, START_TOKEN, VOCAB_SIZE, ClipConfig, ClipDims

__all__ = [
    "END_TOKEN",
    "START_TOKEN",
    "VOCAB_SIZE",
    "ClipConfig",
    "ClipDims",
    "DecoderConfig",
    "DiffusionConfig",
    "PriorConfig",
    "SamplerConfig",
    "TextTransformerConfig",
    "UNetConfig",
    "UpsamplerConfig",
    "configclass",
]


@configclass
class DiffusionConfig:
    """The noising process and what the network predicts: arXiv:2102.09672."""

    num_timesteps: int = 1000
    """Length T of the noising chain, in steps (table 3: 1000)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Noise schedule (table 3: linear for 256 -> 1024, cosine elsewhere)."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """What the network predicts: the noise, the clean sample (the prior), or v (arXiv:2202.00512)."""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    """Variance of a reverse step; learned_range doubles the output channels (arXiv:2102.09672, eq. 15)."""
    loss: Literal["simple", "vlb"] = "simple"
    """simple: squared error, hybrid where the variance is learned; vlb: the variational bound alone, in bits per
    dimension (section 3.3; of pixels only). With a fixed variance it teaches the mean, as in arXiv:2006.11239."""
    timestep_draws: Literal["uniform", "loss_aware"] = "uniform"
    """Timesteps of a training batch: all alike, or in proportion to the root mean square of their last 10 losses, each
    loss weighed so that their mean estimates the same (section 3.3: for vlb, whose terms differ most)."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """Weight of each timestep in the loss; min_snr is arXiv:2303.09556."""
    min_snr_gamma: float = 5.0
    """Clamp of the signal-to-noise ratio in min_snr, dimensionless (arXiv:2303.09556: 5)."""
    vlb_weight: float = 0.001
    """Weight lambda of the variational term of the hybrid loss (arXiv:2102.09672, section 3.1: 0.001)."""

    def __post_init__(self) -> None:
        require(self.num_timesteps >= 1, f"num_timesteps = {self.num_timesteps}: at least 1")
        require(self.min_snr_gamma > 0, f"min_snr_gamma = {self.min_snr_gamma}: must be positive")
        require(self.vlb_weight >= 0, f"vlb_weight = {self.vlb_weight}: must not be negative")
        require(
            self.loss == "simple" or self.loss_weighting == "none",
            f"loss_weighting = {self.loss_weighting!r} weighs a squared error, and loss = 'vlb' has none; set 'none'",
        )


@configclass
class SamplerConfig:
    """How a trained network is sampled; part of no weight, so it can be changed at any time.

    But for the prior's analytic sampler, whose variance the end of the training measures, step by step of its walk.
    """

    method: Literal["ddpm", "ddim", "analytic", "dpmpp_2m", "heun"] = "ddpm"
    """Ancestral, DDIM (arXiv:2010.02502), Analytic-DPM (2201.06503), DPM-Solver++(2M) (2211.01095), Heun."""
    num_steps: int = 250
    """Steps taken, evenly strided over the chain, in steps."""
    respacing: str = ""
    """Timesteps in place of the even stride: "trailing" (even, ends above t = 0: arXiv:2305.08891), "fast27" (GLIDE's),
    or steps in each equal section of the chain, clean end first, as in "10,10,3,2,2"; they add up to ``num_steps``."""
    eta: float = 0.0
    """Noise of DDIM, dimensionless: 0 is deterministic, 1 is as noisy as the ancestral sampler."""
    guidance_scale: float = 1.0
    """Classifier-free guidance s in uncond + s (cond - uncond), dimensionless; 1 costs no second forward."""
    clip_guidance_scale: float = 0.0
    """Strength of the gradient of a noise-aware CLIP, dimensionless, for the decoder alone (arXiv:2112.10741, equation
    9); needs ``[noisy_clip]``. 0 turns it off. Prompts are drawn with it, and edits of pictures that have a prompt."""
    clip_x0: bool = True
    """Clip the predicted clean sample to [-clip_range, clip_range] at each step."""
    clip_range: float = 1.0
    """Half width of that range: 1 for pixels; for scaled embeddings Karlo's 5, which bounds outliers alone."""
    dynamic_threshold_prob: float = 0.0
    """Quantile of |x0| for dynamic thresholding (arXiv:2205.11487, section 2.3: 0.995); 0 turns it off."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, f"num_steps = {self.num_steps}: at least 1")
        steps = 27 if self.respacing == "fast27" else sum(self.sections)
        require(
            not steps or self.num_steps == steps,
            f"respacing = {self.respacing!r} takes {steps} steps: set num_steps = {steps}, not {self.num_steps}",
        )
        require(self.clip_range > 0, f"clip_range = {self.clip_range}: must be positive")
        require(self.eta >= 0, f"eta = {self.eta}: must not be negative")
        require(self.guidance_scale >= 0, f"guidance_scale = {self.guidance_scale}: must not be negative")
        require(self.clip_guidance_scale >= 0, f"clip_guidance_scale = {self.clip_guidance_scale}: not negative")
        require_prob("dynamic_threshold_prob", self.dynamic_threshold_prob)

    @property
    def sections(self) -> tuple[int, ...]:
        """Steps in each section of the chain where ``respacing`` gives them; ValueError if it gives nonsense."""
        if self.respacing in {"", "trailing", "fast27"}:
            return ()
        parts = [part.strip() for part in self.respacing.split(",")]
        require(
            all(part.isdecimal() and int(part) >= 1 for part in parts),
            f"respacing = {self.respacing!r}: '', 'trailing', 'fast27', or sections such as '10,10,3,2,2'",
        )
        return tuple(int(part) for part in parts)


@configclass
class PriorConfig:
    """Diffusion prior P(z_image | caption): arXiv:2204.06125, section 2.2; CLIP's widths are in ClipDims."""

    kind: Literal["diffusion"] = "diffusion"
    """Removes noise from z_image; models/config_ar_prior.py is the other kind."""
    width: int = 512
    """Width of the transformer, in features (table 3: 2048)."""
    depth: int = 12
    """Blocks of the transformer (table 3: 24)."""
    num_heads: int = 8
    """Attention heads (table 3: 32)."""
    mlp_ratio: int = 4
    """Hidden width of the feed-forward layers, as a multiple of ``width``."""
    dropout: float = 0.0
    """Dropout after attention and feed-forward, per feature (table 3 states none)."""
    text_drop_prob: float = 0.1
    """Probability of dropping the text conditioning, per sample (section 2.2: 0.1)."""
    num_candidates: int = 2
    """Samples of z_image per caption, of which the one nearest z_text is kept (section 2.2: 2)."""
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(prediction="x0"))
    """Noising of z_image; the network predicts x0 (section 2.2)."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(method="ddpm", num_steps=64, clip_x0=False))
    """Sampling of z_image (table 3: 64 steps)."""

    def __post_init__(self) -> None:
        require(
            self.num_heads >= 1 and self.width % self.num_heads == 0,
            f"width = {self.width} is not a multiple of num_heads = {self.num_heads}",
        )
        require(self.depth >= 1 and self.mlp_ratio >= 1, "depth and mlp_ratio: at least 1")
        require(self.num_candidates >= 1, f"num_candidates = {self.num_candidates}: at least 1")
        require_prob("dropout", self.dropout)
        require_prob("text_drop_prob", self.text_drop_prob)
        require(
            self.diffusion.variance != "learned_range",
            "diffusion.variance = 'learned_range': the prior predicts the embedding alone; use fixed_small",
        )
        require(
            self.diffusion.loss == "simple",
            "diffusion.loss = 'vlb' bounds the likelihood of 256 grey levels, which an embedding has not; set 'simple'",
        )
        require(self.sampler.clip_guidance_scale == 0, "sampler.clip_guidance_scale: of the decoder alone; set 0.0")
        _require_steps(self.sampler, self.diffusion)


@configclass
class UNetConfig:
    """Shape of an ADM UNet: arXiv:2105.05233, with the key-value context of GLIDE (arXiv:2112.10741)."""

    channels: int = 128
    """Channels of the first level (table 3: 512 / 320 / 192)."""
    channel_mults: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level as a multiple of ``channels``; each level halves the side (table 3: 1,2,3,4)."""
    num_res_blocks: int = 3
    """Residual blocks per level on the way down; one more on the way up (table 3: 3 / 3 / 2)."""
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    """Sides of the levels with attention, in pixels (table 3: 32,16,8); if none, the middle has none too."""
    head_channels: int = 64
    """Channels per attention head (table 3: 64)."""
    norm_groups: int = 32
    """Groups of each group normalisation."""
    time_norm: Literal["scale_shift", "add"] = "scale_shift"
    """How the timestep enters a residual block: after the norm as scale and shift (ADM), or added before it."""
    dropout: float = 0.1
    """Dropout inside the residual blocks, per feature (table 3: 0.1)."""
    patch_px: int = 1
    """Side of the square of pixels folded into the channels before the first level and unfolded after the last, in
    pixels (arXiv:1609.05158): 1 is the paper's network; 2 and 4 trade the finest level for speed."""
    position_bands: int = 0
    """Octaves of sines and cosines of a pixel's place that are appended to the input (arXiv:1807.03247, with the
    features of arXiv:2006.10739): 0 is the paper's network; a few let a small network place and outline what the
    condition asks for after fewer steps. Not for networks that are trained on crops."""

    def __post_init__(self) -> None:
        require(self.patch_px >= 1, f"patch_px = {self.patch_px}: at least 1")
        require(self.position_bands >= 0, f"position_bands = {self.position_bands}: must not be negative")
        require(
            self.num_res_blocks >= 1 and len(self.channel_mults) >= 1 and min(self.channel_mults) >= 1,
            f"num_res_blocks = {self.num_res_blocks}, channel_mults = {self.channel_mults}: each at least 1",
        )
        require(
            self.norm_groups >= 1 and self.channels % self.norm_groups == 0,
            f"channels = {self.channels} is not a multiple of norm_groups = {self.norm_groups}",
        )
        require(self.channels % 2 == 0, f"channels = {self.channels}: must be even")
        require(self.head_channels >= 1, f"head_channels = {self.head_channels}: at least 1")
        require_prob("dropout", self.dropout)

    def level_sides_px(self, image_px: int) -> tuple[int, ...]:
        """Side of each level for pictures of side ``image_px``, in pixels."""
        return tuple(image_px // self.patch_px // 2**level for level in range(len(self.channel_mults)))

    def require_fits(self, image_px: int) -> None:
        """Raise ValueError unless pictures of side ``image_px`` pass through every level."""
        factor = self.patch_px * 2 ** (len(self.channel_mults) - 1)
        require(
            image_px >= factor and image_px % factor == 0,
            f"image_px = {image_px} is not a multiple of {factor} (patch_px times a halving for each further level)",
        )
        sides = self.level_sides_px(image_px)
        missing = [side for side in self.attention_resolutions if side not in sides]
        require(not missing, f"attention_resolutions {missing} are not among the levels {sides}, in pixels")
        for side, mult in zip(sides, self.channel_mults, strict=True):
            if side in self.attention_resolutions:
                self._require_heads(mult)
        if self.attention_resolutions:
            self._require_heads(self.channel_mults[-1])

    def _require_heads(self, mult: int) -> None:
        require(
            (self.channels * mult) % self.head_channels == 0,
            f"{self.channels * mult} channels at a level with attention: not a multiple of "
            f"head_channels = {self.head_channels}",
        )


@configclass
class TextTransformerConfig:
    """GLIDE's text transformer (arXiv:2112.10741, section 4.1), trained with the decoder that reads it."""

    width: int = 512
    """Width, in features (table 3: 2048)."""
    depth: int = 12
    """Blocks (table 3: 24)."""
    num_heads: int = 8
    """Attention heads (table 3: 32)."""
    mlp_ratio: int = 4
    """Hidden width of the feed-forward layers, as a multiple of ``width``."""

    def __post_init__(self) -> None:
        require(
            self.num_heads >= 1 and self.width % self.num_heads == 0,
            f"width = {self.width} is not a multiple of num_heads = {self.num_heads}",
        )
        require(self.depth >= 1 and self.mlp_ratio >= 1, "depth and mlp_ratio: at least 1")


@configclass
class DecoderConfig:
    """P(image | z_image, caption) at the lowest resolution: arXiv:2204.06125, section 2.1."""

    image_px: int = 64
    """Side of the generated picture, in pixels (table 3: 64)."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Shape of the UNet."""
    num_image_tokens: int = 4
    """Context tokens that z_image is projected to (section 2.1: 4)."""
    context_width: int = 512
    """Width of the tokens that the attention of the UNet reads, in features (GLIDE: 512)."""
    text_transformer: TextTransformerConfig | None = None
    """The paper's text path: a transformer on the caption's tokens, trained with the decoder. Without the table the
    decoder reads the token states of the frozen CLIP, as Karlo does: cheaper, and exportable to diffusers."""
    image_drop_prob: float = 0.1
    """Probability of dropping z_image, per sample (section 2.1: 0.1)."""
    text_drop_prob: float = 0.5
    """Probability of dropping the caption, per sample (section 2.1: 0.5)."""
    inpainting: bool = False
    """Whether the network reads, in four further input channels, a known part of the picture (arXiv:2112.10741,
    section 4.3); random parts are shown to it in training. Without them inpainting puts known pixels back each step."""
    unknown_prob: float = 0.5
    """With ``inpainting``: probability that no part is shown, per sample, so that whole pictures are learned too."""
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(variance="learned_range"))
    """Noising of the picture; learned variance (table 3)."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(num_steps=250, guidance_scale=1.25))
    """Sampling (table 3: 250 steps; figure 11: guidance 1.25 has the best FID)."""

    def __post_init__(self) -> None:
        require(self.num_image_tokens >= 1, f"num_image_tokens = {self.num_image_tokens}: at least 1")
        require(self.context_width >= 1, f"context_width = {self.context_width}: at least 1")
        require_prob("image_drop_prob", self.image_drop_prob)
        require_prob("text_drop_prob", self.text_drop_prob)
        self.unet.require_fits(self.image_px)
        _require_steps(self.sampler, self.diffusion)
        _require_measured(self.sampler)


@configclass
class UpsamplerConfig:
    """P(image | smaller image), convolution only and unguided: arXiv:2204.06125, section 2.1."""

    image_px: int = 256
    """Side of the generated picture, in pixels (table 3: 256, 1024)."""
    low_res_px: int = 64
    """Side of the picture it starts from, in pixels (table 3: 64, 256)."""
    crop_px: int = 64
    """Side of the training crops of the large picture, in pixels (table 3: a quarter of ``image_px``)."""
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(channels=96, attention_resolutions=()))
    """Shape of the UNet; no attention."""
    rounded: bool = True
    """Whether the small picture is rounded to 256 levels, and its enlargement clipped to [-1, 1], as if it came from
    a file (GLIDE's sampling does the former). Off: as diffusers' pipeline and Karlo have it; see ``unclip export``."""
    degradation: Literal["blur", "bsr", "none"] = "blur"
    """Corruption of the small picture in training (section 2.1: blur for 64 -> 256, BSR for 256 -> 1024)."""
    noise_level_max: float = 0.0
    """Largest share of noise in the enlarged small picture in training, drawn per sample from 0 on and told to the
    network in a further input channel (arXiv:2106.15282, section 3): 0 is the paper's upsampler, without either."""
    noise_level: float = 0.0
    """Share of noise in the enlarged small picture in sampling; at most ``noise_level_max``."""
    residual: bool = False
    """Whether the network predicts what the enlarged small picture lacks, instead of the large picture (with
    ``diffusion.prediction`` x0 alone): off is the paper's; on, a small network starts from bicubic enlargement."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Noising of the picture."""
    sampler: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(method="ddim", num_steps=27, respacing="fast27")
    )
    """Sampling (table 3: DDIM, 27 and 15 steps)."""

    def __post_init__(self) -> None:
        require(
            self.unet.position_bands == 0, "unet.position_bands: an upsampler is trained on crops, where places differ"
        )
        require(not self.unet.attention_resolutions, "unet.attention_resolutions: an upsampler has none")
        require(
            0 < self.low_res_px < self.image_px and self.image_px % self.low_res_px == 0,
            f"image_px = {self.image_px} is not a larger multiple of low_res_px = {self.low_res_px}",
        )
        factor = self.image_px // self.low_res_px
        require(
            0 < self.crop_px <= self.image_px and self.crop_px % factor == 0,
            f"crop_px = {self.crop_px}: at most image_px, and a multiple of {factor}",
        )
        self.unet.require_fits(self.image_px)
        self.unet.require_fits(self.crop_px)
        require(0 <= self.noise_level_max < 1, f"noise_level_max = {self.noise_level_max}: must be in [0, 1)")
        require(
            0 <= self.noise_level <= self.noise_level_max,
            f"noise_level = {self.noise_level}: between 0 and noise_level_max = {self.noise_level_max}",
        )
        require(
            not self.residual or self.diffusion.prediction == "x0",
            f"residual = true needs diffusion.prediction = 'x0', not {self.diffusion.prediction!r}",
        )
        _require_steps(self.sampler, self.diffusion)
        _require_measured(self.sampler)
        require(self.sampler.guidance_scale == 1.0, "sampler.guidance_scale: an upsampler is not guided; set 1.0")
        require(self.sampler.clip_guidance_scale == 0, "sampler.clip_guidance_scale: of the decoder alone; set 0.0")


def _require_steps(sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
    require(
        sampler.num_steps <= diffusion.num_timesteps,
        f"sampler.num_steps = {sampler.num_steps} is above num_timesteps = {diffusion.num_timesteps}",
    )
    longest = diffusion.num_timesteps // max(1, len(sampler.sections))
    require(
        max(sampler.sections, default=0) <= longest,
        f"sampler.respacing = {sampler.respacing!r}: its sections span {longest} timesteps each",
    )


def _require_measured(sampler: SamplerConfig) -> None:
    require(
        sampler.method != "analytic",
        "sampler.method = 'analytic': its variance is measured for the prior alone; use ddpm, ddim or dpmpp_2m",
    )
