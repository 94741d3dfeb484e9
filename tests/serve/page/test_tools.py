"""The tools of an open picture on the page: variations, the brush, a change by text, a blend."""

import re
import time
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.serve.page.visit import PROMPT, both_widths, button, drop, finished, generate, history, needs_browser
from tests.tiny.shards import plain_picture

pytestmark = needs_browser


def open_with(page: Page, tool: str) -> Locator:
    """Generate a picture, open it and choose a tool."""
    generate(page, steps=2)
    finished(page).click()
    viewer = page.get_by_role("dialog")
    viewer.get_by_role("tab", name=tool, exact=True).click()
    return viewer


@both_widths
def test_a_picture_is_varied(page: Page) -> None:
    viewer = open_with(page, "Variations")
    viewer.get_by_label("Pictures", exact=True).fill("3")
    viewer.get_by_role("button", name="Make variations", exact=True).click()
    expect(viewer).not_to_be_visible()
    expect(finished(page)).to_have_count(3)
    expect(page.get_by_role("heading", name="Variations of " + PROMPT)).to_be_visible()
    finished(page).first.click()
    expect(page.get_by_role("dialog").locator("dl")).to_contain_text("Variation")


HOLD = """() => {
  const real = window.createImageBitmap, held = [];
  window.createImageBitmap = async (blob) => { await new Promise((go) => held.push(go)); return real(blob); };
  window.release = () => { window.createImageBitmap = real; for (const go of held) go(); };
}"""
"""Pictures are decoded once they are released, as if each were large."""


def test_a_picture_is_varied_once_however_often_the_button_is_pressed(page: Page) -> None:
    viewer, posts = open_with(page, "Variations"), list[str]()
    page.on("request", lambda request: posts.extend([request.url] * request.url.endswith("/variations")))
    vary = viewer.get_by_role("button", name="Make variations", exact=True)
    page.evaluate(HOLD)
    vary.dblclick()
    page.evaluate("release()")
    expect(finished(page)).to_have_count(4)
    assert len(posts) == 1
    finished(page).first.click()
    page.evaluate(HOLD)
    vary.click()
    page.keyboard.press("Escape")
    page.get_by_label("Steps", exact=True).fill("300")
    button(page, "Generate").click()
    page.evaluate("release()")
    expect(finished(page)).to_have_count(1)
    assert len(posts) == 1


@both_widths
def test_what_is_painted_over_is_repainted_and_nothing_else(page: Page) -> None:
    viewer = open_with(page, "Repaint")
    before = pixels_of(page, "#view-image")
    viewer.get_by_label("Whole picture afterwards").fill("a blue star")
    viewer.get_by_label("Pictures", exact=True).fill("1")
    repaint = viewer.get_by_role("button", name="Repaint", exact=True)
    repaint.click()
    expect(viewer).to_contain_text("Nothing is painted over yet.")
    canvas = viewer.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"], steps=3)
    page.mouse.up()
    repaint.click()
    expect(viewer).not_to_be_visible()
    expect(page.get_by_role("heading", name="a blue star")).to_be_visible()
    expect(finished(page)).to_have_count(1)
    difference = np.abs(pixels_of(page, "#pictures img").astype(int) - before).max(axis=-1)
    assert difference[3:14, 3:14].any()
    assert not difference[20:, 20:].any()
    finished(page).click()
    viewer.get_by_role("button", name="Reuse all", exact=True).click()
    expect(page.get_by_role("status").first).to_contain_text("It was made from another picture, so the form makes")


def test_the_brush_is_moved_by_keys(page: Page) -> None:
    viewer = open_with(page, "Repaint")
    canvas = viewer.locator("canvas")
    expect(canvas).to_have_attribute("width", "512")
    blank = canvas.evaluate("(canvas) => canvas.toDataURL()")
    for key in ("Space", "ArrowRight", "Space"):
        canvas.press(key)
    canvas.evaluate("(canvas) => canvas.blur()")  # the brush itself is no longer drawn
    assert canvas.evaluate("(canvas) => canvas.toDataURL()") != blank
    viewer.get_by_role("button", name="Undo").click()
    assert canvas.evaluate("(canvas) => canvas.toDataURL()") == blank


