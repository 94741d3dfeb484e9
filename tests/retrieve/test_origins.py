"""The training pairs that are nearest to a picture, among those of its own lineage."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.clip.frozen import FrozenClip
from pipeline.data.vectors import read_vectors, to_unit
from pipeline.networks.clip import load_clip_artifact
from pipeline.pictures.read import decode
from pipeline.recipe.lineage import trace
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.origins import nearest_pairs
from pipeline.sampling.sample import sample_recipe
from tests.tiny.command import unclip_here, unclip_json


@pytest.fixture(scope="module")
def picture(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the tiny cascade."""
    folder = tmp_path_factory.mktemp("out")
    sample_recipe(tiny, ["a red circle"], num_images=1, seed=3, out_dir=folder)
    return folder / "000-0.png"


def test_the_nearest_training_pairs_are_those_of_an_exact_search(tiny: Recipe, picture: Path) -> None:
    artifacts = finished_artifacts(tiny, ("clip", "embed"))
    clip, rows = load_clip_artifact(artifacts["clip"]), read_vectors(artifacts["embed"].path("00000.parquet"))
    assert isinstance(clip, FrozenClip)
    image = np.array(decode(picture.read_bytes(), where="here"))
    vector = clip.encode_image(torch.from_numpy(image)[None])[0].cpu().numpy()
    similarity = to_unit(rows.z_image) @ (vector / np.linalg.norm(vector))
    table = rows.table.append_column("similarity", [similarity]).to_pylist()
    exact = {row["uid"]: row["similarity"] for row in table if row["split"] == "train"}
    urls = {row["uid"]: row["url"] for row in table}
    pairs = nearest_pairs(str(picture), trace(str(picture), tiny.workspace), 3)
    exact_similarities = [exact[pair.uid] for pair in pairs]
    assert exact_similarities == pytest.approx(sorted(exact.values(), reverse=True)[:3], abs=1e-5)  # two may be as near
    assert [pair.similarity for pair in pairs] == pytest.approx(exact_similarities, abs=1e-3)
    assert [pair.url for pair in pairs] == [urls[pair.uid] for pair in pairs]


def test_the_command_names_them_and_says_if_they_are_not_known(tiny: Recipe, picture: Path) -> None:
    words = ("lineage", str(picture), "--workspace", tiny.workspace)
    rows = unclip_json(*words, "--nearest", "2")["nearest"]
    printed = unclip_here(*words, "--nearest", "2").stdout
    assert len(rows) == 2
    assert all(f"url: {row['url']}" in printed and row["uid"] in printed for row in rows)
    assert unclip_json(*words, "--nearest", "0")["nearest"] == []
    lineage = trace(str(picture), tiny.workspace)
    others = tuple(node for node in lineage.nodes if node.step != "embed")
    assert nearest_pairs(str(picture), type(lineage)(lineage.what, {}, lineage.workspace, others, ()), 2) == []
