"""One shrunken recipe as a job on a real Ray cluster, from drawn pairs to pictures, and every command upon what it leaves."""

import csv
import json
import shutil
import subprocess
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Artifact, Workspace
from tests.formats import missing_from_the_page
from tests.ports import free_port
from tests.ray_head import ray_head
from tests.readme import shell_commands
from tests.tiny.command import unclip, unclip_here, unclip_json
from tests.tiny.recipe import write_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
_CHANGES = ("--set", "evaluate.resources.max_retries=3")
_ELSEWHERE = {"--address", "http://127.0.0.1:8265", "--set", "workspace=s3://BUCKET/my"}
_HERE = {"my.toml": "configs/demo.toml", "my": "demo"}


@dataclass(frozen=True)
class Submitted:
    """A recipe in the place of the demo's, and the cluster that it was submitted to."""

    recipe: Path
    address: str
    dashboard: str
    output: str

    def typed(self, name: str, *more: str) -> subprocess.CompletedProcess[str]:
        """The README's line for this command, at this cluster, for this recipe in its own workspace."""
        [words] = [words for words in shell_commands() if words[0] == name]
        words = [_HERE.get(word, word) for word in words if word not in _ELSEWHERE]
        folder = self.recipe.parents[1]
        return unclip(*words, *more, "--address", self.dashboard, cwd=folder, timeout_s=500)


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Generator[Submitted]:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "configs").mkdir()
    path = folder / "configs/demo.toml"
    tiny = write_recipe(folder, port=free_port()).read_text().replace('"tiny"', '"demo"')
    path.write_text(f"{tiny}\n[first_decoder.train]\nnum_steps = 2\n")
    # One step after the other: a worker that has loaded torch is used again.
    with ray_head(num_cpus=1) as head, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        done = Submitted(path, head.address, head.dashboard, "").typed("submit", *_CHANGES)
        assert done.returncode == 0, done.stdout
        yield Submitted(path, head.address, head.dashboard, done.stdout)


@pytest.fixture(scope="module")
def recipe(submitted: Submitted) -> Path:
    return submitted.recipe


def test_submit_follows_the_whole_recipe(submitted: Submitted) -> None:
    report = submitted.recipe.parents[1] / "workspace/report.html"
    for line in ("evaluate: done in", "ran 11 steps in", f"report: {report}"):
        assert line in submitted.output
    # What the job proposes is for the folder that it was submitted from.
    assert f"\n  unclip serve configs/demo.toml {' '.join(_CHANGES)}\n" in submitted.output


def test_submit_again_runs_nothing_again(submitted: Submitted) -> None:
    def commits() -> dict[str, int]:
        artifacts = _artifacts(submitted.recipe)
        return {name: artifact.path("manifest.json").stat().st_mtime_ns for name, artifact in artifacts.items()}

    before = commits()
    second = submitted.typed("submit", *_CHANGES)
    assert second.returncode == 0, second.stdout
    assert "has succeeded" in second.stdout
    assert len(before) == 11
    assert commits() == before
    assert submitted.typed("jobs").stdout.count("succeeded") == 1
    assert "evaluate: done in" in submitted.typed("logs").stdout
    assert submitted.typed("stop").stdout.startswith("demo: succeeded\nnext:\n")


def _artifacts(recipe: Path) -> dict[str, Artifact]:
    loaded = load_recipe(recipe)
    return {step.name: artifact_of(Workspace(loaded.workspace), step) for step in make_plan(loaded)}


def test_run_commits_every_step_with_counts_checksums_and_a_tracking_run(recipe: Path) -> None:
    for name, artifact in _artifacts(recipe).items():
        manifest = artifact.manifest()
        assert manifest is not None, name
        assert manifest.files, name
        assert manifest.wall_s > 0, name
        assert manifest.tracking_run_id, name
        for file in manifest.files:
            artifact.verify(file)
        assert not [file for file in artifact.names() if file.startswith("live/")]


def test_run_counts_every_row_from_list_to_embedding(recipe: Path) -> None:
    manifests = {name: artifact.manifest() for name, artifact in _artifacts(recipe).items()}
    pairs, download, embed = (manifests[name].counts for name in ("pairs", "download", "embed"))  # type: ignore[union-attr]
    assert pairs["ok"] == download["in"] == 64 + 5
    assert download["ok"] == embed["in"] == 64
    assert download["failed_to_download"] + download["failed_to_resize"] == 5
    assert embed["ok"] == 64


def test_run_carries_the_uid_from_the_list_to_the_index(recipe: Path) -> None:
    artifacts = _artifacts(recipe)
    listed = pq.read_table(artifacts["pairs"].path("00000.parquet")).to_pylist()
    indexed = pa.ipc.open_file(artifacts["index"].path("segment_00000/rows.arrow")).read_all().to_pylist()
    by_uid = {row["uid"]: row for row in listed}
    assert len(indexed) == 64
    assert all(by_uid[row["uid"]]["caption"] == row["caption"] for row in indexed)
    assert all(by_uid[row["uid"]]["url"] == row["url"] for row in indexed)


