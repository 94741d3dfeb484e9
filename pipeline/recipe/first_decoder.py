"""The decoder on smaller pictures, which is trained before it: what its tables are, and what they may not be.

At half the side a sample takes about half of the time (the demo: .46), and what stands where is decided at more of the
noise levels of a small picture, so that it is learned sooner (docs/lab.md). Compare arXiv:2405.16759: there a core
without down-sampling is trained first and then frozen within the larger network; here all weights are trained on.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
_OF_TRAINING = (
    "image_px",
    "image_drop_prob",
    "text_drop_prob",
    "pooled_drop_prob",
    "unknown_prob",
    "unet.dropout",
    "diffusion.loss",
    "diffusion.vlb_weight",
    "diffusion.min_snr",
    "diffusion.timestep_draws",
    "sampler.",
)
"""How names of a decoder's fields begin that may differ between two trainings of the same weights."""


def model_of_smaller_pictures(model: Json, chosen: object) -> Json:
    """The model of ``decoder`` with what differs at another side, half of its own unless ``chosen`` says another.

    Args:
        model: The decoder's table.
        chosen: What the recipe says of the first decoder's model.
    """
    with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):  # of a wrong type, which is said elsewhere
        side = model["image_px"]
        own = chosen["image_px"] if isinstance(chosen, Mapping) and "image_px" in chosen else side // 2
        levels = [level * own // side for level in model["unet"]["attention_resolutions"]]
        return model | {"image_px": own, "unet": model["unet"] | {"attention_resolutions": levels}}
    return model


def require_same_shape(first: Json, decoder: Json) -> None:
    """Check that a decoder can begin with the weights of the first one: it would notice after that whole training.

    Args:
        first: Fields of the first decoder's model, by their dotted names.
        decoder: Those of the decoder's.

    Raises:
        ValueError: If it cannot; names the field.
    """
    own, side = first["image_px"], decoder["image_px"]
    if own > side:
        raise ValueError(f"first_decoder.model.image_px is {own} px: at most the decoder's {side}")
    levels = [level * side / own for level in first["unet.attention_resolutions"]]
    first = first | {"unet.attention_resolutions": levels}
    for name in sorted(first.keys() | decoder.keys()):
        if first.get(name) != decoder.get(name) and not name.startswith(_OF_TRAINING):
            raise ValueError(
                f"first_decoder.model.{name} is not as in decoder.model, but the decoder begins with its weights; "
                "leave it out"
            )
