"""A folder of pictures with all that is strange about such folders, for a disk and for an object store; its fetcher."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.causes import FetchError
from pipeline.data.fetch import Fetcher
from pipeline.data.urls import AddressRules
from pipeline.recipe.sections import DownloadConfig
from pipeline.workspace.objects import ObjectStore
from tests.data.conftest import make_picture


def _annotations() -> dict[str, bytes]:
    table = pa.Table.from_pylist([{"file_name": "1.png", "text": "from parquet"}])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    coco = {
        "images": [{"id": 1, "file_name": "coco.jpg"}],
        "annotations": [{"image_id": 1, "caption": "coco one"}, {"image_id": 1, "caption": "coco two"}],
    }
    return {
        "train/metadata.csv": b"file_name,text\na 1.jpg,in train\nsub/9.png,far below\nno.jpg,nothing\n../up.jpg,up\n",
        "train/sub/metadata.jsonl": b'{"file_name": "8.png", "text": "near"}\n{"file_name"\n',
        "train/deep/er/metadata.parquet": sink.getvalue().to_pybytes(),
        "annotations/captions_train2017.json": json.dumps(coco).encode(),
        "flickr/results.csv": b"image_name| comment_number| comment\nf.jpg| 0| flickr\n",
    }


PICTURES = (
    "up.jpg", "b.JPEG", "b.c.png", "c d.webp", "e\u00e9 #1?.png", "train/a 1.jpg", "train/a 2.jpg", "train/sub/8.png",
    "train/sub/9.png", "train/deep/er/1.png", "train2017/coco.jpg", "flickr/pictures/f.jpg", "strange/1.jpg",
    "strange/2.jpg", "strange/3.jpg", ".hidden.jpg", ".git/1.jpg", "a[1]/x.jpg", "100%/x.jpg",
)  # fmt: skip
"""Names of its pictures; the hidden ones are of no pair."""
_SIDECARS = {
    "b.txt": b"beside it\r\nin two lines\n",
    "b.c.caption": b"dots in its name",
    "c d.json": b'{"caption": "in json"}',
    "strange/1.txt": b"caf\xe9",
    "strange/2.json": b"{",
    "a[1]/x.txt": b"brackets",
    "readme.md": b"no picture",
}


def strange_files() -> dict[str, bytes]:
    """The files of the folder, by name."""
    kinds = {"jpg": "JPEG", "peg": "JPEG", "png": "PNG", "ebp": "WEBP"}
    pictures = {name: make_picture(seed, kind=kinds[name[-3:].lower()]) for seed, name in enumerate(PICTURES)}
    return pictures | _SIDECARS | _annotations()


def put(folder: str, files: dict[str, bytes]) -> None:
    """Write files as another machine does."""
    store = ObjectStore(folder)
    for name, content in files.items():
        store.pipe_file(f"{store.path}/{name}", content)


def put_here(folder: Path, files: dict[str, bytes]) -> None:
    """Write files on this disk."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


async def fetch(url: str, config: DownloadConfig) -> bytes | str:
    """The content of a file, or the class of its failure."""
    async with Fetcher(config, AddressRules(folders=[url.rpartition("/")[0]])) as fetcher:
        try:
            with await fetcher.fetch(url) as body:
                return body.read()
        except FetchError as error:
            return error.cause