@both_widths
def test_a_text_changes_a_picture_and_a_slider_shows_the_way(page: Page) -> None:
    viewer = open_with(page, "Change by text")
    viewer.get_by_label("To", exact=True).fill("a blue star")
    viewer.get_by_label("Frames", exact=True).fill("3")
    viewer.get_by_role("button", name="Change by text", exact=True).click()
    way = viewer.get_by_role("slider", name="Change", exact=True)
    expect(way).to_have_value("2")
    last = viewer.locator("#view-image").get_attribute("src")
    way.press("ArrowLeft")
    assert viewer.locator("#view-image").get_attribute("src") != last
    expect(viewer.locator("#view-frames output")).to_have_text("20 %")
    expect(viewer.locator("#view-image")).to_be_in_viewport()
    expect(way).to_be_in_viewport()  # both at once, on a phone too
    kept = page.get_by_role("region", name="History").get_by_role("button", name="Towards a blue star")
    for name, count in (("Keep this frame", 1), ("Keep all frames", 4)):
        viewer.get_by_role("button", name=name).click()
        expect(kept).to_have_count(count)  # hidden behind the dialog
    page.keyboard.press("Escape")
    kept.first.click()  # its name is no prompt
    expect(viewer.get_by_text("Towards a blue star").first).to_be_visible()
    expect(viewer.locator("dl")).not_to_contain_text("Prompt")
    expect(viewer.get_by_role("button", name="Reuse all", exact=True)).not_to_be_visible()
    with page.expect_download() as download:
        viewer.get_by_role("button", name="Download").click()
    assert re.fullmatch(r"tiny-towards-a-blue-star-change-by-text-seed\d+\.png", download.value.suggested_filename)
    viewer.get_by_role("tab", name="Variations", exact=True).click()
    expect(way).not_to_be_visible()


def test_frames_are_previewed_and_can_be_cancelled(page: Page, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = open_with(page, "Change by text")
    advance = server.engine._advance

    def advance_frames_slowly(pictures: Any) -> Any:
        if len(pictures) > 1:  # not the one picture whose noise is looked for first
            time.sleep(0.05)
        return advance(pictures)

    monkeypatch.setattr(server.engine, "_advance", advance_frames_slowly)
    shown = viewer.locator("#view-image")
    original = shown.get_attribute("src")
    viewer.get_by_label("To", exact=True).fill("a blue star")
    viewer.get_by_label("Frames", exact=True).fill("10")
    viewer.get_by_role("button", name="Change by text", exact=True).click()
    before = server.engine.counts()["dropped"]
    expect(shown).not_to_have_attribute("src", str(original))
    cancel = viewer.get_by_role("button", name="Cancel", exact=True)
    expect(cancel).to_be_visible()
    cancel.click()
    expect(viewer.get_by_text("Cancelled.")).to_be_visible()
    expect(shown).to_have_attribute("src", str(original))
    expect(viewer.get_by_role("slider", name="Change", exact=True)).not_to_be_visible()
    deadline = time.monotonic() + 60
    while server.engine.counts()["dropped"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@both_widths
def test_delete_removes_the_picture_that_is_shown_also_when_another_one_came(page: Page) -> None:
    generate(page, count=2, steps=2)
    expect(finished(page)).to_have_count(2)
    history(page, PROMPT).first.click()
    viewer = page.get_by_role("dialog")
    viewer.get_by_role("tab", name="Change by text", exact=True).click()
    viewer.get_by_label("To", exact=True).fill("a blue star")
    viewer.get_by_label("Frames", exact=True).fill("2")
    viewer.get_by_role("button", name="Change by text", exact=True).click()
    viewer.get_by_role("button", name="Keep this frame").click()
    expect(history(page, "Towards a blue star")).to_have_count(1)
    viewer.get_by_role("button", name="Delete").click()
    expect(history(page, "Towards a blue star")).to_have_count(1)
    expect(history(page, PROMPT)).to_have_count(1)
    seed = viewer.get_by_title("Copy the seed")
    seed.click()
    expect(viewer.get_by_text(f"Copied {seed.inner_text()}.")).to_be_in_viewport()


def test_ctrl_and_enter_in_a_tool_press_its_own_button(page: Page) -> None:
    viewer = open_with(page, "Repaint")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    viewer.get_by_label("Whole picture afterwards").fill("a blue star")
    page.keyboard.press("Control+Enter")
    expect(viewer).to_contain_text("Nothing is painted over yet.")
    viewer.get_by_role("button", name="Download").focus()
    page.keyboard.press("Control+Enter")
    expect(viewer).to_be_visible()
    assert not [url for url in requests if url.endswith("/v1/images/generations")]


def test_two_pictures_are_blended(page: Page) -> None:
    drop(page, "red.png", plain_picture("red", 40))
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    viewer = open_with(page, "Blend")
    viewer.get_by_role("button", name="Blend with: a picture").click()
    viewer.get_by_label("Frames", exact=True).fill("3")
    viewer.get_by_role("button", name="Blend", exact=True).click()
    expect(viewer.get_by_role("slider", name="Way")).to_have_value("2")
    expect(viewer.locator("#view-frames output")).to_have_text("100 %")


def pixels_of(page: Page, selector: str) -> Any:
    """The pixels of a shown picture, (H, W, 3)."""
    values, side = page.locator(selector).evaluate(
        """async (image) => {
          await image.decode();
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return [[...context.getImageData(0, 0, canvas.width, canvas.height).data], canvas.width];
        }"""
    )
    return np.array(values, np.uint8).reshape(-1, side, 4)[..., :3]
