from dataclasses import replace

import pytest

from pipeline.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    EVALUATION_KINDS,
    HELD_OUT,
    RADIUS,
    RELATIONS,
    SHAPES,
    TWO_OBJECTS_PROB,
    Object,
    Scene,
    evaluation_scenes,
    is_held_out,
    novelties,
    trained_twins,
    training_scene,
)


def training_scenes(num_scenes: int, seed: int) -> list[Scene]:
    return [training_scene(seed, index) for index in range(num_scenes)]


def test_training_scene_depends_on_seed_and_index_alone() -> None:
    scenes = training_scenes(40, seed=3)
    assert scenes == training_scenes(40, seed=3)
    assert scenes[::-1] == [training_scene(3, index) for index in reversed(range(40))]
    assert scenes != training_scenes(40, seed=4)
    assert len({str(scene) for scene in scenes}) == 40


GOLDEN_OBJECTS = [
    ("small", "green", "square", 0.4628, 0.6775),
    ("medium", "blue", "square", 0.4663, 0.2469),
]
GOLDEN_REST = ("beige", "below")


def test_training_scene_is_the_same_in_every_version() -> None:
    # A changed draw changes every picture of a workspace without changing any key: change the step's version with it.
    scene = training_scene(0, 2)
    assert [(o.size, o.colour, o.shape, round(o.x, 4), round(o.y, 4)) for o in scene.objects] == GOLDEN_OBJECTS
    assert (scene.background, scene.relation) == GOLDEN_REST


def test_training_scenes_never_hold_a_held_out_combination() -> None:
    for scene in training_scenes(3000, seed=1):
        looks = [(item.colour, item.shape) for item in scene.objects]
        assert not set(looks) & set(HELD_OUT.objects)
        assert not {(*look, scene.background) for look in looks} & set(HELD_OUT.settings)
        assert tuple(looks) not in HELD_OUT.pairs
        assert tuple(reversed(looks)) not in HELD_OUT.pairs


@pytest.mark.parametrize(
    ("looks", "background", "expected"),
    [
        ([HELD_OUT.objects[0]], "white", True),
        ([("red", "circle"), HELD_OUT.objects[1]], "white", True),
        ([HELD_OUT.settings[0][:2]], HELD_OUT.settings[0][2], True),
        (list(HELD_OUT.pairs[0]), "white", True),
        (list(reversed(HELD_OUT.pairs[0])), "white", True),
        ([("blue", "circle")], "gray", False),
    ],
)
def test_is_held_out_finds_each_kind_of_combination(
    looks: list[tuple[str, str]], background: str, expected: bool
) -> None:
    objects = tuple(Object(shape, colour, "small", 0.3 + 0.4 * i, 0.5) for i, (colour, shape) in enumerate(looks))
    assert is_held_out(Scene(objects, background, "above" if len(looks) == 2 else None)) is expected


def test_training_scenes_cover_every_attribute_about_evenly() -> None:
    scenes = training_scenes(3000, seed=0)
    items = [item for scene in scenes for item in scene.objects]
    assert sum(len(scene.objects) == 2 for scene in scenes) / 3000 == pytest.approx(TWO_OBJECTS_PROB, abs=0.04)
    for names, values in (
        (SHAPES, [item.shape for item in items]),
        (COLOURS, [item.colour for item in items]),
        (RADIUS, [item.size for item in items]),
        (BACKGROUNDS, [scene.background for scene in scenes]),
        (RELATIONS, [scene.relation for scene in scenes if scene.relation]),
    ):
        for name in names:
            assert 0.6 < values.count(name) * len(names) / len(values) < 1.4, name


def test_scenes_keep_objects_inside_apart_and_in_their_relation() -> None:
    scenes = [*training_scenes(1500, seed=2), *(each.scene for each in evaluation_scenes(280, seed=2))]
    for scene in scenes:
        for item in scene.objects:
            assert 0.0199 <= item.x - scene.radius(item) < item.x + scene.radius(item) <= 0.9801
            assert 0.0199 <= item.y - scene.radius(item) < item.y + scene.radius(item) <= 0.9801
        assert (scene.relation is None) == (len(scene.objects) == 1)
        if scene.relation:
            first, second = scene.objects
            assert (first.colour, first.shape) != (second.colour, second.shape)
            sign_x, sign_y = RELATIONS[scene.relation]
            dx, dy = first.x - second.x, first.y - second.y
            assert sign_x * dx + sign_y * dy >= scene.radius(first) + scene.radius(second) + 0.0399
            assert (abs(dx) > abs(dy)) == bool(sign_x)


def test_evaluation_scenes_are_held_out_distinct_and_half_of_one_object() -> None:
    scenes = evaluation_scenes(240, seed=0)
    assert scenes == evaluation_scenes(280, seed=0)[:240]
    assert all(is_held_out(each.scene) for each in scenes)
    prompts = {
        (each.scene.background, each.scene.relation, *((o.size, o.colour, o.shape) for o in each.scene.objects))
        for each in scenes
    }
    assert len(prompts) == 240
    assert sum(len(each.scene.objects) == 1 for each in scenes) == 120
    assert all(each.kind.startswith("one") == (len(each.scene.objects) == 1) for each in scenes)
    assert {each.kind for each in scenes} == set(EVALUATION_KINDS)


def test_novelties_name_every_held_out_combination_of_a_scene() -> None:
    for each in evaluation_scenes(240, seed=0):
        kinds = novelties(each.scene)
        looks = [(item.colour, item.shape) for item in each.scene.objects]
        assert ("new colour of a shape" in kinds) == bool(set(looks) & set(HELD_OUT.objects))
        assert ("new setting" in kinds) == bool(
            {(*look, each.scene.background) for look in looks} & set(HELD_OUT.settings)
        )
        assert ("new pair" in kinds) == (tuple(looks) in HELD_OUT.pairs or tuple(looks[::-1]) in HELD_OUT.pairs)
        named = "new colour of a shape" if "new colour" in each.kind else each.kind.split(", ")[1]
        assert named in kinds


def test_trained_twins_differ_from_held_out_scenes_in_colours_and_background_alone() -> None:
    scenes = [each.scene for each in evaluation_scenes(280, seed=0)]
    twins = trained_twins(scenes, seed=0)
    assert twins[:100] == trained_twins(scenes[:100], seed=0)
    assert not any(is_held_out(twin) for twin in twins)
    assert {item.colour for twin in twins for item in twin.objects} == set(COLOURS)
    assert {twin.background for twin in twins} == set(BACKGROUNDS)
    for scene, twin in zip(scenes, twins, strict=True):
        assert twin.relation == scene.relation
        looks = [(item.colour, item.shape) for item in twin.objects]
        assert len(set(looks)) == len(looks)
        recoloured = tuple(replace(a, colour=b.colour) for a, b in zip(scene.objects, twin.objects, strict=True))
        assert recoloured == twin.objects


def test_evaluation_scenes_refuse_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="from 1 to 280, not 281"):
        evaluation_scenes(281, seed=0)
    assert len(evaluation_scenes(280, seed=5)) == 280
