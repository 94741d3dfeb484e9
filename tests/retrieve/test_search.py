"""``unclip search`` on a tiny workspace: a plain picture of each of ten colours, and CLIP with random weights."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.clip.frozen import FrozenClip
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.pictures.read import read_file
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.batch import encode_rows
from pipeline.retrieve.index import Neighbour
from pipeline.retrieve.queries import Query
from pipeline.retrieve.retriever import Results
from pipeline.retrieve.search import Searcher, SearchOptions
from pipeline.retrieve.sheet import SheetText, write_sheet
from tests.tiny.command import ROOT, unclip_here, unclip_json
from tests.tiny.shards import plain_picture
from tests.tiny.workspace import COLOURS, served_workspace

_NOBODY = 65_534


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    torch.set_num_threads(1)
    return served_workspace(folder)


@pytest.fixture(scope="module")
def searcher(recipe: Recipe) -> Searcher:
    return Searcher.open(recipe)


@pytest.fixture(scope="module")
def file(recipe: Recipe, folder: Path) -> str:
    """The recipe's file, for the command."""
    return str(folder / "tiny.toml")


def _captions(searcher: Searcher, *queries: Query, **options: Any) -> list[str]:
    return [one.caption for one in searcher.search(queries, SearchOptions(**options)).neighbours]


