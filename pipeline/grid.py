"""Labelled grids of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures.png import Picture, to_image

_PAPER = (255, 255, 255)
_INK = (31, 35, 40)
_MUTED = (110, 118, 129)
_EDGE = (222, 226, 230)
_GAP_PX = 6
_MARGIN_PX = 18
_LINE = 1.3
_LABEL_LINES = 3
"""A label is cut after this many lines."""


@dataclass(frozen=True)
class Block:
    """Pictures side by side with one label under them."""

    pictures: Sequence[Picture]
    label: str = ""
    tags: Sequence[str] = ()
    """A word under each picture, above the label."""


def draw_grid(blocks: Sequence[Block], *, columns: int = 1, cell_px: int = 160, title: str = "") -> Image.Image:
    """Lay out blocks of pictures in columns, each with its label under it.

    Args:
        blocks: In reading order; a block with fewer pictures than the widest leaves its cells empty.
        columns: Blocks side by side.
        cell_px: Side of each picture in the grid, in pixels; smaller pictures are enlarged with hard edges.
        title: A line above the grid.

    Raises:
        ValueError: If there is nothing to draw.
    """
    widest = max((len(block.pictures) for block in blocks), default=0)
    if widest == 0:
        raise ValueError("a grid needs at least one picture")
    block_width = widest * cell_px + (widest - 1) * _GAP_PX
    label_px, tag_px = max(13, cell_px // 11), max(11, cell_px // 14)
    lines = [wrap(block.label, label_px, block_width) for block in blocks]
    tag_height = round(tag_px * _LINE) + 2 if any(block.tags for block in blocks) else 0
    top = _MARGIN_PX + (round(1.4 * label_px * _LINE) + _GAP_PX if title else 0)
    heights = [
        cell_px + tag_height + _GAP_PX + round(max(map(len, lines[row : row + columns])) * label_px * _LINE)
        for row in range(0, len(blocks), columns)
    ]
    num_columns = min(columns, len(blocks))
    width = 2 * _MARGIN_PX + num_columns * block_width + (num_columns - 1) * _MARGIN_PX
    page = Image.new("RGB", (width, top + sum(heights) + len(heights) * _MARGIN_PX), _PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((_MARGIN_PX, _MARGIN_PX), title, fill=_INK, font=_font(round(1.4 * label_px)))
    for number, (block, text) in enumerate(zip(blocks, lines, strict=True)):
        row, column = divmod(number, columns)
        x = _MARGIN_PX + column * (block_width + _MARGIN_PX)
        y = top + sum(heights[:row]) + row * _MARGIN_PX
        for i, picture in enumerate(block.pictures):
            left = x + i * (cell_px + _GAP_PX)
            page.paste(fit(picture, cell_px), (left, y))
            pen.rectangle((left, y, left + cell_px - 1, y + cell_px - 1), outline=_EDGE)
            if i < len(block.tags):
                pen.text((left, y + cell_px + 2), block.tags[i], fill=_MUTED, font=_font(tag_px))
        below = y + cell_px + tag_height + _GAP_PX
        for i, line in enumerate(text):
            pen.text((x, below + round(i * label_px * _LINE)), line, fill=_INK, font=_font(label_px))
    return page


def wrap(text: str, font_px: int, width_px: int) -> list[str]:
    """Break text into at most three lines that fit into ``width_px``; a longer text ends in an ellipsis."""
    font, lines = _font(font_px), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LABEL_LINES:
        lines = [*lines[: _LABEL_LINES - 1], f"{lines[_LABEL_LINES - 1]} ..."]
    return [_cut(line, font, width_px) for line in lines if line]


def fit(picture: Picture, side_px: int) -> Image.Image:
    """A picture resized into a square of ``side_px``: enlarged with hard edges, or shrunk with a filter."""
    image = to_image(picture)
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    if image.size == (side_px, side_px):
        return image
    square = Image.new("RGB", (side_px, side_px), _PAPER)
    square.paste(image, ((side_px - image.width) // 2, (side_px - image.height) // 2))
    return square


def _cut(line: str, font: Any, width_px: int) -> str:
    while len(line) > 1 and font.getlength(line) > width_px:
        line = line[: -4 if line.endswith("...") else -1].rstrip() + "..."
    return line


@cache
def _font(size_px: int) -> Any:
    # Pillow's own scalable face (Aileron): the same letters on every machine.
    return ImageFont.load_default(size=size_px)
