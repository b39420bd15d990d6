"""A page in headless Chromium, as a visitor sees it and types into it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1500,1150"
)
# in one go each, since the page may put other elements in the place of those that were found
_TEXTS = "return [...document.querySelectorAll(arguments[0])].map(e => (e.value ?? e.innerText).trim())"
_CLICK = "const e = document.querySelector(arguments[0]); e && e.click(); return Boolean(e)"
_TYPE = """
const e = document.querySelector(arguments[0])
Object.getOwnPropertyDescriptor(Object.getPrototypeOf(e), "value").set.call(e, arguments[1])
e.dispatchEvent(new Event("input", {bubbles: true}))
"""


class Visitor:
    """One who looks at a page, whose parts have selectors of CSS."""

    def __init__(self, driver: Any, url: str):
        self.driver, self.url = driver, url
        self.come()

    def come(self) -> None:
        """Open the page, or reload it, and wait until it is the visitor's own."""
        self.driver.get(self.url)
        self.until(lambda: self.texts(".node input[type=checkbox]"))

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements."""
        return self.driver.execute_script(_TEXTS, selector)

    def text(self, selector: str) -> str:
        """Return the texts of all elements as one."""
        return "\n".join(self.texts(selector))

    def type(self, selector: str, text: str) -> None:
        """Write into a text box, in place of what is there; at once, since drivers type no emoji."""
        self.driver.execute_script(_TYPE, selector, text)

    def click(self, selector: str) -> None:
        """Click on the first element, once it is there."""
        self.until(lambda: self.driver.execute_script(_CLICK, selector))

    def said(self, part: str) -> list[str]:
        """Return what was said in one of the two chats."""
        return self.texts(f"#{part} .message-content")

    def ask(self, question: str) -> tuple[str, str]:
        """Ask, and return both answers once they are complete."""
        count = len(self.said("base")) // 2 + 1
        self.type("#question textarea", question)
        self.click("#ask")
        self.until_answered(count)
        return self.said("base")[-1], self.said("edited")[-1]

    def until_answered(self, count: int) -> None:
        """Wait until so many questions have been answered in full."""
        self.until(lambda: f"Question {count}: answered" in self.text("#notice"))
        self.until(lambda: len(self.said("base")) == len(self.said("edited")) == 2 * count)

    def until(self, look: Callable[[], Any], seconds: float = 120) -> Any:
        """Wait for something to be there, and return it.

        Raises:
            AssertionError: it does not come.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := look():
                return found
            time.sleep(0.1)
        raise AssertionError(f"it does not come; the page says: {self.text('body')}")


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Start Chromium with a new profile, in an empty folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*_FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()
