"""Headless Chromium on Label Studio's own pages: log in, open a task, read what the labelling page has drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from backend.demo.services import Login

# Without the second line Chromium looks for its maker's servers at every start.
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,900",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip
SECONDS = 120

# Label Studio's editor draws on a canvas (Konva) from a store (Htx): the store says which regions the annotation has,
# the canvas which circles were painted, where and how large the image was painted.
REGIONS = """
return window.Htx.annotationStore.selected.regionStore.regions.map(
    r => ({type: r.type, x: r.x, y: r.y, labels: r.labels ? r.labels.slice() : [], hidden: !!r.hidden}))
"""
CIRCLES = """
const stage = window.Konva.stages[0], image = stage.findOne('Image');
const origin = image.getAbsolutePosition(), scale = image.getAbsoluteScale();
return stage.find('Circle').filter(c => c.isVisible() && c.radius() > 0).map(c => {
    const at = c.getAbsolutePosition();
    return {x: 100 * (at.x - origin.x) / (image.width() * scale.x), y: 100 * (at.y - origin.y) / (image.height() * scale.y)};
})
"""
# What a drag, the delete key and the button Submit end up calling.
MOVE = """
const r = window.Htx.annotationStore.selected.regionStore.regions.find(r => r.labels && r.labels.includes(arguments[0]));
r.setPosition(r.parent.internalToCanvasX(r.x + arguments[1]), r.parent.internalToCanvasY(r.y));
r.notifyDrawingFinished();
"""
DELETE = """
const a = window.Htx.annotationStore.selected;
a.deleteRegion(a.regionStore.regions.find(r => r.labels && r.labels.includes(arguments[0])));
"""
PAINTED = """
const stage = window.Konva && window.Konva.stages[0], image = stage && stage.findOne('Image');
return !!image && image.width() > 1 && !!window.Htx.annotationStore.selected
    && stage.find('Circle').length >= arguments[0];
"""


@dataclass(frozen=True)
class Drawn:
    """x, y: per cent of the image."""

    x: float
    y: float
    label: str = ""


class LabellingPage:
    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def log_in(self, login: Login) -> None:
        self.driver.get(f"{self.url}/user/login/")
        self.driver.find_element(By.NAME, "email").send_keys(login.email)
        password = self.driver.find_element(By.NAME, "password")
        password.send_keys(login.password)
        password.submit()
        WebDriverWait(self.driver, SECONDS).until(lambda d: "login" not in d.current_url)

    def open(self, project: int, task: int, points: int) -> None:
        """Opens a task and waits until the image and at least `points` points are painted."""
        self.driver.get(f"{self.url}/projects/{project}/data?task={task}")
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.5).until(
            lambda d: d.execute_script(PAINTED, points), f"no image with {points} points was painted"
        )

    def regions(self) -> list[Drawn]:
        """Keypoint regions of the annotation that the page shows."""
        found = self.driver.execute_script(REGIONS)
        return [Drawn(r["x"], r["y"], r["labels"][0]) for r in found if r["type"] == "keypointregion" and not r["hidden"]]

    def circles(self) -> list[Drawn]:
        """Circles on the canvas: where the points really were painted."""
        return [Drawn(c["x"], c["y"]) for c in self.driver.execute_script(CIRCLES)]

    def move(self, label: str, percent: float) -> None:
        """Move a point to the right, by per cent of the image's width."""
        self.driver.execute_script(MOVE, label, percent)

    def delete(self, label: str) -> None:
        self.driver.execute_script(DELETE, label)

    def submit(self) -> None:
        self.driver.execute_script("window.Htx.submitAnnotation()")

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def labelling_page(chromium: tuple[str, str], url: str, profile: Path) -> Iterator[LabellingPage]:
    """A browser with an empty profile; closed in the end."""
    options = Options()
    options.binary_location = chromium[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(chromium[1]))
    driver.set_page_load_timeout(SECONDS)
    try:
        yield LabellingPage(driver, url)
    finally:
        driver.quit()
