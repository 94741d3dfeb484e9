"""A browser, and a visit of the page by a new visitor."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.serve.page.visit import CHROMIUM, DESKTOP, FLAGS, PATIENCE_MS

SCREENSHOTS = os.environ.get("UNCLIP_SCREENSHOTS", "")
"""Folder that keeps how the page looks at the end of each test, at its width; empty: none is kept."""


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
        if SCREENSHOTS:
            name = f"{request.node.originalname}-{width}.png"
            if not page.locator("dialog[open]").count():  # a dialog fills the window as it is
                page_px = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({"width": width, "height": max(height, page_px)})
            page.screenshot(path=Path(SCREENSHOTS) / name)
        assert not errors
