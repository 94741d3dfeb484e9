"""Files that come to the page, and its search: settings of a PNG, neighbours, near copies."""

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.serve.page.visit import (
    DESKTOP,
    PHONE,
    PROMPT,
    both_widths,
    button,
    drop,
    finished,
    generate,
    history,
    needs_browser,
    paste,
    png,
    refuse,
    show_settings,
)
from tests.tiny.shards import plain_picture

pytestmark = needs_browser


@both_widths
def test_a_dropped_png_of_the_server_brings_its_settings_back(page: Page, server: Any) -> None:
    show_settings(page)
    page.get_by_label("Negative prompt").fill("a blue star")
    page.get_by_label("Guidance", exact=True).fill("4")
    page.get_by_label("Candidates", exact=True).fill("3")
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
    names = ("Prompt", "Negative prompt", "Guidance", "Steps", "Candidates")
    values = [page.get_by_label(name, exact=True).input_value() for name in names]
    assert values == [PROMPT, "a blue star", "4", "3", "3"]
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


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64)])
def test_a_seed_that_the_server_does_not_take_is_said_and_no_other_one_is_locked(page: Page, seed: str) -> None:
    field, lock = page.get_by_label("Seed", exact=True), page.locator("#lock")
    before = field.input_value()
    lock.click()
    drop(page, "cat.png", png({"parameters": f"a cat\nSteps: 2, Seed: {seed}, Size: 32x32"}))
    expect(page.get_by_role("status").first).to_contain_text("without its seed, which this server does not take")
    expect(field).to_have_value(before)
    expect(lock).to_have_attribute("aria-pressed", "false")
    history(page, "a cat").click()
    button(page, "Reuse all").click()
    expect(page.get_by_role("status").first).to_contain_text("with another seed")


def test_text_that_is_pasted_with_a_picture_of_it_is_text(page: Page) -> None:
    prompt = page.get_by_label("Prompt", exact=True)
    paste(prompt, png({"parameters": "a table\nSteps: 2"}), text="a cat")
    paste(prompt, png({"parameters": "a picture\nSteps: 2"}))
    expect(history(page, "a picture")).to_have_count(1)
    expect(history(page, "a table")).to_have_count(0)


def test_what_is_no_picture_is_refused_in_words_where_they_are_seen(page: Page) -> None:
    reason = page.get_by_text("notes.png is no picture that this browser can read.")
    drop(page, "notes.png", b"no picture at all")
    expect(page.get_by_label("Picture to sample").filter(has=reason)).to_be_visible()
    drop(page, "red.png", plain_picture("red", 40))
    expect(page.get_by_role("dialog")).to_be_visible()
    drop(page, "notes.png", b"no picture at all")
    expect(page.get_by_role("dialog").filter(has=reason)).to_be_visible()
    page.keyboard.press("Escape")
    button(page, "Search").first.click()
    drop(page, "notes.png", b"no picture at all")
    expect(page.locator("#search").filter(has=reason)).to_be_visible()


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
    page.get_by_role("searchbox").fill("a red picture")
    page.keyboard.press("Control+Enter")
    expect(first).to_contain_text("a red picture")
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


@pytest.mark.parametrize(("width", "height"), [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_an_open_picture_says_in_its_window_what_it_waits_for(
    browser: Browser, server: Any, width: int, height: int
) -> None:
    with browser.new_context(viewport={"width": width, "height": height}) as context:
        page = context.new_page()
        page.goto(server.url)
        refuse(page, "/knn-service", [("1", 503)])
        refuse(page, "/v1/images/text-diffs", [("1", 429)])
        drop(page, "red.png", plain_picture("red", 40))
        viewer = page.get_by_role("dialog")
        status = viewer.get_by_role("tabpanel").get_by_role("status")
        expect(status).to_have_text("The server is not ready; trying again in 1 s.")
        expect(status).to_have_text("The nearest pictures of the data.")
        viewer.get_by_role("tab", name="Change by text", exact=True).click()
        for label, text in (("From", "red"), ("To", "blue"), ("Frames", "2")):
            viewer.get_by_label(label, exact=True).fill(text)
        viewer.get_by_role("button", name="Change by text", exact=True).click()
        waiting = viewer.get_by_text("Too many requests are waiting; trying again in 1 s.")
        expect(waiting).to_be_in_viewport()  # under the picture, which a phone shows meanwhile
        expect(viewer.locator("#view-frames output")).to_have_text("40 %")
        expect(waiting).to_have_count(0)


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
