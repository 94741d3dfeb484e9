import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from pipeline.errors import DataError
from pipeline.grid import Block, draw_grid, fit, wrap
from pipeline.pictures.frame import square, thumbnail
from pipeline.pictures.png import to_png
from pipeline.pictures.read import decode


def _flat(colour: tuple[int, int, int], side_px: int = 8) -> np.ndarray:
    return np.full((side_px, side_px, 3), colour, np.uint8)


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_draw_grid_has_the_size_of_its_cells() -> None:
    """2 columns of 2 pictures of 100 px with 6 px between and 18 px around; one line of 13 px under each row."""
    blocks = [Block([_flat(RED), _flat(BLUE)], "a red one") for _ in range(3)]
    grid = draw_grid(blocks, columns=2, cell_px=100)
    row = 100 + 6 + round(13 * 1.3)
    assert grid.size == (18 * 3 + 2 * 206, 18 + 2 * (row + 18))


def test_draw_grid_puts_each_picture_in_its_cell_and_its_label_below() -> None:
    grid = np.asarray(draw_grid([Block([_flat(RED), _flat(BLUE)], "two squares")], cell_px=100))
    assert tuple(grid[18 + 50, 18 + 50]) == RED
    assert tuple(grid[18 + 50, 18 + 106 + 50]) == BLUE
    assert (grid[18 + 106 :, 18:200] < 100).any(), "no letters under the pictures"
    unlabelled = np.asarray(draw_grid([Block([_flat(RED)])], cell_px=100))
    assert (unlabelled[18 + 101 :] == 255).all()


def test_draw_grid_draws_tags_and_title() -> None:
    plain = draw_grid([Block([_flat(RED)], "x")], cell_px=100)
    full = draw_grid([Block([_flat(RED)], "x", tags=["real"])], cell_px=100, title="T")
    assert full.height > plain.height + 20
    assert full.width == plain.width


def test_draw_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_grid([])


def test_wrap_fits_every_line_and_cuts_what_is_left_over() -> None:
    font = ImageFont.load_default(size=14)
    text = "a large red circle to the left of a small blue star on a gray background"
    lines = wrap(text, 14, 260)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 260 for line in lines)
    short = wrap(text * 4, 14, 120)
    assert len(short) == 3
    assert short[-1].endswith("...")
    assert all(font.getlength(line) <= 120 for line in wrap("unbreakable" * 9, 14, 120))


def test_fit_enlarges_with_hard_edges_and_keeps_the_aspect() -> None:
    tiny = np.array([[RED, BLUE], [BLUE, RED]], np.uint8)
    large = np.asarray(fit(tiny, 8))
    assert {tuple(pixel) for pixel in large.reshape(-1, 3)} == {RED, BLUE}
    wide = np.asarray(fit(np.full((10, 40, 3), 9, np.uint8), 20))
    assert tuple(wide[10, 10]) == (9, 9, 9)
    assert tuple(wide[2, 10]) == (255, 255, 255)


def test_png_round_trip_is_lossless_and_deterministic() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert to_png(picture) == to_png(picture)
    np.testing.assert_array_equal(np.asarray(decode(to_png(picture), where="x")), picture)


def test_from_bytes_names_the_broken_picture() -> None:
    with pytest.raises(DataError, match="shard 00003: key 7"):
        decode(b"not a picture", where="shard 00003: key 7")
    whole = to_png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="here"):
        decode(whole[: len(whole) // 2], where="here")


def test_centre_square_cuts_the_middle_without_stretching() -> None:
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200
    cut = square(Image.fromarray(picture), 10)
    assert cut.shape == (10, 10, 3)
    assert (cut == 200).all()


def test_thumbnail_shrinks_only_what_is_larger() -> None:
    small = Image.new("RGB", (30, 20))
    assert thumbnail(small, 64) is small
    assert thumbnail(Image.new("RGB", (300, 150)), 64).size == (64, 32)
    with io.BytesIO() as buffer:
        thumbnail(small).save(buffer, "PNG")