def test_the_page_of_formats_names_every_file_column_and_field(recipe: Path) -> None:
    assert missing_from_the_page(Path(load_recipe(recipe).workspace)) == []


def test_run_again_does_nothing(recipe: Path) -> None:
    result = unclip_json("run", str(recipe))
    assert result["ran"] == []
    assert result["wall_s"] < 10


def test_plan_after_a_change_names_the_field_and_what_follows(recipe: Path) -> None:
    rows = unclip_json("plan", str(recipe), "--set", "prior.train.num_steps=5")
    todo = {row["step"]: row["reasons"] for row in rows if row["state"] != "done"}
    assert todo == {"prior": ["prior.train.num_steps: 4 -> 5"], "evaluate": ["prior changed"]}


def test_status_tells_time_and_rows(recipe: Path) -> None:
    rows: list[dict[str, Any]] = unclip_json("status", str(recipe))
    assert {row["state"] for row in rows} == {"done"}
    assert next(row for row in rows if row["step"] == "download")["counts"]["in"] == 69


def test_report_is_one_page_with_pictures_and_numbers(recipe: Path) -> None:
    page = (Path(load_recipe(recipe).workspace) / "report.html").read_text()
    assert page.count("data:image/") >= 3
    for word in ("recall", "download", "upsampler_2"):
        assert word in page.lower()
    assert "http://" not in page.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")