def test_every_kind_of_query_finds_the_pair_that_it_is(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(plain_picture("red", 40))
    [red] = searcher.search([Query("image", str(tmp_path / "red.png"))], SearchOptions(k=1)).neighbours
    assert red.caption == "a red picture"
    assert red.similarity > 0.999
    assert _captions(searcher, Query("text", "a green picture"), k=1, modality="text") == ["a green picture"]
    assert _captions(searcher, Query("uid", red.uid), k=1) == ["a red picture"]
    z = 7 * searcher.retriever.index.vectors([red.id])[0]
    np.save(tmp_path / "z.npy", z)
    (tmp_path / "z.json").write_text(json.dumps(z.tolist()))
    (tmp_path / "marked.json").write_bytes(f"\ufeff{z.tolist()}".encode())  # with a byte order mark
    for name in ("z.npy", "z.json", "marked.json"):
        assert _captions(searcher, Query("embedding", str(tmp_path / name)), k=1) == ["a red picture"]


def test_a_mixture_is_the_direction_of_the_weighted_sum(searcher: Searcher) -> None:
    queries = [Query("text", "a red picture", 2.0), Query("text", "a blue picture", -0.5)]
    one, two = searcher.encoder.texts([query.value for query in queries])
    expected = 2 * one - 0.5 * two
    np.testing.assert_allclose(searcher.encoder.encode(queries), expected / np.linalg.norm(expected), atol=1e-6)
    with pytest.raises(ConfigError, match="cancel each other"):
        searcher.encoder.encode([Query("text", "a"), Query("text", "a", -1)])


def test_a_picture_with_alpha_is_the_same_as_query_and_as_stored(searcher: Searcher, tmp_path: Path) -> None:
    """What is transparent is white, whatever colour the file has there."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[8:24, 8:24] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    read_file(str(tmp_path / "alpha.png")).save(tmp_path / "stored.png")
    one, two = (searcher.encoder.picture(str(tmp_path / name)) for name in ("alpha.png", "stored.png"))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - searcher.encoder.picture(_black(tmp_path))).max() > 1e-3


def test_pictures_of_a_list_are_embedded_together_and_one_that_is_none_fails_alone(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(tmp_path / f"{colour}.png") for colour in ("red", "junk", "green", "blue")]
    for path in paths:
        Path(path).write_bytes(b"junk" if "junk" in path else plain_picture(Path(path).stem, 40))
    alone = [searcher.encoder.picture(paths[place]) for place in (0, 2, 3)]
    sizes, encode = list[int](), FrozenClip.encode_image

    def count(clip: FrozenClip, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return encode(clip, images)

    monkeypatch.setattr(FrozenClip, "encode_image", count)
    queries = pa.table({"image": [*paths, None], "problem": pa.nulls(5, pa.string())})
    vectors, problems = encode_rows(queries, searcher.encoder, searcher.retriever.index.embed_dim)
    assert sizes == [3]
    np.testing.assert_allclose(vectors[[0, 2, 3]], alone, atol=1e-5)
    assert [problems[place] for place in (0, 2, 3, 4)] == ["", "", "", "nothing to look for"]
    assert problems[1].startswith(f"image: {paths[1]}: ")


def _black(folder: Path) -> str:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "black.png")
    return str(folder / "black.png")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"junk", "no embedding of 16 numbers"),
        (np.zeros(16, np.float32), "all zero"),
        (np.full(16, np.nan, np.float32), "not finite"),
        (np.ones(15, np.float32), r"shape \(15,\); this index takes 16"),
        (np.ones((2, 16), np.float32), r"shape \(2, 16\)"),
        (np.array(["a"] * 16), "this index takes 16"),
        (None, "No such file"),
    ],
)
def test_a_wrong_embedding_is_refused_by_its_file(searcher: Searcher, tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "wrong.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ConfigError, match=rf"wrong.npy: .*{words}"):
        searcher.encoder.encode([Query("embedding", str(path))])


def test_the_command_prints_a_table_or_json_and_says_what_is_short(file: str) -> None:
    results = unclip_json("search", file, "a red picture", "--modality", "text", "-k", "3")
    assert [set(row) for row in results["neighbours"]] == [
        {"id", "uid", "similarity", "url", "caption", "key", "shard"}
    ] * 3
    assert (results["neighbours"][0]["caption"], results["shortage"]) == ("a red picture", "")
    done = unclip_here("search", file, "a red picture", "--modality", "text", "-k", "20", "--where", "key < '0000004'")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"1  1\.0000  [0-9a-f]{32}  a red picture +http://127\.0\.0\.1:1/red\.jpg", lines[0])
    shortage, _, rest = done.stderr.partition("\n")
    assert (shortage, rest[:6]) == ("only 4 of 20: all 10 rows of the index were looked at", "next:\n")


def test_the_command_mixes_and_collapses(file: str, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(plain_picture("red", 40))
    mixed = ["search", file, "a blue picture", "--image", str(tmp_path / "red.png"), "-k", "10"]
    one, two = (unclip_json(*mixed, "--weights", weights)["neighbours"] for weights in ("0,1", "0,-1"))
    assert [row["uid"] for row in one] == [row["uid"] for row in two][::-1]
    distinct = unclip_json(*mixed, "--distinct", "0.0")
    assert len(distinct["neighbours"]) < 10
    assert distinct["shortage"].startswith(f"only {len(distinct['neighbours'])} of 10")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a text, --image FILE, --embedding FILE or --uid UID"),
        (["a", "b", "--weights", "1"], "1 weights for 2 things"),
        (["a", "--weights", "x"], "write numbers"),
        (["--uid", "none"], "uid none: no row of the index has it"),
        (["--image", "none.png"], "none.png: no such file"),
        (["a", "--where", "widht > 3"], "no column 'widht'"),
    ],
)
def test_wrong_searches_are_one_message(file: str, arguments: list[str], words: str) -> None:
    done = unclip_here("search", file, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_contact_sheet_holds_pictures_captions_scores_urls_and_uids(file: str, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(plain_picture("red", 40))
    page = tmp_path / "pages" / "sheet.html"
    arguments = ["a <b>red</b> picture", "--image", str(tmp_path / "red.png"), "-k", "10", "--html", str(page)]
    results = unclip_json("search", file, *arguments)
    text = page.read_text()
    assert [path.name for path in page.parent.iterdir()] == ["sheet.html"]
    pictures = re.findall(r'<button[^>]+class="pic"[^>]*><img src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(pictures) == len(COLOURS)
    for row, picture in zip(results["neighbours"], pictures, strict=True):
        colour = row["caption"].split()[1]
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            pixel = np.asarray(image.convert("RGB"))[5, 5].astype(int)
        assert np.abs(pixel - np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]).max() < 6
        assert all(part in text for part in (row["caption"], row["url"], row["uid"], f"{row['similarity']:.3f}"))
    assert "<b>red</b>" not in text
    assert "a &lt;b&gt;red&lt;/b&gt; picture" in text
    assert not re.search(r'(src|href)="(?!data:|http://127)', text)  # nothing is loaded from elsewhere


def test_a_sheet_says_which_picture_cannot_be_read(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(recipe.workspace, workspace)
    [tar] = workspace.glob("download/*/00000.tar")
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"\xff\xd8\xff", b"xxx", 1))
    page = tmp_path / "sheet.html"
    file, changed = str(folder / "tiny.toml"), f"workspace={workspace}"
    done = unclip_here("search", file, "a", "-k", "10", "--html", str(page), "--set", changed)
    assert done.returncode == 0
    assert re.match(r"no picture: shard 00000: key 0000000: uid [0-9a-f]{32}: not a picture", done.stderr)
    assert page.read_text().count("picture cannot be read") == 1


def test_a_sheet_where_a_file_is_in_the_way_says_so(file: str, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    done = unclip_here("search", file, "a", "--html", str(tmp_path / "out" / "sheet.html"))
    assert done.returncode == 4
    assert "a file is where a folder should be" in done.stderr


def test_a_workspace_that_cannot_be_written_is_searched_as_it_is(recipe: Recipe, file: str, tmp_path: Path) -> None:
    """As another user of the same workspace: root is one only without its right to write everywhere."""
    command = [sys.executable, "-m", "jobs.cli", "search", file, "a red picture", "--html", str(tmp_path / "s.html")]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root can write everywhere, and there is no setpriv to change that")
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    paths = [Path(recipe.workspace), *Path(recipe.workspace).rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    before = {path: path.stat().st_mtime_ns for path in paths}
    try:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(COLOURS) + 1
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    assert set(paths) == {Path(recipe.workspace), *Path(recipe.workspace).rglob("*")}


def test_another_user_may_read_every_file_of_a_workspace(recipe: Recipe) -> None:
    """By the modes that the umask asks for, and, where the tests may change their user, as another one."""
    workspace = Path(recipe.workspace)
    files = [path for path in workspace.rglob("*") if path.is_file()]
    by_hand = workspace / "by-hand"
    by_hand.touch()
    mode = by_hand.stat().st_mode
    by_hand.unlink()
    assert {path.name for path in files} >= {"model.safetensors", "open_clip_model.safetensors", "manifest.json"}
    assert [path for path in files if path.stat().st_mode & mode & 0o444 != mode & 0o444] == []
    if os.geteuid() == 0 and mode & 0o004:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.chdir(workspace)  # what is above it is pytest's, for its own user alone
                os.setgroups([])
                os.setgid(_NOBODY)
                os.setuid(_NOBODY)
                for path in files:
                    path.relative_to(workspace).read_bytes()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_url_that_is_no_web_address_is_no_link(searcher: Searcher, tmp_path: Path) -> None:
    [one] = searcher.search([Query("text", "a")], SearchOptions(k=1)).neighbours
    urls = ["javascript:alert(1)", "http://[bad", "data:text/html,x"]
    bad = Results([dataclasses.replace(one, url=url) for url in urls], 3, "enough")
    write_sheet(tmp_path / "s.html", SheetText("n", "c"), [Query("text", "a")], SearchOptions(k=3), bad, searcher)
    text = (tmp_path / "s.html").read_text()
    assert "<a " not in text
    assert 'data-link="1"' not in text


@pytest.mark.parametrize("error", [DataError("no such sample"), StepError("the store does not answer")])
def test_a_sheet_reads_pictures_at_once_and_lacks_only_what_cannot_be_read(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    results = searcher.search([Query("text", "a")], SearchOptions(k=4))
    read, together = searcher.retriever.picture, threading.Barrier(4)

    def picture(neighbour: Neighbour) -> bytes:
        together.wait(60)
        if neighbour.id == results.neighbours[1].id:
            raise error
        return read(neighbour)

    monkeypatch.setattr(searcher.retriever, "picture", picture)
    page, text = tmp_path / "s.html", SheetText("n", "c")
    problems = write_sheet(page, text, [Query("text", "a")], SearchOptions(k=4), results, searcher)
    assert problems == [str(error)]
    assert page.read_text().count("picture cannot be read") == 1
    assert page.read_text().count('<img src="data:image/jpeg') == 3


def test_a_part_holds_a_row_for_each_query_with_its_neighbours(searcher: Searcher, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from pipeline.retrieve.batch import PartSearcher
    from pipeline.retrieve.query_list import write_queries

    (tmp_path / "red.png").write_bytes(plain_picture("red", 40))
    [green] = searcher.search([Query("text", "a green picture")], SearchOptions(1, "text")).neighbours
    rows: list[dict[str, Any]] = [
        {"text": "a blue picture"},
        {"image": str(tmp_path / "red.png")},
        {"uid": green.uid},
        {"embedding": [0.5] * 16},
        {"text": "a blue picture", "uid": green.uid},
        {},
        {"image": "none.png"},
        {"embedding": [1.0] * 3},
        {"text": "b", "uid": "none"},
        {"text": 5},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_queries(tmp_path / "q.jsonl", tmp_path / "q.parquet")
    answer = PartSearcher(searcher, SearchOptions(k=3), tmp_path / "q.parquet", 1)
    assert answer(0, tmp_path / "a.parquet") == {"in": 10, "ok": 5, "fewer": 0, "failed": 5}
    answers = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["status"] for row in answers] == ["ok"] * 5 + ["failed"] * 5
    assert [row["error_message"] for row in answers[5:]] == [
        "nothing to look for",
        "image: none.png: no such file",
        "embedding: float64 of shape (3,); this index takes 16 numbers",
        "uid: uid none: no row of the index has it",
        "line 10: text: not a text",
    ]
    assert [row["neighbours"] for row in answers[5:]] == [[]] * 5
    assert "problem" not in answers[0]
    queries = [
        [Query("text", "a blue picture")],
        [Query("image", str(tmp_path / "red.png"))],
        [Query("uid", green.uid)],
        None,
        [Query("text", "a blue picture"), Query("uid", green.uid)],
    ]
    for row, query in zip(answers, queries, strict=False):
        if query is not None:
            expected = searcher.search(query, SearchOptions(k=3)).neighbours
            assert [one["uid"] for one in row["neighbours"]] == [one.uid for one in expected]
            scores = [one["similarity"] for one in row["neighbours"]]
            assert scores == pytest.approx([one.similarity for one in expected], abs=1e-5)
    short = PartSearcher(searcher, SearchOptions(k=3, where="key < '0000001'"), tmp_path / "q.parquet", 1)
    assert short(0, tmp_path / "b.parquet") == {"in": 10, "ok": 0, "fewer": 5, "failed": 5}
