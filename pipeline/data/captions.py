"""How many captions are longer than CLIP's context, which reads their first tokens and no more."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.recipe.train_sections import ClipStepConfig

MOST_CAPTIONS = 10_000
"""Captions of a part that are measured: every one, or evenly spaced ones of a part that has more."""


def count_long(captions: Sequence[str], context_length: int) -> int:
    """How many captions have more tokens than the context holds, start and end token included.

    A token stands for a byte or more, so that short captions need no tokenizer, which takes seconds to load.
    """
    uncertain = [caption for caption in captions if len(caption.encode()) + 2 > context_length]
    if not uncertain:
        return 0
    from pipeline.clip.inputs import count_tokens

    return sum(tokens > context_length for tokens in count_tokens(uncertain))


def context_length(clip: ClipStepConfig) -> int:
    """Tokens of a caption that the recipe's CLIP reads."""
    if clip.source == "train":
        return clip.model.context_length
    from pipeline.clip.inputs import named_context_length

    return named_context_length(f"local-dir:{clip.name}" if Path(clip.name).is_dir() else clip.name)
