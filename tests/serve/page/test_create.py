"""Pictures from prompts on the page, in a real browser, against real networks over real sockets."""

import re
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.guards import Guards
from pipeline.serve.keys import KeyRing, add_key
from tests.serve.page.visit import (
    PROMPT,
    both_widths,
    button,
    drop,
    finished,
    generate,
    history,
    needs_browser,
    refuse,
    side_px,
)
from tests.tiny.shards import plain_picture

pytestmark = needs_browser


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


@both_widths
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


@both_widths
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
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        refuse(page, "/v1/images/generations", [("1", 503), ("1", 429)])
        generate(page)
        expect(page.get_by_role("status").first).to_have_text("Too many requests are waiting; trying again in 1 s.")
        expect(page.get_by_role("status").first).to_have_text("The server is not ready; trying again in 1 s.")
        expect(finished(page)).to_have_count(1)


def test_a_used_limit_is_waited_for_and_keys_that_cannot_be_read_are_not(browser: Browser, server: Any) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        status = page.get_by_role("status").first
        refuse(page, "/v1/images/generations", [("2", 429)], "rate_limit_exceeded")
        generate(page, steps=2)
        expect(status).to_have_text("The limit of this key is used up; trying again in 2 s.")
        expect(finished(page)).to_have_count(1)
        refuse(page, "/v1/images/generations", [("1", 503)], "no_keys")
        generate(page, steps=2)
        expect(status).to_have_text("not now")
        expect(finished(page)).to_have_count(0)


def test_a_seed_may_begin_with_zeros_and_be_as_long_as_the_api_takes(page: Page) -> None:
    for typed, seed in (("007", "7"), ("9223372036854775797", "9223372036854775797")):
        page.get_by_label("Seed", exact=True).fill(typed)
        generate(page, steps=2)
        expect(button(page, f"Open picture 1, seed {seed}")).to_be_visible()


def test_a_browser_that_refuses_site_data_makes_pictures(browser: Browser, server: Any) -> None:
    with browser.new_context() as context:
        for area in ("localStorage", "sessionStorage", "indexedDB"):
            context.add_init_script(
                f"""Object.defineProperty(window, "{area}", {{ get() {{ throw new DOMException("no", "SecurityError"); }} }})"""
            )
        page = context.new_page()
        page.goto(server.url)
        button(page, "Theme: system").click()
        expect(button(page, "Theme: light")).to_be_visible()
        generate(page, steps=2)
        expect(finished(page)).to_have_count(1)
        expect(page.get_by_text("This browser stores nothing")).to_be_visible()


def test_a_browser_without_room_says_which_pictures_it_does_not_keep(page: Page) -> None:
    generate(page, steps=2)
    expect(history(page, PROMPT)).to_have_count(1)
    page.evaluate(  # what Chromium does without room: the transaction is aborted after the request's success
        """() => {
          const add = IDBObjectStore.prototype.add;
          IDBObjectStore.prototype.add = function (value) {
            const request = add.call(this, value);
            request.addEventListener("success", () => this.transaction.abort());
            return request;
          };
        }"""
    )
    generate(page, steps=2)
    expect(history(page, PROMPT)).to_have_count(2)
    expect(page.get_by_text("This browser keeps no more pictures")).to_be_visible()
    page.reload()
    expect(history(page, PROMPT)).to_have_count(1)


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


def test_a_prompt_that_is_cut_off_is_noted(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(" ".join(["red"] * 31))
    page.get_by_label("Pictures", exact=True).fill("1")
    button(page, "Generate").click()
    expect(page.get_by_role("status").first).to_contain_text("Note: prompt: CLIP reads 32 tokens")


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
            page.get_by_label("API key").fill(f" {key}\u200b")  # as it may come from a chat
            button(page, "Continue").click()
            if key != secret:
                expect(page.get_by_text("The server refused this key.")).to_be_visible()
        expect(finished(page)).to_have_count(1)
        generate(page)
        expect(page.get_by_role("status").first).to_contain_text("1 picture in")
        assert secret not in page.content()
