"""The page in a real browser, against real networks over real sockets."""

import io
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Route, expect, sync_playwright

from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.guards import Guards
from pipeline.serve.keys import KeyRing, add_key
from tests.tiny.shards import plain_picture

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PHONE, DESKTOP = (375, 667), (1280, 800)
PROMPT = "a large red circle"
PATIENCE_MS = 60_000  # of a busy machine

expect.set_options(timeout=PATIENCE_MS)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH: the page is not tried")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[DESKTOP])
def page(browser: Browser, server: Any, request: Any) -> Iterator[Page]:
    """A visit of the page by a new visitor; an error in the browser's console fails the test."""
    width, height = request.param
    with browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True) as context:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        errors: list[str] = []

        def note(message: ConsoleMessage) -> None:
            if message.type in {"error", "warning"}:
                errors.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        yield page
        assert not errors


both_widths = pytest.mark.parametrize("page", [PHONE, DESKTOP], indirect=True, ids=["phone", "desktop"])


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def generate(page: Page, *, count: int = 1, steps: int | None = None) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Pictures", exact=True).fill(str(count))
    if steps is not None:
        if not page.get_by_label("Steps", exact=True).is_visible():
            page.get_by_text("More settings").click()
        page.get_by_label("Steps", exact=True).fill(str(steps))
    button(page, "Generate").click()


def finished(page: Page) -> Locator:
    return page.get_by_role("button", name=re.compile("Open picture"))


def side_px(picture: Locator) -> int:
    return picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)")


def png(texts: dict[str, str]) -> bytes:
    chunks, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, text in texts.items():
        chunks.add_itxt(name, text, zip=True)
    Image.new("RGB", (32, 32), "navy").save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


@both_widths
def test_a_request_is_previewed_finished_and_kept_in_the_history(page: Page) -> None:
    seed = page.get_by_label("Seed", exact=True).input_value()
    generate(page, count=2, steps=60)
    expect(page.get_by_alt_text("Preview of " + PROMPT).first).to_be_visible()
    expect(page.get_by_role("progressbar", name="Progress")).to_be_visible()
    expect(finished(page)).to_have_count(2)
    assert side_px(page.locator("#pictures img").first) == 32
    expect(page.get_by_role("status").first).to_contain_text("2 pictures in")
    expect(button(page, f"Open picture 2, seed {int(seed) + 1}")).to_be_visible()
    page.reload()
    kept = page.get_by_role("region", name="History").get_by_role("button", name=PROMPT)
    expect(kept).to_have_count(2)
    kept.first.click()
    facts = page.get_by_role("dialog").locator("dl")
    expect(facts).to_contain_text(str(int(seed) + 1))
    expect(facts).to_contain_text("60")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"


def test_previews_change_before_the_result_is_there(page: Page) -> None:
    page.evaluate(
        """() => {
          window.previews = [];
          new MutationObserver(() => {
            const source = document.querySelector("#pictures img[alt^=Preview]")?.src;
            if (source && !window.previews.includes(source)) window.previews.push(source);
          }).observe(document.getElementById("pictures"), { subtree: true, childList: true });
        }"""
    )
    generate(page, steps=100)
    expect(finished(page)).to_have_count(1)
    assert len(page.evaluate("window.previews")) >= 2


