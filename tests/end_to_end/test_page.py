"""A person at the page, in a real browser: start a round, watch its bar, compare two versions, roll back, dismiss a finding.

Everything but the model and its trainer is real; see page_world.py. The pictures in .data/test-artifacts are to be looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no step shall wait for within its time
from page_world import Beetles, beetles, served

pytestmark = [pytest.mark.slow, pytest.mark.browser]
SECONDS = 90
PAGES = {"projects": "/", "overview": "/projects/1/"} | {
    name: f"/projects/1/view/{name}" for name in ("versions", "compare", "next", "labels")
}


@dataclass
class Reader:
    """A person in front of a browser."""

    driver: Any
    url: str
    folder: Path

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def find(self, selector: str) -> Any:
        return self.until(lambda: self.driver.find_elements("css selector", selector), selector)[0]

    def press(self, selector: str) -> None:
        """With the keyboard: what cannot be reached so is not operable."""
        button = self.find(selector)
        self.driver.execute_script("arguments[0].focus()", button)
        assert self.driver.switch_to.active_element == button
        button.send_keys("\n")

    def text(self, selector: str = "main") -> str:
        found = self.driver.find_elements("css selector", selector)
        return str(self.driver.execute_script("return arguments[0].textContent", found[0])) if found else ""

    def reads(self, words: str, selector: str = "main") -> None:
        self.until(lambda: words in " ".join(self.text(selector).split()), words)

    def until(self, done: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + SECONDS
        while not (found := done()):
            assert time.monotonic() < end, f"it never came: {what}; the page says: {' '.join(self.text().split())[:2000]}"
            time.sleep(0.1)
        return found

    def look(self, name: str, scheme: str, width: int = 1280) -> None:
        """Keep a picture of the whole page; nothing may stick out at its side."""
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        for height in (900, None):
            size = height or min(self.driver.execute_script("return document.documentElement.scrollHeight"), 3000)
            self.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride", {"width": width, "height": size, "deviceScaleFactor": 1, "mobile": False}
            )
        time.sleep(0.5)
        assert self.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), f"{name}: too wide"
        self.driver.save_screenshot(str(self.folder / f"page-{name}-{scheme}{'' if width == 1280 else '-narrow'}.png"))

    def complaints(self) -> list[str]:
        """What the browser refused, or a script stumbled over."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Beetles]:
    with beetles(tmp_path / "world") as found:
        found.label(*range(1, 15))
        found.label(15, wrong=True)
        found.label(3, 5, by=2, off=1.5)
        found.round(0.31, 0.62)
        found.correct(*range(30, 34))
        found.open(70, 71)
        found.open(72, look=70)
        found.settle()
        yield found


@pytest.fixture
def reader(made: Beetles, chromium: tuple[str, str], tmp_path: Path, artifacts: Path) -> Iterator[Reader]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    from end_to_end.browser import FLAGS

    options = Options()
    options.binary_location = chromium[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with served(made) as url:
        driver = webdriver.Chrome(options=options, service=Service(chromium[1]))
        try:
            yield Reader(driver, url, artifacts)
        finally:
            driver.quit()


def test_a_person_starts_a_round_watches_it_compares_and_rolls_back(made: Beetles, reader: Reader) -> None:
    here = made.here
    for name, path in PAGES.items():
        reader.open(path)
        reader.find("h1")
        for scheme in ("light", "dark"):
            reader.look(name, scheme)
        reader.look(name, "light", width=390)
    assert reader.complaints() == []

    # A round: its bar appears without reloading, moves, and goes; then the version serves, and the curve is longer.
    before = here.status()["model_version"]
    made.task(99)
    here.train_seconds, here.figures = 15.0, ({"pck": {"0.05": 0.6, "0.1": 0.8}, "nme": 0.06, "points": 20}, {
        "pck": {"0.05": 0.8, "0.1": 0.9}, "nme": 0.04, "points": 20})  # fmt: skip
    reader.open("/projects/1/")
    reader.driver.execute_script("window.stayed = true")
    reader.press("#start")
    reader.reads("Round 2 starts with 19 labelled images.", "#said")
    reader.until(lambda: reader.driver.execute_script("return document.getElementById('progress')?.value") == 1, "the bar")
    assert reader.text("#progress-text").split()[:6] == ["Round", "2", "1", "of", "2", "·"]
    reader.look("running", "light")
    reader.look("running", "dark")
    reader.reads("Round 2, done.", "#now")
    reader.reads(here.status()["model_version"], "#head")
    reader.reads("Round 2, done.", "#said")  # whoever hears the page is told, too
    reader.until(lambda: len(reader.driver.find_elements("css selector", "#accuracy-d ~ circle.mark.judge")) == 3, "the curve")
    assert reader.driver.execute_script("return window.stayed"), "the page was loaded anew"
    after = here.status()["model_version"]
    assert after != before

    # Two versions side by side: what is missing is made when it is asked for, and appears by itself.
    reader.open("/projects/1/view/versions")
    reader.driver.find_element("link text", "Compare with the one before").click()
    reader.find("#compared")
    if reader.driver.find_elements("css selector", "#want"):
        reader.press("#want")
    reader.until(lambda: len(reader.driver.find_elements("css selector", ".versus .picture .dot")) >= 40, "both versions' points")
    picture = "return getComputedStyle(document.querySelector('.versus .picture image')).width"
    assert float(reader.driver.execute_script(picture).removesuffix("px")) > 50
    reader.look("compared", "light")
    reader.look("compared", "dark")

    # Pin, unpin, roll back.
    reader.open("/projects/1/view/versions")
    reader.press("#pin")
    reader.reads("serves until it is unpinned.", "#said")
    reader.press("#unpin")
    reader.reads("serves until a better one comes.", "#said")
    reader.press("#rollback")
    reader.reads(f"{before} serves again; {after} is kept, and can be activated.", "#said")
    assert here.status()["model_version"] == before
    reader.reads(before, ".version.active")

    # A finding is dismissed, and a round cancelled.
    reader.open("/projects/1/view/labels")
    reader.reads("Left and right exchanged")
    reader.press("[id^=dismiss-]")
    reader.reads("Nothing looks wrong.")
    here.train_seconds = 60.0
    reader.open("/projects/1/")
    reader.press("#start")
    reader.press("#cancel")
    reader.reads("Round 3, cancelled.", "#now")

    # Predictions in advance.
    reader.press("#prelabel-start")
    reader.reads("Predicting all unlabelled images.", "#now")
    reader.press("#prelabel-cancel")
    reader.reads("Cancelled:", "#now")
    assert reader.complaints() == []
