"""Guidance as wrappers around a denoiser: the result is called like any other network.

Legend: B batch, C channels. ``denoise(x, t)`` -> (B, C, ...) or, with learned variance, (B, 2C, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion.process import Denoise, Diffusion, spread

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> log probability (B,) of the target, differentiable in x."""


def classifier_free(denoise_both: Denoise, scale: float | Tensor, rows: Tensor | None = None) -> Denoise:
    """Classifier-free guidance in one doubled forward: arXiv:2207.12598; arXiv:2112.10741, section 2.3.

    The output is uncond + s (cond - uncond); eps, x0 and v are affine in one another at fixed x, so that it
    is the same guidance for each. A learned variance is the conditional one. s = 1 is the conditional network
    (papers that write 1 + w have w = s - 1).

    Args:
        denoise_both: Network on 2B items that carries its conditioning in the order [uncond, cond].
        scale: s, dimensionless; a number, or one per guided item (B,).
        rows: Indices of the guided items, if not all are. The network then takes [uncond of those, cond of all]; the
            others get the conditional output.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        channels, part = x.shape[1], slice(None) if rows is None else rows.to(x.device)
        both = denoise_both(torch.cat([x[part], x]), torch.cat([t[part], t]))
        uncond, cond = both[: -len(x)], both[-len(x) :]
        strength = spread(scale.to(x.device), cond) if isinstance(scale, Tensor) else scale
        mean = uncond[:, :channels] + strength * (cond[part, :channels] - uncond[:, :channels])
        if rows is not None:
            mean = cond[:, :channels].index_copy(0, rows.to(x.device), mean)
        return torch.cat([mean, cond[:, channels:]], dim=1)

    return guided


def score_guided(denoise: Denoise, log_prob: LogProb, diffusion: Diffusion, scale: float | Tensor) -> Denoise:
    """Guidance by the gradient of a log probability: classifier guidance, arXiv:2105.05233, algorithm 2.

    eps becomes eps - s * scale * grad log p(target | x_t), with s = sqrt(1 - alpha_bar_t), which is the eps of the
    product of both distributions; other predictions move by the same amount of x0. It may wrap a denoiser that is
    already guided.

    Args:
        denoise: Network on B items.
        log_prob: Noise-aware; see ``clip_log_prob``.
        diffusion: The process, which says what the output means.
        scale: Strength, dimensionless; a number, or one per item (B,).
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        output = denoise(x, t)
        with torch.inference_mode(False), torch.enable_grad():  # a server samples in inference mode
            leaf = x.clone().detach().requires_grad_(True)
            gradient = torch.autograd.grad(log_prob(leaf, t).sum(), leaf)[0]
        strength = spread(scale, x) if isinstance(scale, Tensor) else scale
        _, s = diffusion.signal_noise(x, t)
        mean, variance = diffusion.split_output(output, x)
        mean = mean + diffusion.output_shift(-s * strength * gradient, t)
        return mean if variance is None else torch.cat([mean, variance], dim=1)

    return guided


def clip_log_prob(encode_image: Callable[[Tensor, Tensor], Tensor], z_target: Tensor, logit_scale: float) -> LogProb:
    """Similarity under a noise-aware CLIP, up to a constant a log probability: arXiv:2112.10741, section 2.4.

    Args:
        encode_image: (x, t) -> embeddings of noised pictures, (B, D).
        z_target: Embedding of the caption (or picture) to move towards, (B, D).
        logit_scale: Inverse temperature that this CLIP was trained to (near 100 at the end).
    """

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        # A copy, because a tensor made in inference mode cannot be saved for a gradient.
        return logit_scale * torch.cosine_similarity(encode_image(x, t), z_target.clone(), dim=-1)

    return log_prob
