"""Shape and choices of the decoder, as data: arXiv:2204.06125, section 2.1."""

from __future__ import annotations

from dataclasses import field

from models.configclass import configclass, require, require_norm, require_prob
from models.diffusion.config import DiffusionConfig, SamplerConfig, require_measured, require_steps
from models.layers.config import UNetConfig, require_transformer


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
        require_transformer(self.width, self.depth, self.num_heads)
        require(self.mlp_ratio >= 1, f"mlp_ratio = {self.mlp_ratio}: at least 1")


@configclass
class TextAdapterConfig:
    """Transformer blocks on the frozen CLIP's token states, trained with the decoder that reads them.

    CLIP's text tower is causal, so the first object of "a star to the left of a circle" does not know where it stands.
    In these blocks each token reads the whole caption, as in MiniT2I, which has two such blocks on a frozen T5 ("A
    Minimalist Baseline for Text-to-Image Generation", 2026, github.com/PeppaKing8/minit2i-jax). What they change in the
    demo is in docs/lab.md.
    Width and heads are those of the context: ``context_width``, in heads of ``head_width``.
    """

    depth: int = 0
    """Blocks (MiniT2I: 2); 0: the decoder reads the states as they are, and the other fields do not matter."""
    head_width: int = 32
    """Features of each attention head; it divides ``context_width``."""
    mlp_ratio: int = 4
    """Hidden width of the feed-forward layers, as a multiple of ``context_width``."""
    code_width: int = 0
    """Width of a fixed random code of each token, which is projected and added to its state; 0: none. CLIP's states
    tell shapes less clearly than words do, so with it a decoder learns sooner which shape each object has. The
    projection alone is learned: a table of the vocabulary takes most of a small network, and most of its rows never
    move. As wide as ``context_width``, and 32 or more with Muon, which leaves smaller matrices to AdamW. From no paper:
    what was measured is in docs/lab.md."""
    one_way_heads: bool = False
    """Whether half of the heads read only what stands before a token, and the others what stands after it (directional
    self-attention, DiSAN, arXiv:1709.04696). What a word says of the words on its left and of those on its right is
    then told apart from the first step on. Positions begin with a standard deviation of 0.2 in place of 0.01."""

    def __post_init__(self) -> None:
        require(self.depth >= 0, f"depth = {self.depth}: must not be negative")
        require(self.code_width >= 0, f"code_width = {self.code_width}: must not be negative")
        require(self.head_width >= 1, f"head_width = {self.head_width}: at least 1")
        require(self.mlp_ratio >= 1, f"mlp_ratio = {self.mlp_ratio}: at least 1")


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
    text_adapter: TextAdapterConfig = field(default_factory=TextAdapterConfig)
    """Blocks between the token states of the frozen CLIP and the decoder. They let it learn which words belong together
    and where an object stands; the weights then fit no other library."""
    image_norm: float = 1.0
    """Length of z_image as the weights read it: 1, or about 10 where `unclip import` brought weights that were trained
    on CLIP's raw embeddings (Karlo). Outside the network every z_image has length one."""
    image_drop_prob: float = 0.1
    """Probability of dropping z_image, per sample (section 2.1: 0.1)."""
    text_drop_prob: float = 0.5
    """Probability of dropping the caption, per sample (section 2.1: 0.5)."""
    pooled_drop_prob: float = 0.0
    """Probability of dropping z_image and the pooled caption together while the token states stay, per sample. Both
    vectors name the colours and shapes of a picture but hardly their order; without them the decoder has to read the
    order from the tokens. It needs more steps; 0 is the paper's decoder. From no paper: what was measured is in
    docs/lab.md."""
    sketch_px: int = 0
    """Side of a coarse picture that the decoder first reads from the caption's tokens alone, by an adapter of its own
    that is built as ``text_adapter``, and then sees beside the noisy one, in pixels; 0: none. Where things stand is
    decided in the few noisiest timesteps, and most decoders learn it late; the sketch learns it from every sample, as
    the mean picture of its caption. From no paper: what was measured is in docs/lab.md."""
    inpainting: bool = False
    """Whether four extra input channels hold the known part of the picture (arXiv:2112.10741, section 4.3); in training
    it is a random part. Without these channels inpainting restores the known pixels after each step."""
    unknown_prob: float = 0.5
    """With ``inpainting``: probability that no part is known, per sample, so that whole pictures are learned too."""
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(variance="learned_range"))
    """Noising of the picture; learned variance (table 3)."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(num_steps=250, guidance_scale=1.25))
    """Sampling (table 3: 250 steps; figure 11: guidance 1.25 has the best FID)."""

    def __post_init__(self) -> None:
        require(self.num_image_tokens >= 1, f"num_image_tokens = {self.num_image_tokens}: at least 1")
        require(self.context_width >= 1, f"context_width = {self.context_width}: at least 1")
        require_norm(self.image_norm)
        require(self.sketch_px >= 0, f"sketch_px = {self.sketch_px}: must not be negative")
        require(self.sketch_px <= self.image_px, f"sketch_px = {self.sketch_px}: at most image_px = {self.image_px}")
        require_prob("image_drop_prob", self.image_drop_prob)
        require_prob("text_drop_prob", self.text_drop_prob)
        require_prob("pooled_drop_prob", self.pooled_drop_prob)
        adapter = self.text_adapter
        require(
            adapter.depth == 0 or self.context_width % adapter.head_width == 0,
            f"context_width = {self.context_width} is not a multiple of text_adapter.head_width = {adapter.head_width}",
        )
        require(self.sketch_px == 0 or adapter.depth > 0, "sketch_px: a sketch needs text_adapter.depth >= 1")
        num_heads = self.context_width // max(1, adapter.head_width)
        require(
            adapter.depth == 0 or not adapter.one_way_heads or num_heads % 2 == 0,
            f"text_adapter.one_way_heads: context_width = {self.context_width} has {num_heads} heads, an odd number; "
            "change text_adapter.head_width",
        )
        require(
            self.text_transformer is None or (adapter.depth == 0 and self.pooled_drop_prob == 0),
            "text_adapter and pooled_drop_prob are for the token states of the frozen CLIP, and text_transformer "
            "replaces them; take one or the other",
        )
        self.unet.require_fits(self.image_px)
        require(
            bool(self.unet.attention_resolutions),
            "unet.attention_resolutions is empty: without attention the decoder never reads the caption's tokens",
        )
        require_steps(self.sampler, self.diffusion)
        require_measured(self.sampler)
