from collections import Counter

from pipeline.shapes.captions import (
    CANONICAL_ONE,
    CANONICAL_TWO,
    TEMPLATES_ONE,
    TEMPLATES_TWO,
    canonical_caption,
    training_caption,
)
from pipeline.shapes.scene import Object, Scene, training_scene

ONE = Scene((Object("star", "orange", "large", 0.5, 0.5),), "gray")
TWO = Scene(
    (Object("circle", "red", "small", 0.3, 0.5), Object("square", "orange", "medium", 0.7, 0.5)),
    "white",
    "to the left of",
)


def test_canonical_caption_names_every_attribute_in_the_expected_words() -> None:
    assert canonical_caption(ONE) == "a large orange star on a gray background"
    assert canonical_caption(TWO) == "a small red circle to the left of a medium orange square on a white background"


def test_training_caption_depends_on_seed_and_index_alone() -> None:
    captions = [training_caption(TWO, 5, index) for index in range(50)]
    assert captions == [training_caption(TWO, 5, index) for index in range(50)]
    assert len(set(captions)) == len(TEMPLATES_TWO)


def test_training_caption_uses_articles_of_its_colours() -> None:
    captions = {training_caption(ONE, 0, index) for index in range(200)}
    assert len(captions) == len(TEMPLATES_ONE)
    assert "an orange star" in captions
    assert not any("a orange" in caption for caption in captions)
    assert any("and an orange square" in training_caption(TWO, 0, index) for index in range(200))


def test_training_caption_is_canonical_at_least_half_of_the_time() -> None:
    for canonical, templates in ((CANONICAL_ONE, TEMPLATES_ONE), (CANONICAL_TWO, TEMPLATES_TWO)):
        weights = dict(templates)
        assert weights[canonical] >= sum(weights.values()) / 2
    counts: Counter[bool] = Counter()
    for index in range(1000):
        scene = training_scene(9, index)
        counts[training_caption(scene, 9, index) == canonical_caption(scene)] += 1
    assert 440 < counts[True] < 560


def test_training_captions_agree_with_their_scenes() -> None:
    for index in range(300):
        scene = training_scene(2, index)
        caption = training_caption(scene, 2, index)
        for item in scene.objects:
            assert f"{item.colour} {item.shape}" in caption
        assert caption.isascii()
        assert "{" not in caption
