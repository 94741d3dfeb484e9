import pytest

from pipeline.errors import ConfigError
from pipeline.shapes.captions import training_caption
from pipeline.shapes.scene import training_scene
from pipeline.shapes.url_list import FAULTS, url_table

BASE = "http://127.0.0.1:8765"


def test_url_table_lists_good_pairs_with_their_attributes() -> None:
    rows = url_table(BASE, 30, seed=2, image_px=64).to_pylist()
    assert [row["url"] for row in rows] == [f"{BASE}/2/64/{i}.png" for i in range(30)]
    for index, row in enumerate(rows):
        scene = training_scene(2, index)
        caption = training_caption(scene, 2, index)
        assert (row["index"], row["caption"], row["num_objects"]) == (index, caption, len(scene.objects))
        assert (row["colour_1"], row["shape_1"]) == (scene.objects[0].colour, scene.objects[0].shape)
        assert (row["size_2"] is None) == (len(scene.objects) == 1)
        assert (row["background"], row["relation"]) == (scene.background, scene.relation)


def test_url_table_mixes_in_the_requested_number_of_each_fault() -> None:
    faults = dict.fromkeys(FAULTS, 3)
    rows = url_table(BASE, 100, seed=2, faults=faults).to_pylist()
    assert len(rows) == 100 + 3 * len(FAULTS)
    assert sorted(row["index"] for row in rows) == list(range(len(rows)))
    for kind in FAULTS:
        assert sum(f"/faulty/{kind}/" in row["url"] for row in rows) == 3
    positions = [position for position, row in enumerate(rows) if "/faulty/" in row["url"]]
    assert min(positions) < 40
    assert max(positions) > 80
    assert sum(row["url"].startswith("http://127.0.0.1:1/faulty/refused/") for row in rows) == 3


def test_url_table_is_the_same_for_the_same_arguments() -> None:
    first, second = (url_table(BASE, 25, seed=1, faults={"missing": 2, "html": 1}) for _ in range(2))
    assert first.num_rows == 28
    assert first.equals(second)


@pytest.mark.parametrize(
    ("num_pairs", "image_px", "faults", "message"),
    [
        (0, 128, {}, "num_pairs must be at least 1, not 0"),
        (5, 8, {}, "image_px must be from 16 to 1024, not 8"),
        (5, 128, {"sleepy": 1}, "unknown kind of faulty URL 'sleepy'"),
        (5, 128, {"html": -1}, "must not be negative"),
    ],
)
def test_url_table_refuses_impossible_numbers(
    num_pairs: int, image_px: int, faults: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        url_table(BASE, num_pairs, seed=0, image_px=image_px, faults=faults)