def test_a_cancelled_request_leaves_the_engine(page: Page, server: Any) -> None:
    before = server.engine.counts()["dropped"]
    generate(page, count=10, steps=1000)
    expect(page.locator("#server-text")).to_contain_text("in progress")
    button(page, "Cancel").click()
    expect(page.get_by_role("status").first).to_have_text("Cancelled.")
    deadline = time.monotonic() + 60
    while server.engine.counts()["dropped"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    expect(page.get_by_text("cancelled", exact=True)).to_have_count(10)
    expect(page.locator("#server-text")).to_have_text("Idle")
    generate(page, steps=2)  # and the next one is answered
    expect(finished(page)).to_have_count(1)


def test_a_low_window_has_the_button_in_view_beside_a_long_history(page: Page) -> None:
    generate(page, count=10, steps=1)
    expect(finished(page)).to_have_count(10)
    page.set_viewport_size({"width": 1280, "height": 560})
    for place in (0, 150):
        page.evaluate("(place) => scrollTo(0, place)", place)
        expect(button(page, "Generate")).to_be_in_viewport(ratio=1)
        expect(page.get_by_role("status").first).to_be_in_viewport(ratio=1)


def test_the_state_of_the_server_closes_without_cancelling_and_the_title_has_the_progress(page: Page) -> None:
    state = page.locator("#server-facts")
    page.locator("#server summary").click()
    expect(state).to_contain_text("Requests waiting")
    page.get_by_role("heading", name="History").click()
    expect(state).not_to_be_visible()
    generate(page, steps=200)
    expect(page).to_have_title(re.compile("^[1-9][0-9]? % - tiny"))
    page.locator("#server summary").click()
    page.keyboard.press("Escape")
    expect(state).not_to_be_visible()
    expect(finished(page)).to_have_count(1)
    expect(page).to_have_title("tiny - unclip")


def test_a_server_that_is_not_ready_is_asked_again(browser: Browser, server: Any) -> None:
    answers = [("1", 503), ("1", 429)]

    def refuse(route: Route) -> None:
        if not answers:
            return route.fallback()
        seconds, status = answers.pop()
        return route.fulfill(status=status, headers={"Retry-After": seconds}, json={"error": {"message": "not now"}})

    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        page.route("**/v1/images/generations", refuse)
        generate(page)
        expect(page.get_by_role("status").first).to_have_text("Too many requests are waiting; trying again in 1 s.")
        expect(page.get_by_role("status").first).to_have_text("The server is not ready; trying again in 1 s.")
        expect(finished(page)).to_have_count(1)


def test_a_locked_seed_stays_and_another_one_changes(page: Page) -> None:
    seed = page.get_by_label("Seed", exact=True)
    seeds = []
    for lock in (False, False, True):
        if lock:
            button(page, "Lock the seed").click()
        generate(page)
        expect(page.get_by_role("status").first).to_contain_text("1 picture in")
        seeds.append(seed.input_value())
    assert len({*seeds[:2]}) == 2
    assert seeds[1] == seeds[2]
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    button(page, "Copy the seed").click()
    assert page.evaluate("window.copied") == seeds[2]


def test_a_dropped_png_of_the_server_brings_its_settings_back(page: Page, server: Any) -> None:
    page.get_by_label("Negative prompt").fill("a blue star")
    page.get_by_label("Guidance", exact=True).fill("4")
    seed = page.get_by_label("Seed", exact=True)
    seed.fill("9007199254740993")  # 2**53 + 1: no double holds it
    generate(page, steps=3)
    finished(page).click()
    with page.expect_download() as download:
        button(page, "Download").click()
    assert download.value.suggested_filename == "tiny-a-large-red-circle-seed9007199254740993.png"
    file = Path(download.value.path()).read_bytes()
    page.reload()
    assert seed.input_value() != "9007199254740993"
    drop(page, "picture.png", file)
    expect(page.get_by_role("status").first).to_contain_text("The settings of picture.png are in the form")
    values = [
        page.get_by_label(name, exact=True).input_value() for name in ("Prompt", "Negative prompt", "Guidance", "Steps")
    ]
    assert values == [PROMPT, "a blue star", "4", "3"]
    assert seed.input_value() == "9007199254740993"
    kept = page.get_by_role("region", name="History").get_by_role("button", name=PROMPT)
    expect(kept).to_have_count(1)  # it was there already
    drop(page, "other.png", png({"parameters": PROMPT + "\nSteps: 20, Seed: 1, Size: 64x64"}))
    expect(kept).to_have_count(2)


def test_a_png_of_another_program_brings_its_settings_back(page: Page) -> None:
    parameters = "a cat\nand a dog\nNegative prompt: rain, snow\nSteps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 42, Size: 64x64"
    page.get_by_label("Picture from your files").set_input_files(
        {"name": "cat.png", "mimeType": "image/png", "buffer": png({"parameters": parameters})}
    )
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a cat\nand a dog")
    expect(page.get_by_label("Negative prompt")).to_have_value("rain, snow")
    for name, value in (("Guidance", "7.5"), ("Steps", "20"), ("Seed", "42")):
        expect(page.get_by_label(name, exact=True)).to_have_value(value)
    expect(page.get_by_role("combobox", name="Size")).to_have_value("32x32")  # this server's largest


def test_what_is_no_picture_is_refused_in_words(page: Page) -> None:
    drop(page, "notes.png", b"no picture at all")
    expect(page.get_by_role("status").first).to_have_text("notes.png is no picture that this browser can read.")


def drop(page: Page, name: str, data: bytes) -> None:
    """Drop a file on the page, as the browser says it."""
    page.evaluate(
        """([name, bytes]) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          for (const kind of ["dragenter", "dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        [name, list(data)],
    )


@both_widths
def test_the_data_is_searched_by_text_and_by_a_picture(page: Page) -> None:
    button(page, "Search").first.click()
    page.get_by_role("searchbox").fill("a green picture")
    page.get_by_label("Compare with").select_option("captions")
    page.get_by_role("search").get_by_role("button", name="Search", exact=True).click()
    first = page.get_by_role("figure").first
    expect(first).to_contain_text("a green picture")
    expect(first).to_contain_text("1.00")
    expect(first.get_by_role("link")).to_have_attribute("href", "http://127.0.0.1:1/green.jpg")
    page.get_by_label("Compare with").select_option("pictures")
    drop(page, "blue.png", plain_picture("blue", 40))
    expect(first).to_contain_text("a blue picture")
    button(page, "Open result 1").click()
    expect(page.get_by_role("dialog")).to_contain_text("A picture of the data")


def test_a_result_shows_its_neighbours(page: Page, server: Any) -> None:
    drop(page, "red.png", plain_picture("red", 40))
    viewer = page.get_by_role("dialog")
    expect(viewer.get_by_role("figure").first).to_contain_text("a red picture")
    expect(viewer.get_by_role("tab", selected=True)).to_have_text("Neighbours")


def test_a_near_copy_is_flagged(page: Page, neighbours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "near_copy", AsyncMock(return_value=-1.0))  # everything is above it
    generate(page)
    expect(page.locator("#pictures").get_by_text("near copy")).to_be_visible()
    finished(page).click()
    expect(page.get_by_role("figure").first).to_contain_text("near copy")
    page.keyboard.press("Escape")
    drop(page, "red.png", plain_picture("red", 40))  # a picture that this server has not made
    viewer = page.get_by_role("dialog")
    expect(viewer.get_by_role("figure").first).to_contain_text("a red picture")
    expect(viewer.get_by_role("figure").first).to_contain_text("near copy")
    expect(viewer.get_by_role("status").first).to_contain_text("It is a near copy of")
    viewer.get_by_role("tab", name="Change by text", exact=True).click()
    for label, text in (("From", "red"), ("To", "blue"), ("Frames", "2")):
        viewer.get_by_label(label, exact=True).fill(text)
    viewer.get_by_role("button", name="Change by text", exact=True).click()
    expect(viewer.locator("#view-frames output")).to_have_text("40 %, near copy")


def test_a_prompt_that_is_cut_off_is_noted(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(" ".join(["red"] * 31))
    page.get_by_label("Pictures", exact=True).fill("1")
    button(page, "Generate").click()
    expect(page.get_by_role("status").first).to_contain_text("Note: prompt: CLIP reads 32 tokens")


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
    monkeypatch.setattr(server.engine, "_advance", lambda pictures: time.sleep(0.2) or advance(pictures))
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


def test_the_keys_do_what_their_list_says(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Pictures", exact=True).fill("2")
    page.keyboard.press("Control+Enter")
    expect(finished(page)).to_have_count(2)
    page.locator("body").click(position={"x": 5, "y": 400})
    page.keyboard.press("?")
    keys = page.get_by_role("dialog", name="Keyboard")
    expect(keys).to_contain_text("Reuse all but the seed")
    page.keyboard.press("Escape")
    expect(keys).not_to_be_visible()
    page.keyboard.press("h")
    viewer = page.locator("#viewer")
    newest = viewer.locator("#view-image").get_attribute("src")
    viewer.get_by_role("button", name="Open result 1", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert viewer.locator("#view-image").get_attribute("src") != newest
    expect(button(page, "Next picture")).to_be_focused()  # the result is gone
    page.keyboard.press("s")
    expect(viewer).not_to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.press("?")  # typed, because the prompt has the focus
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile(r"\?"))
    expect(keys).not_to_be_visible()


def test_every_control_has_a_name_for_a_screen_reader(page: Page) -> None:
    drop(page, "red.png", plain_picture("red", 40))
    expect(page.get_by_role("dialog")).to_be_visible()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, img, canvas, a, dialog, progress")]
          .filter((element) => !(element.ariaLabel || element.getAttribute("aria-labelledby") || element.labels?.length
            || element.textContent.trim() || element.alt || element.querySelector("img[alt]:not([alt=''])")))
          .map((element) => element.outerHTML)"""
    )
    assert not nameless


def test_a_phone_shows_the_button_without_scrolling(browser: Browser, server: Any) -> None:
    with browser.new_context(viewport={"width": 375, "height": 667}, color_scheme="dark") as context:
        page = context.new_page()
        page.goto(server.url)
        expect(button(page, "Generate")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollHeight") < 1200
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        button(page, "Theme: system").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_a_server_with_keys_asks_for_one_once(browser: Browser, server: Any, serving: Any, tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys.json", "alice")
    app = create_app(server.engine, None, ApiSettings(ModelCard("tiny", 32)))
    with serving(Guards(app, keys=KeyRing(tmp_path / "keys.json"))) as url, browser.new_context() as context:
        page = context.new_page()
        page.goto(url)
        expect(button(page, "Search")).to_have_count(0)  # this server has no index
        generate(page)
        for key in ("another", secret):
            page.get_by_label("API key").fill(key)
            button(page, "Continue").click()
            if key != secret:
                expect(page.get_by_text("The server refused this key.")).to_be_visible()
        expect(finished(page)).to_have_count(1)
        generate(page)
        expect(page.get_by_role("status").first).to_contain_text("1 picture in")
        assert secret not in page.content()
