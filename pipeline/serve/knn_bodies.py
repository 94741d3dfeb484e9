"""The bodies of clip-retrieval's requests, bounded before anything reads them."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from pipeline.serve.deadlines import Timeout

MAX_IMAGES = 1000
MAX_RESULT_IDS = 10_000
MAX_NUMBERS = 65_536
"""Most numbers of an embedding."""
_MAX_TEXT_CHARS = 4000
MAX_QUERIES = 32
"""Most searches of one request."""
SAFETY = ("use_safety_model", "use_violence_detector")
"""Fields of clip-retrieval's client that ask for safe rows alone; which those are says the recipe (serve.safe_rows)."""

_AESTHETIC = {"aesthetic_score": 9, "aesthetic_weight": 0.5}
"""What the client sends by default."""
_UNSET = (None, "")


def _require_numbers(value: Any) -> Any:
    """Refuse a list at its first wrong item: pydantic would make a kilobyte of message for each of a million."""
    if isinstance(value, list) and not all(type(item) in {int, float} for item in cast("list[Any]", value)):
        raise ValueError("an item is not a number")
    return value


def _check_vectors(value: Any) -> Any:
    """An embedding, or a list of them; refused at its first wrong item, as by ``_require_numbers``."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    vectors = items if items and isinstance(items[0], list) else [value]
    if len(vectors) > MAX_QUERIES or not all(
        isinstance(vector, list) and len(vector) <= MAX_NUMBERS for vector in vectors
    ):
        raise ValueError(f"give at most {MAX_NUMBERS} numbers, or at most {MAX_QUERIES} lists of numbers")
    for vector in vectors:
        _require_numbers(vector)
    return value


def _check_texts(value: Any) -> Any:
    """A text, or a list of them."""
    items = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not 0 < len(items) <= MAX_QUERIES or not all(isinstance(item, str) for item in items):
        raise ValueError(f"give a text, or a list of 1 to {MAX_QUERIES}")
    return value


def _check_short_texts(value: Any) -> Any:
    for item in [value] if isinstance(value, str) else _check_texts(value):
        if len(item) > _MAX_TEXT_CHARS:
            raise ValueError(f"a text has more than {_MAX_TEXT_CHARS} characters")
    return value


_Vectors = Annotated[list[float] | list[list[float]], PlainValidator(_check_vectors)]
_Ids = Annotated[list[int], BeforeValidator(_require_numbers)]
_Texts = Annotated[str | list[str], PlainValidator(_check_short_texts)]
_Pictures = Annotated[str | list[str], PlainValidator(_check_texts)]


class KnnRequest(BaseModel):
    """The body of a request; a list of texts, pictures or embeddings is as many searches, and a list of answers.

    Of clip-retrieval's fields, ``aesthetic_score`` and ``aesthetic_weight`` cannot be done: they add to the query what
    an aesthetic picture has in one particular CLIP.
    """

    model_config = ConfigDict(extra="ignore")

    modality: Literal["image", "text"]
    num_images: int = Field(ge=0, le=MAX_IMAGES)
    indice_name: str | None = None
    num_result_ids: int | None = Field(default=None, ge=0, le=MAX_RESULT_IDS)
    text: _Texts | None = None
    image: _Pictures | None = None
    image_url: _Texts | None = None
    embedding_input: _Vectors | None = None
    deduplicate: bool | None = False
    use_mclip: bool | None = False
    use_safety_model: bool | None = False
    use_violence_detector: bool | None = False
    aesthetic_score: float | Literal[""] | None = None
    aesthetic_weight: float | Literal[""] | None = None
    near_copy: bool | None = False
    timeout: Timeout = None

    @property
    def is_safe(self) -> bool:
        """Whether safe rows alone are asked for."""
        return any(getattr(self, name) for name in SAFETY)

    def unused(self, *, has_filter: bool) -> list[str]:
        """Fields that were sent and had no effect. The client sends them by default, so they are not refused.

        Aesthetic fields that are not the client's are refused before that (``aesthetic_choice``).

        Args:
            has_filter: Whether the recipe says which rows are safe.
        """
        safety = [name for name in SAFETY if getattr(self, name) and not has_filter]
        aesthetic = [name for name in _AESTHETIC if getattr(self, name) not in _UNSET] if self._is_aesthetic else []
        return safety + aesthetic

    @property
    def aesthetic_choice(self) -> str:
        """The aesthetic field that somebody chose, for it is not what the client sends by default; empty: neither."""
        if not self._is_aesthetic:
            return ""
        chosen = (name for name, usual in _AESTHETIC.items() if getattr(self, name) not in {*_UNSET, usual})
        return next(chosen, "")

    @property
    def _is_aesthetic(self) -> bool:
        """Whether anything is to be added to the query."""
        return self.aesthetic_score not in _UNSET and self.aesthetic_weight != 0

    @property
    def query(self) -> tuple[str, list[Any], bool]:
        """What is searched for: the field, its values, and whether they came as a list; no field if there is none."""
        for name in ("text", "image", "image_url", "embedding_input"):
            if value := getattr(self, name):
                is_list = isinstance(value[0] if name == "embedding_input" else value, list)
                return name, value if is_list else [value], is_list
        return "", [], False


class MetadataRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="ignore")

    ids: _Ids = Field(max_length=MAX_RESULT_IDS)
    indice_name: str | None = None
    timeout: Timeout = None
