"""The page for people: what it tells in every state, that it needs nothing from elsewhere, that it can be read and operated by all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import certifi
import pytest

import kptllm_core.predictor  # noqa: F401 - it loads torch, which no test shall wait for within its time
from backend import charts, overlays
from backend.page import FILES, FOLDER
from backend_world import CONFIG, World, world
from page_world import NAMES, Beetles, beetles
from small_server import Answer

VIEWS = ("", "view/versions", "view/compare", "view/next", "view/labels", "view/now")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        made.webhook("PROJECT_UPDATED", config=CONFIG)
        yield made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beetles]:
    """A project with a promoted round, corrections after it, an exchanged label and two people."""
    with beetles(tmp_path_factory.mktemp("beetles")) as found:
        found.label(*range(1, 15))
        found.label(15, wrong=True)
        found.label(3, 5, by=2, off=1.5)
        found.round(0.31, 0.62)
        found.correct(30, 31, 32)
        found.open(70, 71)
        found.open(72, look=70)
        found.settle()
        yield found


def html(here: World, path: str = "/projects/1/") -> str:
    answer = here.client.get(path, headers={"Accept": "text/html"})
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert answer.mimetype == "text/html"
    return str(answer.get_data(as_text=True))


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


# ---------------------------------------------------------------- what it tells


def test_the_first_page_lists_projects_and_how_to_connect_one(here: World) -> None:
    here.label(*range(1, 13))
    here.play_round()
    here.services.journal.observe("1", CONFIG, here.services.base(), "<script>alert(1)</script>")
    page = html(here, "/")
    assert "python -m backend connect --url" in page and "--backend-url http://localhost" in page
    assert here.status()["model_version"] in page and "Promoted: better" in page
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;script&gt;" in html(here) and "<script>" not in html(here)


def test_without_projects_it_says_what_to_do(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        assert "The command below attaches the first one" in html(here, "/")


def test_the_command_to_connect_names_all_that_it_needs_but_no_secret(tmp_path: Path) -> None:
    secret = {"basic_auth_pass": "tr0ub4dor", "webhook_secret": "c0rrect-h0rse"}
    with world(tmp_path, basic_auth_user="me", label_studio_ca=Path(certifi.where()), **secret) as here:
        page = here.client.get("/", auth=("me", "tr0ub4dor")).get_data(as_text=True)
        assert f"--ca {certifi.where()} --basic-user me --basic-pass YOUR_PASSWORD --webhook-secret YOUR_SECRET" in page
        assert not any(value in page for value in secret.values())


def test_whoever_asks_for_json_gets_it(here: World) -> None:
    wanted = {"Accept": "application/json"}
    assert here.client.get("/", headers=wanted).get_json()["projects"][0]["project"] == "1"
    assert here.client.get("/projects/1/", headers=wanted).get_json() == here.status()
    assert here.client.get("/projects/9/", headers=wanted).get_json()["error"]["code"] == "not_found"
    missing = here.client.get("/projects/9/", headers={"Accept": "text/html"})
    assert missing.status_code == 404 and "Project 9 is not known here" in missing.get_data(as_text=True)
    assert here.client.get("/projects/9/").mimetype == "text/html"  # whoever does not care
    assert here.client.get("/page/app.py").status_code == 404


def test_with_few_images_it_says_few_shot_only_and_how_many_are_missing(here: World) -> None:
    here.label(1, 2, 3)
    said = words(html(here))
    assert "Few-shot only. 3 of 10 images are labelled: 7 more until a round can start." in said
    assert re.search(r'id="start" disabled', html(here))
    answer = here.client.post("/projects/1/start", json={})
    assert answer.status_code == 200 and "3 of 10 labelled images: too few" in answer.get_json()["message"]
    for view in VIEWS:
        html(here, f"/projects/1/{view}")


def test_a_project_without_a_label_config_has_all_pages(here: World) -> None:
    here.webhook("ANNOTATION_CREATED", config=None, project=2, annotation=here.annotation(1), task=here.task(1))
    for view in VIEWS:
        html(here, f"/projects/2/{view}")


def test_a_round_is_started_watched_and_cancelled(here: World) -> None:
    here.label(*range(1, 13))
    here.train_seconds = 30.0
    assert here.client.post("/projects/1/start", json={}).status_code == 202
    here.tick_until(lambda: bool(here.status()["job"]["progress"].get("steps")))
    page = html(here, "/projects/1/view/now")
    assert re.search(r'<progress id="progress" aria-labelledby="progress-text" max="2" value="1">', page)
    assert 'data-every="2"' in page and "loss 0.500" in page
    assert here.status()["job"]["asked_by"] == "Start training on the page"
    cancel = re.search(r'action="([^"]*/jobs/[^"]*/cancel)"', page)
    assert cancel and here.client.post(cancel[1], json={}).status_code == 200
    assert "Round 1, cancelled." in words(html(here, "/projects/1/view/now"))


def test_the_curves_stand_against_the_people(made: Beetles) -> None:
    page = html(made.here)
    said = words(page)
    assert "two people agree" in said and "images labelled by several" in said
    assert "held-out images" in said and "the next images" in said and "all by hand" in said
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td>', page)
    assert ("examples only", "31.0\xa0%") in rows and ("1", "62.0\xa0%") in rows
    assert page.count("<circle") > 20, "the examples' points are drawn"
    assert "On trial" in said
    table = page[page.index('id="people"') :].partition("</table>")[0]
    rows = re.findall(r'<tr><th scope="row">(\w+)</th><td>(.*?)</td><td>.*?</td><td>(.*?)</td><td>(\d+)</td><td>(\d+)</td>', table)
    assert {(name, near, pairs, alone) for name, _, near, pairs, alone in rows} == {(n, "100\xa0%", "2", "0") for n in NAMES}
    apart = [float(mean.removesuffix("\xa0%")) for _, mean, *_ in rows]
    assert apart == sorted(apart, reverse=True) and apart[-1] > 0


def test_versions_can_be_served_pinned_and_rolled_back(made: Beetles) -> None:
    page = html(made.here, "/projects/1/view/versions")
    status = made.here.status()
    assert f'aria-label="Roll back to {status["previous"]}"' in page
    assert f'data-body="{{&#34;from&#34;: &#34;{status["model_version"]}&#34;}}"' in page
    assert re.search(r"Right on the next images \d+ % mean over \d+ images", words(page))
    actions = re.findall(r'<form method="post" action="([^"]*)"', page)
    assert {a.rpartition("/")[2] for a in actions} == {"rollback", "pin", "activate"}
    # A button is the same one when a newer version comes above it: its id is of the version that it is about.
    assert {f"activate-{v['model_version']}" for v in status["versions"] if not v["active"]} <= set(re.findall(r'id="([^"]*)"', page))
    assert made.here.client.post(f"/projects/1/versions/{status['model_version']}/pin", json={}).status_code == 200
    page = html(made.here, "/projects/1/view/versions")
    assert 'action="/projects/1/unpin"' in page and "is pinned" in words(page)
    assert "Of the trained versions the newest 5 are kept ( KEEP_ADAPTERS )" in words(page)
    assert made.here.client.post("/projects/1/unpin", json={}).status_code == 200


def test_two_versions_are_drawn_over_the_same_images(made: Beetles) -> None:
    page = html(made.here, "/projects/1/view/compare")
    if "Make the missing predictions" in page:
        action = re.search(r'action="([^"]*/compare[^"]*)"', page)
        assert action and made.here.client.post(action[1].replace("&amp;", "&"), json={}).status_code == 202
        made.settle()
        page = html(made.here, "/projects/1/view/compare")
    assert page.count('class="dot"') > 2 * 5 * 4 and page.count('class="ring"') > 40
    picture = re.search(r'<image href="([^"]*)"', page)
    assert picture
    answer = made.here.client.get(picture[1].replace("&amp;", "&"))
    assert answer.status_code == 200 and answer.mimetype == "image/jpeg"
    assert "has no version" in html(made.here, "/projects/1/view/compare?a=nothing")


def test_what_to_label_next_leads_into_label_studio(made: Beetles) -> None:
    page = html(made.here, "/projects/1/view/next")
    assert f'href="{made.here.settings.label_studio_url}/projects/1/data?task=71"' in page
    assert "nearly the same as task 70" in page
    assert made.here.client.get("/projects/1/view/next?limit=0").status_code == 400


def test_findings_are_shown_with_pictures_and_dismissed(made: Beetles) -> None:
    page = html(made.here, "/projects/1/view/labels")
    assert "Left and right exchanged" in page and 'class="cross"' in page
    assert "at least 80 % sure, of every kind, into the field label_check" in words(page)
    assert 'action="/projects/1/quality/mark"' in html(made.here, "/projects/1/view/labels?kind=swapped")
    finding = re.search(r'data-body="{&#34;finding&#34;: &#34;(\w{16})&#34;}"', page)
    assert finding
    assert made.here.client.post("/projects/1/quality/dismiss", json={"finding": finding[1]}).status_code == 200
    assert finding[1] not in html(made.here, "/projects/1/view/labels")
    assert made.here.client.get("/projects/1/view/labels?kind=odd").status_code == 400


def test_what_no_longer_fits_the_label_config_is_listed(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        here.label(*range(1, 13))
        here.play_round()
        here.webhook("PROJECT_UPDATED", config=CONFIG.replace('"tail"', '"back"'))
        said = words(html(here))
        assert "Set aside since the label config changed" in said
        assert "it learned tail, which the config lacks" in said and "tail (12 points)" in said


def test_what_was_frozen_under_an_older_config_is_drawn(tmp_path: Path) -> None:
    with world(tmp_path) as here:
        here.label(*range(1, 13))
        here.play_round()
        page = "/projects/1/view/compare"
        here.client.post("/projects/1/compare")
        here.tick_until(lambda: here.client.get("/projects/1/compare").get_json()["compared"] == 5)
        pair = {side: here.client.get("/projects/1/compare").get_json()[side]["model_version"] for side in ("a", "b")}
        more = CONFIG.replace("<Label", '<Label value="paw"/><Label', 1).replace('smart="true"', 'smart="true" model_skeleton="ear-paw,ear-nose"')
        here.webhook("PROJECT_UPDATED", config=more)
        assert '<circle class="over"' in html(here)
        answer = here.client.get(page, query_string=pair, headers={"Accept": "text/html"})
        assert answer.status_code == 200
        assert answer.get_data(as_text=True).count('class="bone"') == 2 * 5, "ear to nose; nobody predicted a paw"


def test_the_labels_of_a_large_project_are_checked_in_the_background(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.reports.FEW", 2)
    here.label(1, 2, 3)
    assert "checked for the first time; this page fills by itself" in words(html(here, "/projects/1/view/labels"))
    assert "Examples in use" in html(here)
    for path in ("quality", "quality/mark"):
        answer = here.client.open(f"/projects/1/{path}", method="POST" if path.endswith("mark") else "GET")
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "60"
    for _ in range(6):
        here.keeper.tick()
    assert "3 labelled objects were checked" in words(html(here, "/projects/1/view/labels"))


def test_of_many_findings_the_page_says_how_many_there_are(here: World) -> None:
    here.label(1)
    here.client.get("/projects/1/quality")
    kept = here.services.journal.fact("report-quality:1")
    finding = {"task": 1, "annotation": 1001, "object": 0, "control": "kp:image", "points": ["nose"], "confidence": 0.9, "reason": "So."}
    finding |= {"skeleton": [], "picture": {"labelled": {}, "suggested": {}, "box": None, "size": None}}
    found = [finding | {"id": f"{n:016}", "kind": "far_off" if n % 4 else "missing"} for n in range(400)]
    here.services.journal.set_fact("report-quality:1", {**kept, "report": {**kept["report"], "findings": found}})
    here.client.post("/projects/1/quality/dismiss", json={"finding": f"{1:016}"})
    said = words(html(here, "/projects/1/view/labels?limit=300"))
    assert "300 of 399" in said and "All (399)" in said and "Left out (100)" in said and "1 were dismissed" in said
    assert "Show more" not in said
    assert "12 of 299 · Show more" in words(html(here, "/projects/1/view/labels?kind=far_off"))
    assert len(here.client.get("/projects/1/quality").get_json()["findings"]) == 399


def test_of_several_controls_each_is_named_and_the_figures_stand_once(tmp_path: Path) -> None:
    second = '<KeyPointLabels name="kq" toName="image"><Label value="wing"/></KeyPointLabels></View>'
    with world(tmp_path) as here:
        here.webhook("PROJECT_UPDATED", config=CONFIG.replace("</View>", second))
        annotations = [here.annotation(n) for n in range(1, 13)]
        here.webhook("ANNOTATIONS_CREATED", config=None, annotation=annotations, task=[here.task(n) for n in range(1, 13)])
        here.play_round()
        here.client.post("/projects/1/compare")
        here.tick_until(lambda: here.client.get("/projects/1/compare").get_json()["compared"] == 5)
        page = html(here, "/projects/1/view/compare")
        assert len(re.findall(r"Task \d+</a>: <code>kp:image</code>", page)) == len(re.findall(r"Task \d+</a>: <code>kq:image</code>", page)) == 5
        assert page.count("<figcaption>") == page.count("points right of all controls") == 2 * 5


def test_a_message_begins_with_a_capital_letter_and_keeps_its_others(here: World) -> None:
    here.label(*range(1, 13))
    here.client.post("/projects/1/start", json={})
    here.rounds._update(here.status()["job"]["job"], message="waiting: Label Studio says HTTP 502.")
    assert "Waiting: Label Studio says HTTP 502." in words(html(here, "/projects/1/view/now"))


# ---------------------------------------------------------------- how it is made


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(made: Beetles) -> None:
    for path in ("/", *(f"/projects/1/{view}" for view in VIEWS)):
        page = html(made.here, path)
        loaded = re.findall(r'<(?:img|script|image|link)[^>]*?(?:src|href)="([^"]*)"', page)
        assert all(address.startswith("/") and not address.startswith("//") for address in loaded)
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=)|javascript:", page)
    policy = made.here.client.get("/").headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy and "http" not in policy
    for name in FILES:
        text = (FOLDER / name).read_text()
        assert not re.search(r"(?<!xmlns=\")https?://|@import|url\(|eval\(|innerHTML", text)
        assert made.here.client.get(f"/page/{name}").mimetype == FILES[name]


def test_the_page_is_behind_the_same_login(tmp_path: Path) -> None:
    with world(tmp_path, basic_auth_user="me", basic_auth_pass="word") as here:
        for path in ("/", "/projects/1/", "/projects/1/view/labels", "/page/page.js"):
            answer = here.client.get(path, headers={"Accept": "text/html"})
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Basic")
        assert here.client.get("/", auth=("me", "word")).status_code == 200
        assert here.client.post("/projects/1/start", json={}).status_code == 401


def test_another_sites_page_cannot_start_a_round(here: World) -> None:
    for origin in ("http://evil.example", "null"):
        assert here.client.post("/projects/1/start", json={}, headers={"Origin": origin}).status_code == 403
    assert here.client.get("/").headers["Referrer-Policy"] == "same-origin"  # no-referrer would send `null` from here, too


class Outline(HTMLParser):
    """What assistive technology makes of a page: ids, references to them, names of what can be operated."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.headings: list[int] = []
        self.nameless: list[str] = []
        self.open: list[tuple[str, bool]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.references += str(found.get("aria-labelledby") or "").split()
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img" and "alt" not in found:
            self.nameless.append(tag)
        if tag in ("progress",) and not found.get("aria-labelledby"):
            self.nameless.append(tag)
        if found.get("role") == "img" and not (found.get("aria-label") or found.get("aria-labelledby")):
            self.nameless.append(tag)
        if tag in ("a", "button"):
            self.open.append((tag, bool(found.get("aria-label"))))

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.open[-1] = (self.open[-1][0], True)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("a", "button"):
            name, named = self.open.pop()
            if not named:
                self.nameless.append(name)


def test_everything_has_a_name_and_headings_follow_each_other(made: Beetles) -> None:
    for path in ("/", *(f"/projects/1/{view}" for view in VIEWS if view != "view/now")):
        page = html(made.here, path)
        outline = Outline(page)
        assert len(outline.ids) == len(set(outline.ids)), path
        assert set(outline.references) <= set(outline.ids), path
        assert outline.nameless == [], path
        assert outline.headings[0] == 1 and outline.headings.count(1) == 1, path
        assert all(b - a <= 1 for a, b in itertools.pairwise(outline.headings)), path
        assert '<html lang="en">' in page and 'class="skip"' in page and 'aria-live="polite"' in page


def _schemes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\n\s*\}", (FOLDER / "page.css").read_text(), re.S)
    return {name: dict(re.findall(r"--([\w-]+): (#\w{6})", text)) for name, text in (("light", light), ("dark", dark))}


