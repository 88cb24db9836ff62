"""A person's mouse and keys on Label Studio's smart tools, and what the labelling page holds then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from selenium.common.exceptions import TimeoutException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from conftest import ARTIFACTS
from end_to_end.browser import SECONDS, LabellingPage

# Where a place of the image, in per cent, lies on the screen.
PLACE = """
const stage = window.Konva.stages[0], image = stage.findOne('Image'), box = stage.container().getBoundingClientRect();
const origin = image.getAbsolutePosition(), scale = image.getAbsoluteScale();
return [box.left + origin.x + arguments[0] / 100 * image.width() * scale.x,
        box.top + origin.y + arguments[1] / 100 * image.height() * scale.y];
"""
TOOL = "const t = Object.values(window.ToolManager.allInstances()[0].tools).find(t => t.selected); return t ? t.fullName : ''"
ACTIVE = "return window.Htx.annotationStore.selected.objects[0].activeStates().flatMap(s => s.selectedValues())"
ON_PAGE = """
const one = r => ({id: r.cleanId, type: r.type, x: r.x, y: r.y, labels: r.results.flatMap(q => q.mainValue || []),
                   parent: (r.parentID || '').replace(/#.*/, ''), origin: r.origin, asked: r.dynamic});
const a = window.Htx.annotationStore.selected;
return {regions: a.regionStore.regions.map(one), suggestions: Array.from(a.suggestions.values()).map(one)};
"""
WAITING = "return window.Htx.awaitingSuggestions"


@dataclass(frozen=True)
class OnPage:
    """A region as the page holds it. labels: of all its controls. asked: a smart tool's, that was not accepted yet."""

    id: str
    type: str
    x: float
    y: float
    labels: tuple[str, ...]
    parent: str
    origin: str
    asked: bool

    @property
    def place(self) -> tuple[float, float]:
        return self.x, self.y


class SmartTools:
    def __init__(self, page: LabellingPage) -> None:
        self.page, self.driver = page, page.driver

    def switch(self, name: str, on: bool) -> None:
        """One of the switches below the image: auto-annotation, auto-accept."""
        toggle = self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, f"[data-testid='bottombar-{name}-toggle']"), f"no {name}")[0]
        if self.driver.execute_script("return arguments[0].checked || arguments[0].getAttribute('aria-checked') === 'true'", toggle) != on:
            self.driver.execute_script("arguments[0].click()", toggle)

    def choose(self, tool: str, label: str, hotkey: str) -> None:
        """First the tool, then the label: the page forgets a label of another kind of tool."""

        def chosen() -> bool:
            if self.driver.execute_script(TOOL) != f"{tool}-dynamic":
                self.driver.find_element(By.CSS_SELECTOR, "[class*='tool_smart']").click()  # each click takes the next smart tool
            return bool(self.driver.execute_script(TOOL) == f"{tool}-dynamic")

        def active() -> bool:
            if self.driver.execute_script(ACTIVE) != [label]:
                *held, key = hotkey.split("+")
                keys = ActionChains(self.driver)
                for _ in held:
                    keys.key_down(Keys.SHIFT)
                keys.send_keys(key)
                for _ in held:
                    keys.key_up(Keys.SHIFT)
                keys.perform()
            return bool(self.driver.execute_script(ACTIVE) == [label])

        self.wait(chosen, f"the smart {tool} cannot be chosen")
        self.wait(active, f"the label {label} cannot be chosen")

    def click(self, x: float, y: float) -> None:
        """At per cent of the image; waits for the answer. With Ctrl: without it a click in a box selects the box."""
        mouse = ActionBuilder(self.driver, duration=80)
        mouse.pointer_action.move_to_location(*self._on_screen(x, y)).click()
        ActionChains(self.driver).key_down(Keys.CONTROL).perform()
        self._ask(mouse, lambda: ActionChains(self.driver).key_up(Keys.CONTROL).perform())

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """From one place to another, in per cent of the image; waits for the answer."""
        mouse = ActionBuilder(self.driver, duration=150)
        move = mouse.pointer_action.move_to_location(*self._on_screen(x0, y0)).pointer_down()
        move.move_to_location(*self._on_screen((x0 + x1) / 2, (y0 + y1) / 2)).move_to_location(*self._on_screen(x1, y1)).pointer_up()
        self._ask(mouse)

    def accept(self) -> None:
        self.driver.find_element(By.CSS_SELECTOR, "[data-testid='bottombar-accept-suggestions-button']").click()

    def regions(self) -> list[OnPage]:
        return self._told("regions")

    def suggestions(self) -> list[OnPage]:
        return self._told("suggestions")

    def wait(self, done: Callable[[], Any], otherwise: str) -> Any:
        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.3).until(lambda _: done(), otherwise)

    def _ask(self, mouse: ActionBuilder, afterwards: Callable[[], None] = lambda: None) -> None:
        """What is drawn stands on the page until the answer takes it away, or lays suggestions beside it."""
        before = self.regions(), self.suggestions()
        mouse.perform()
        afterwards()

        def answered() -> bool:
            regions, suggestions = self.regions(), self.suggestions()
            settled = not any(r.asked for r in regions) or suggestions != before[1]
            return (regions, suggestions) != before and settled and not self.driver.execute_script(WAITING)

        try:
            self.wait(answered, "no answer came")
        except TimeoutException:
            self.page.screenshot(ARTIFACTS / "smart-no-answer.png")
            print("before", *before[0], "now", *self.regions(), "suggested", *self.suggestions(), sep="\n")
            raise

    def _told(self, what: str) -> list[OnPage]:
        return [OnPage(**r | {"labels": tuple(r["labels"])}) for r in self.driver.execute_script(ON_PAGE)[what]]

    def _on_screen(self, x: float, y: float) -> tuple[int, int]:
        left, top = self.driver.execute_script(PLACE, x, y)
        return round(left), round(top)
