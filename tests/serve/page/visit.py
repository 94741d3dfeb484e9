"""How tests visit the page: what they press, and what they look for."""

import io
import re
import shutil

import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Locator, Page, Route, expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PHONE, DESKTOP = (375, 667), (1280, 800)
PROMPT = "a large red circle"
PATIENCE_MS = 60_000  # of a busy machine

expect.set_options(timeout=PATIENCE_MS)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH: the page is not tried")
both_widths = pytest.mark.parametrize("page", [PHONE, DESKTOP], indirect=True, ids=["phone", "desktop"])


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def show_settings(page: Page) -> None:
    """Open them where they are closed, as they are on a phone."""
    if not page.get_by_label("Steps", exact=True).is_visible():
        page.get_by_text("More settings").click()


def generate(page: Page, *, count: int = 1, steps: int | None = None) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Pictures", exact=True).fill(str(count))
    if steps is not None:
        show_settings(page)
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


def paste(place: Locator, data: bytes, *, text: str = "") -> None:
    """Paste a picture, and with ``text`` that text beside it, as the clipboards of office programs hold both."""
    place.evaluate(
        """(element, [bytes, text]) => {
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([new Uint8Array(bytes)], "image.png", { type: "image/png" }));
          for (const type of text ? ["text/plain", "text/html"] : []) clipboardData.setData(type, text);
          element.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }""",
        [list(data), text],
    )


def history(page: Page, name: str) -> Locator:
    """Pictures of the history by name, also behind an open dialog."""
    return page.locator("#thumbs").get_by_role("button", name=name, include_hidden=True)


def refuse(page: Page, path: str, answers: list[tuple[str, int]], code: str = "") -> None:
    """Answer a path with each (``Retry-After``, status), the last one first, and then let the server answer."""

    def answer(route: Route) -> None:
        if not answers:
            return route.fallback()
        seconds, status = answers.pop()
        error = {"message": "not now", "code": code}
        return route.fulfill(status=status, headers={"Retry-After": seconds}, json={"error": error})

    page.route("**" + path, answer)


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