def _contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(scheme: str) -> None:
    c = _schemes()[scheme]
    text = [("text", "bg"), ("text", "card"), ("soft", "bg"), ("soft", "card"), ("accent", "card"), ("accent", "bg"), ("accent", "tint"),
            ("on-accent", "accent"), ("judge", "card"), ("next", "card"), ("floor", "card"), ("good", "card"), ("warn", "card"),
            ("text", "warn-bg"), ("text", "bad-bg")]  # fmt: skip
    assert {pair: round(_contrast(c[pair[0]], c[pair[1]]), 2) for pair in text if _contrast(c[pair[0]], c[pair[1]]) < 4.5} == {}
    edges = [("field", "card"), ("field", "bg"), ("bad", "bad-bg"), ("warn", "warn-bg")]
    assert {pair: round(_contrast(c[pair[0]], c[pair[1]]), 2) for pair in edges if _contrast(c[pair[0]], c[pair[1]]) < 3} == {}


# ---------------------------------------------------------------- drawings


def test_a_curve_of_one_round_and_of_many_lies_on_its_canvas() -> None:
    assert charts.curve([charts.Line("a", "judge", [])]) is None
    for rounds in (1, 2, 40):
        values = [(n, n / rounds, f"{n}", True) for n in range(1, rounds + 1)]
        lines = [charts.Line("a", "judge", values), charts.Line("b", "next", [(1, 1.6, "", False)])]
        drawn = charts.curve(lines, [charts.Level("floor", "floor", 1.0)])
        assert drawn and len(drawn["ticks"]) <= charts.MOST_TICKS
        assert [g["text"] for g in drawn["grid"]] == ["0%", "25%", "50%", "75%", "100%", "125%", "150%", "175%"]
        marks = [m for line in drawn["lines"] for m in line["marks"]]
        assert all(drawn["left"] <= m["x"] <= drawn["right"] and charts.TOP <= m["y"] <= drawn["bottom"] for m in marks)
        assert max(m["x"] for m in marks) == drawn["right"], "the newest round stands beside the names"
        heights = [n["y"] for n in drawn["names"]]
        assert all(b - a >= charts.APART - 0.2 for a, b in itertools.pairwise(heights))


