"""A person in front of the backend's own page, in headless Chromium.

The page changes by itself: nothing here keeps an element from one moment to the next. What is read is read by the browser in
one go, and what is pressed is pressed where the keyboard is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from end_to_end.browser import FLAGS

# Every picture of the page is there, and what is known is painted. A picture that cannot be decoded is an error.
SETTLED = """
const done = arguments[arguments.length - 1];
const pictures = [...document.querySelectorAll("image, img")].map((e) => {
  const copy = new Image();
  copy.src = e.getAttribute("href") || e.getAttribute("src");
  return copy.decode();
});
Promise.all([document.fonts.ready, ...pictures]).then(
    () => requestAnimationFrame(() => requestAnimationFrame(() => done(""))), (error) => done(String(error)));
"""
# Every value that the bar takes, as long as it is the same element. Called before there is one.
FOLLOW = """
window.values = [];
const follow = setInterval(() => {
  const bar = document.getElementById("progress");
  if (!bar) return;
  clearInterval(follow);
  const note = () => { if (bar.hasAttribute("value") && window.values.at(-1) !== bar.value) window.values.push(bar.value); };
  note();
  new MutationObserver(note).observe(bar, { attributes: true });
}, 50);
"""
# The middle of an element, brought into sight.
MIDDLE = """
const found = document.querySelector(arguments[0]);
if (!found) return null;
found.scrollIntoView({ block: "center" });
const box = found.getBoundingClientRect();
return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)];
"""
# Label and pictures of each comparison: [[[address of the image, points drawn], …], …]
COMPARED = """
return [...document.querySelectorAll(".versus")].map((v) => [...v.querySelectorAll(".picture")].map(
    (p) => [p.querySelector("image").getAttribute("href"), p.querySelectorAll(".dot").length]));
"""


@dataclass(frozen=True)
class Reader:
    """`seconds`: how long it waits for anything; `folder`: where its pictures go."""

    driver: webdriver.Chrome
    url: str
    folder: Path
    seconds: float = 120.0

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def there(self, selector: str) -> int:
        """How many elements are there now."""
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def wait_for(self, selector: str) -> None:
        self.until(lambda: self.there(selector), selector)

    def press(self, selector: str) -> None:
        """With the keyboard: what cannot be reached so is not operable."""
        reached = """
            const found = document.querySelector(arguments[0]);
            found?.focus();
            return Boolean(found) && document.activeElement === found"""
        self.until(lambda: self.run(reached, selector), f"the keyboard on {selector}")
        ActionChains(self.driver).send_keys(Keys.ENTER).perform()

    def hold(self, selector: str) -> None:
        """The mouse goes down on an element; `release` lets it up, wherever the element is by then."""
        self.wait_for(selector)
        x, y = self.run(MIDDLE, selector)
        actions = ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(x, y)
        actions.click_and_hold().perform()

    def release(self) -> None:
        ActionChains(self.driver).release().perform()

    def text(self, selector: str = "main") -> str:
        found = self.run("return document.querySelector(arguments[0])?.textContent", selector)
        return " ".join(str(found or "").split())

    def reads(self, words: str, selector: str = "main") -> None:
        self.until(lambda: words in self.text(selector), words)

    def until(self, done: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + self.seconds
        while not (found := done()):
            assert time.monotonic() < end, f"it never came: {what}; the page says: {self.text()[:2000]}"
            time.sleep(0.1)
        return found

    def follow_the_bar(self) -> None:
        """From now on; see `bar`."""
        self.run(FOLLOW)

    def bar(self) -> list[float]:
        """The values that the bar took, one after the other, while it remained one and the same element."""
        return [float(value) for value in self.run("return window.values")]

    def compared(self) -> list[list[tuple[str, int]]]:
        """For each image that is compared: the address of each picture and the number of points that a version drew on it."""
        return [[(str(address), int(points)) for address, points in pictures] for pictures in self.run(COMPARED)]

    def look(self, name: str, scheme: str = "light", width: int = 1280) -> None:
        """Keep a picture of the whole page; nothing may stick out at its side, and no picture in it may be empty."""
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        for height in (900, None):
            size = height or min(self.run("return document.documentElement.scrollHeight"), 4000)
            self.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride", {"width": width, "height": size, "deviceScaleFactor": 1, "mobile": False}
            )
        broken = self.driver.execute_async_script(SETTLED)
        assert not broken, f"{name}: {broken}"
        wide = "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
        found, room = self.run(wide)
        assert found <= room, f"{name} at {width}: {found} pixels wide, {room} are there"
        self.driver.save_screenshot(str(self.folder / f"{name}-{scheme}{'' if width == 1280 else '-narrow'}.png"))

    def looks(self, name: str) -> None:
        """Light, dark, and on a telephone."""
        self.look(name, "light")
        self.look(name, "dark")
        self.look(name, "light", width=390)

    def complaints(self) -> list[str]:
        """What the browser refused, or a script stumbled over."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def reader(chromium: tuple[str, str], url: str, folder: Path, profile: Path) -> Iterator[Reader]:
    """A browser with an empty profile; closed in the end."""
    options = Options()
    options.binary_location = chromium[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromium[1]))
    driver.set_script_timeout(Reader.seconds)
    try:
        yield Reader(driver, url, folder)
    finally:
        driver.quit()
