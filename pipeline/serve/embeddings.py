"""``POST /v1/embeddings``, as OpenAI's, of texts and of pictures: both are vectors of CLIP's joint space."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.deadlines import Timeout, beside
from pipeline.serve.images import MAX_PROMPT_CHARS, note_of_cut, require_model
from pipeline.serve.knn_bodies import MAX_QUERIES
from pipeline.serve.protocols import PictureModel, Vectors
from pipeline.serve.uploads import decode_base64, embed_picture
from pipeline.serve.web import ApiError

MAX_INPUTS = 2048
_DATA_URL = "data:image/"
_MAX_NAMED = 10
"""Most inputs that a note names."""


def _require_texts(value: Any) -> Any:
    """Make a list of one text, and refuse another list at its first wrong item, as knn_bodies.py does."""
    items = cast("list[Any]", value if isinstance(value, list) else [value])
    if not all(isinstance(item, str) for item in items):
        raise ValueError("give texts, or pictures as data URLs; lists of token numbers are those of another tokenizer")
    if not all(items):
        raise ValueError("a text is empty")
    if any(len(item) > MAX_PROMPT_CHARS and not item.startswith(_DATA_URL) for item in items):
        raise ValueError(f"a text has more than {MAX_PROMPT_CHARS} characters")
    if sum(item.startswith(_DATA_URL) for item in items) > MAX_QUERIES:
        raise ValueError(f"more than {MAX_QUERIES} pictures; send them in several requests")
    return items


class EmbeddingRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: Annotated[list[str], BeforeValidator(_require_texts)] = Field(min_length=1, max_length=MAX_INPUTS)
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    timeout: Timeout = None


async def embed(model: PictureModel, body: EmbeddingRequest, card: ModelCard) -> dict[str, Any]:
    """Answer a request.

    Raises:
        ApiError: 404 for another model; 400, if a picture cannot be read, or another number of dimensions is requested.
    """
    require_model(body.model, card)
    if body.dimensions is not None:
        width = (await model.embed_texts([""])).shape[1]
        if body.dimensions != width:
            message = f"dimensions: embeddings of this CLIP have {width} numbers, and no fewer"
            raise ApiError(400, message, param="dimensions", code="invalid_value")
    with beside(_cut_note(model, body.input)) as cut:
        vectors = await _vectors(model, body.input)
        notes = [*await cut, *(["user: has no effect here"] if body.user is not None else [])]
    rows = [_encoded(row, body.encoding_format or "float") for row in vectors]
    return {
        "object": "list",
        "model": card.name,
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
        **({"notes": notes} if notes else {}),
    }


async def _cut_note(model: PictureModel, inputs: Sequence[str]) -> list[str]:
    """A note on the texts that are longer than CLIP reads, if there are any: how many, and the first ones."""
    places = [place for place, text in enumerate(inputs) if not text.startswith(_DATA_URL)]
    cuts = await model.cut_at([inputs[place] for place in places]) if places else []
    cut = [place for place, tokens in zip(places, cuts, strict=True) if tokens]
    if not cut:
        return []
    named = ", ".join(map(str, cut[:_MAX_NAMED])) + (", ..." if len(cut) > _MAX_NAMED else "")
    what = f"input: {len(cut)} of {len(inputs)} (index {named})" if len(inputs) > 1 else "input"
    return [note_of_cut(what, max(cuts))]


async def _vectors(model: PictureModel, inputs: Sequence[str]) -> Vectors:
    """One row for each input: the texts together, the pictures one after another, because each is large."""
    texts = [text for text in inputs if not text.startswith(_DATA_URL)]
    of_texts = iter(await model.embed_texts(texts)) if texts else iter(())
    rows: list[Vectors] = []
    for item in inputs:
        if item.startswith(_DATA_URL):
            rows.append(await embed_picture(model, decode_base64, item, "input"))
        else:
            rows.append(next(of_texts))
    return np.stack(rows)


def _encoded(row: Vectors, form: Literal["float", "base64"]) -> list[float] | str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if form == "base64" else row.tolist()