def test_a_share_far_above_1_has_a_grid_that_can_be_read() -> None:
    drawn = charts.curve([charts.Line("a", "judge", [(1, 3.2, "", True)])])
    assert drawn and [g["text"] for g in drawn["grid"]] == [f"{50 * i}%" for i in range(8)]


def test_without_training_there_is_round_0_and_the_axis_says_what_that_is() -> None:
    for first, said in ((0, "round (0: only the examples)"), (1, "round")):
        drawn = charts.curve([charts.Line("a", "judge", [(first, 0.5, "", True), (first + 1, 0.6, "", True)])])
        assert drawn and drawn["axis"] == said and [t["text"] for t in drawn["ticks"]] == [str(first), str(first + 1)]


def test_a_round_starts_from_the_version_that_it_was_trained_from() -> None:
    """Rounds 1 and 2 failed; round 3 starts from the examples alone, round 5 from round 3."""
    def version(number: int, parent: str | None, before: float | None = None, after: float | None = None) -> dict[str, Any]:
        judged = {"before": before and {"pck": {"0.05": before}}, "after": after and {"pck": {"0.05": after}}}
        return {"model_version": f"r{number}", "round": number, "parent": parent, "promoted": True, **judged}

    status = {"versions": [version(0, None), version(3, "r0", 0.3, 0.5), version(5, "r3", 0.5, 0.6)]}
    rows = charts.accuracy(status, {"versions": []}, {"controls": {}})["rows"]
    assert [(r["round"], r["heldout"]) for r in rows] == [(0, 0.3), (3, 0.5), (5, 0.6)]
    gone = {"versions": [version(3, "somewhere", 0.3, 0.5)]}
    assert [r["round"] for r in charts.accuracy(gone, {"versions": []}, {"controls": {}})["rows"]] == [0, 3]