def test_sample_writes_pictures_grid_and_rows_and_repeats_with_the_seed(recipe: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", "a large blue star on a white background"]
    for name in ("one", "two"):
        rows = unclip_json("sample", str(recipe), *prompts, "-n", "2", "--seed", "7", "--out", str(tmp_path / name))
        assert len(rows) == 4
    lines = [json.loads(line) for line in (tmp_path / "one/samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompts[0]] * 2 + [prompts[1]] * 2
    for line in lines:
        picture = tmp_path / "one" / line["file"]
        assert Image.open(picture).size == (32, 32)
        assert picture.read_bytes() == (tmp_path / "two" / line["file"]).read_bytes()
        assert {"seed", "settings"} <= line.keys()
    assert Image.open(tmp_path / "one/grid.png").width > 64
    # Another way of sampling is no other network: nothing has to be trained again.
    other = ["--set", "decoder.model.sampler.num_steps=2"]
    [row] = unclip_json(
        "sample", str(recipe), prompts[0], "-n", "1", "--seed", "7", "--out", str(tmp_path / "o"), *other
    )
    assert row["settings"]["decoder"]["num_steps"] == 2
    assert Image.open(tmp_path / "o" / row["file"]).size == (32, 32)


def test_search_by_text_and_by_image_returns_pairs(recipe: Path, tmp_path: Path) -> None:
    nearest = unclip_json("search", str(recipe), "a red circle", "-k", "3")["neighbours"]
    assert len(nearest) == 3
    assert nearest[0]["similarity"] >= nearest[-1]["similarity"]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "query.png")
    page = tmp_path / "sheet.html"
    answer = unclip_json("search", str(recipe), "--image", str(tmp_path / "query.png"), "-k", "2", "--html", str(page))
    assert len(answer["neighbours"]) == 2
    assert page.read_text().count("data:image/jpeg") == 3  # the query too


def test_readme_commands_do_what_they_say(recipe: Path, tmp_path: Path) -> None:
    """The README's lines as they stand, in a folder that has this recipe in the demo's place."""
    (tmp_path / "configs").mkdir()
    shutil.copy(recipe, tmp_path / "configs/demo.toml")
    shutil.copy(_artifacts(recipe)["pairs"].path("00000.parquet"), tmp_path / "pairs.parquet")
    ran: set[str] = set()
    for words in shell_commands():
        if words[0] in {"serve", "submit", "jobs", "logs", "stop"}:  # typed above, and by tests/runtime/test_serve.py
            continue
        first_step = ["--until", "pairs", "--set", "tracking.uri=off"] if words[0] == "run" else []
        done = unclip_here(*words, *first_step, cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        if "--out" in words:
            assert (tmp_path / words[words.index("--out") + 1]).exists(), words
        ran.add(words[0])
    assert {"plan", "status", "sample", "search", "init", "run"} <= ran


def test_evaluate_prints_the_quality_with_ceiling_and_floor(recipe: Path) -> None:
    done = unclip_here("evaluate", str(recipe))
    assert done.returncode == 0, done.stdout
    for word in ("colour", "shape", "background", "real", "guessed"):
        assert word in done.stdout.lower()


def test_tracker_holds_the_curves(recipe: Path) -> None:
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(tracking_uri=f"sqlite:///{load_recipe(recipe).workspace}/mlflow.db")
    manifest = _artifacts(recipe)["prior"].manifest()
    assert manifest is not None
    points = client.get_metric_history(manifest.tracking_run_id, "loss")
    assert [point.step for point in points] == [2, 4]


def test_corrupt_shard_is_one_message_that_names_it(submitted: Submitted) -> None:
    """After all that read the workspace: it breaks the first shard and asks for an embedding of it."""
    recipe = submitted.recipe
    tar = _artifacts(recipe)["download"].path("00000.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    try:
        changes = ("--set", "embed.batch_size=3", "--until", "embed")
        done = unclip("run", str(recipe), *changes, "--address", submitted.address)
    finally:
        tar.write_bytes(whole)
    assert done.returncode == 3, done.stdout
    assert "00000" in done.stdout
    assert "Traceback" not in done.stdout


# ---- a person's own pictures: photographs that the project did not draw ----------------------

_PHOTOGRAPHS = ("astronaut", "camera", "cat", "coffee", "coins", "rocket", "page", "text", "moon", "clock")
_SHRINK = [
    *("clip.train.num_steps=3", "prior.train.num_steps=3", "decoder.train.num_steps=3"),
    *("upsampler_1.train.num_steps=3", "upsampler_2.train.num_steps=3", "evaluate.num_prompts=4"),
    *("clip.train.batch_size=8", "prior.train.batch_size=8", "decoder.train.batch_size=8"),
    *("upsampler_1.train.batch_size=4", "upsampler_2.train.batch_size=4", "evaluate.num_shown=2"),
    *("decoder.model.sampler.num_steps=2", "evaluate.num_images_per_shown=1", "tracking.uri=off"),
    *(f"{name}.resources.num_workers=1" for name in ("download", "embed", "decoder", "evaluate")),
    *(f"{name}.train.warmup_steps=0" for name in ("clip", "prior", "decoder", "upsampler_1", "upsampler_2")),
    *("upsampler_1.model.sampler.num_steps=2", "upsampler_2.model.sampler.num_steps=2"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    number = 0
    for name in _PHOTOGRAPHS:
        try:
            picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        except (ModuleNotFoundError, OSError, AttributeError):
            continue  # not among the pictures that come inside the package
        side = min(picture.size) // 2
        for left, top in ((0, 0), (side // 2, side // 2), (side, side)):
            crop = picture.crop((left, top, left + side, top + side)).resize((160, 160))
            crop.save(folder / f"{number:03d}.jpg")
            (folder / f"{number:03d}.txt").write_text(f"a photograph of {name}, part {left}")
            number += 1
    assert number >= 15
    return folder


def test_init_and_run_on_a_folder_of_photographs(photographs: Path, submitted: Submitted, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    done = unclip("init", str(photographs), "--out", str(recipe), "--no-time")
    assert done.returncode == 0, done.stdout
    overrides = [part for value in [*_SHRINK, f"workspace={tmp_path / 'w'}"] for part in ("--set", value)]
    done = unclip("run", str(recipe), "--address", submitted.address, *overrides, timeout_s=500)
    assert done.returncode == 0, done.stdout
    rows = {row["step"]: row for row in unclip_json("status", str(recipe), *overrides)}
    num_pictures = len(list(photographs.glob("*.jpg")))
    assert rows["download"]["counts"]["ok"] == rows["embed"]["counts"]["ok"] == num_pictures
    nearest = unclip_json("search", str(recipe), "a photograph of coffee", "-k", "3", *overrides)["neighbours"]
    assert all("photograph" in row["caption"] for row in nearest)
    out = tmp_path / "out"
    assert len(unclip_json("sample", str(recipe), "a cup", "-n", "1", "--out", str(out), *overrides)) == 1
    assert (out / "grid.png").exists()


def test_init_and_read_a_list_with_other_column_names(photographs: Path, submitted: Submitted, tmp_path: Path) -> None:
    listed = tmp_path / "pairs.csv"
    with listed.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "URL", "TEXT"])
        for number, picture in enumerate(sorted(photographs.glob("*.jpg"))):
            writer.writerow([number, picture.as_uri(), picture.with_suffix(".txt").read_text()])
    recipe = tmp_path / "listed.toml"
    assert unclip("init", str(listed), "--out", str(recipe), "--no-time").returncode == 0
    overrides = ["--set", f"workspace={tmp_path / 'w'}", "--set", "tracking.uri=off"]
    done = unclip("run", str(recipe), "--until", "pairs", "--address", submitted.address, *overrides)
    assert done.returncode == 0, done.stdout
    rows = {row["step"]: row for row in unclip_json("status", str(recipe), *overrides)}
    assert rows["pairs"]["counts"]["ok"] == len(list(photographs.glob("*.jpg")))
    assert unclip("init", str(listed), "--out", str(recipe)).returncode == 2
