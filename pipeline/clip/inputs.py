"""What a CLIP's inputs are made by: the framing of its pictures and the tokens of its captions. No weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jaxtyping import Int
from torch import Tensor

from pipeline.clip.library import open_clip
from pipeline.clip.tokenizer import ClipTokenizer
from pipeline.errors import ConfigError, first_line
from pipeline.pictures.frame import Framing

_MAX_CAPTION_CHARS = 2048
_MAX_COUNTED_WORDS, _MAX_COUNTED_CHARS = 1 << 18, 64


@dataclass(frozen=True)
class ClipInputs:
    """How pictures and captions become the inputs of a CLIP. It holds no weights, so that other processes can do it."""

    framing: Framing
    """The image tower's own preprocessing, up to the standardisation of levels."""
    model_config: dict[str, Any]
    """open_clip's model configuration, as in open_clip_config.json."""
    source: str
    """Where open_clip finds a Hugging Face tokenizer: ``local-dir:FOLDER``, ``hf-hub:OWNER/REPOSITORY`` or one of its
    own names; CLIP's tokenizer needs none."""

    @property
    def context_length(self) -> int:
        """Length of a tokenised caption, in tokens."""
        return self.model_config["text_cfg"].get("context_length", 77)

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer: CLIP's own, or one that wraps Hugging Face's.

        Raises:
            ConfigError: If a Hugging Face tokenizer cannot be loaded; says what is missing.
        """
        text: dict[str, Any] = self.model_config["text_cfg"]
        if "hf_tokenizer_name" not in text:
            options = text.get("tokenizer_kwargs")
            if not options:
                return _plain_tokenizer(self.context_length)
            return ClipTokenizer(context_length=self.context_length, **options)
        try:
            return open_clip.get_tokenizer(self.source)
        except ImportError as error:
            raise ConfigError(
                f"clip: the tokenizer {text['hf_tokenizer_name']} is from Hugging Face and needs the package "
                f"{error.name or 'transformers'}, which is not installed: {sys.executable} -m pip install 'unclip[hf]'"
            ) from error
        except Exception as error:  # transformers, the hub client and the socket each raise their own
            raise ConfigError(
                f"clip: the tokenizer {text['hf_tokenizer_name']} of {self.source} cannot be loaded; without a network "
                f"its tokenizer.json and tokenizer_config.json must be in the CLIP's folder. {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "B L"]:
        """Token ids of captions, L = context length; longer captions are truncated."""
        return self._tokenize(captions, self.context_length)

    def cut_at(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption that are read, start and end included, if it has more; 0: all of it is read."""
        if not captions:
            return []
        length = self.context_length
        tokens, longer = self.tokenize(captions), self._tokenize([*captions, ""], length + 1)
        # A caption that is cut has its end token in another place, or one token more where a short one is padded.
        is_cut = (longer[:-1, :length] != tokens).any(dim=1) | (longer[:-1, length] != longer[-1, length])
        return [length if cut else 0 for cut in is_cut.tolist()]

    def num_whole_words(self, caption: str) -> int:
        """Words at a caption's beginning, by spaces, all of whose tokens are read."""
        words = caption.split()
        num_tokens, num_chars = 2, 0  # the start and the end token
        for number, word in enumerate(words):
            num_chars += len(word) + 1
            if num_chars > _MAX_CAPTION_CHARS:
                return number
            num_tokens += self._num_tokens(word)
            if num_tokens > self.context_length:
                return number
        return len(words)

    def _num_tokens(self, word: str) -> int:
        """Tokens of a word of at most ``_MAX_CAPTION_CHARS``, at least 1."""
        count = self._counts.get(word)
        if count is None:
            tokenizer = self.tokenizer
            is_plain = isinstance(tokenizer, ClipTokenizer)
            tokens = tokenizer.encode(word) if is_plain else tokenizer.tokenizer.encode(word, add_special_tokens=False)
            count = max(1, len(tokens))
            if len(word) <= _MAX_COUNTED_CHARS:
                if len(self._counts) >= _MAX_COUNTED_WORDS:
                    self._counts.clear()
                self._counts[word] = count
        return count

    @cached_property
    def _counts(self) -> dict[str, int]:
        """Tokens of the words that were counted: cleaning a word takes ten times as long as looking it up."""
        return {}

    def _tokenize(self, captions: Sequence[str], length: int) -> Int[Tensor, "B L"]:
        return self.tokenizer([_shorten(caption) for caption in captions], context_length=length)


def inputs_of(model_config: dict[str, Any], preprocess: dict[str, Any], source: str) -> ClipInputs:
    """The inputs that open_clip's configuration of a model and of its preprocessing describe.

    Raises:
        ValueError: If its pictures are not square.
    """
    size = preprocess.get("size") or model_config.get("vision_cfg", {}).get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"CLIP {source!r}: its pictures are {size} px, no square")
    # "random" is of open_clip's training alone; it resizes with the bicubic kernel otherwise.
    kernel = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"
    mode, fill_level = preprocess.get("resize_mode") or "shortest", preprocess.get("fill_color") or 0
    return ClipInputs(Framing(sides.pop(), mode, kernel, fill_level), model_config, source)


def count_tokens(captions: Sequence[str]) -> list[int]:
    """Tokens of each caption by CLIP's own tokenizer, with the start and the end token, before anything is cut off."""
    tokenizer = _plain_tokenizer(77)  # the length only matters where captions are cut
    return [len(tokenizer.encode(caption)) + 2 for caption in captions]


def named_context_length(name: str) -> int:
    """Context length of an open_clip model or folder; 77, which nearly all have, if this machine does not know it."""
    config = open_clip.get_model_config(name) if not name.startswith("hf-hub:") else None
    return int((config or {}).get("text_cfg", {}).get("context_length", 77))


@lru_cache(maxsize=4)
def _plain_tokenizer(context_length: int) -> ClipTokenizer:
    """CLIP's own tokenizer; making one takes half a second, so all CLIPs of a process share it."""
    return ClipTokenizer(context_length=context_length)


def _shorten(caption: str) -> str:
    """A caption of at most ``_MAX_CAPTION_CHARS``: more than any context length holds."""
    return caption if len(caption) <= _MAX_CAPTION_CHARS else " ".join(caption.split())[:_MAX_CAPTION_CHARS]