def test_bones_join_names_wherever_they_stand() -> None:
    points = {"names": ["tail", "nose"], "xy": [[1, 2], [3, 4]], "visibility": [2, 2]}
    for drawing in (overlays.versus((10, 10), [], [points], [("nose", "tail"), ("nose", "ear")]),
                    overlays.example((10, 10), points, [("nose", "tail"), ("nose", "ear")])):  # fmt: skip
        assert drawing["bones"] == [{"x1": 3.0, "y1": 4.0, "x2": 1.0, "y2": 2.0}]


def test_a_suspicion_is_looked_at_closely_and_inside_the_image() -> None:
    finding = {"points": ["a"], "skeleton": [["a", "b"]], "picture": {
        "labelled": {"a": [3.0, 5.0], "b": [20.0, 9.0]}, "suggested": {"a": [9.0, 5.0]}, "size": [400, 200]}}  # fmt: skip
    drawing = overlays.suspicion(finding)
    assert drawing and drawing["view"] == {"x": 0.0, "y": 0.0, "w": 100.0, "h": 50.0}
    assert [p["strong"] for p in drawing["rings"]] == [True, False]
    assert drawing["gaps"] == [{"x1": 3.0, "y1": 5.0, "x2": 9.0, "y2": 5.0}]
    assert overlays.suspicion({**finding, "picture": {**finding["picture"], "size": None}}) is None


def test_a_picture_that_cannot_be_fetched_costs_no_page(here: World) -> None:
    here.label(1)
    here.studio.routes["/data/upload/1/1.png"] = Answer(404)
    html(here)
    assert here.client.get("/projects/1/tasks/1/image").status_code >= 400
