"""What a person sees: Label Studio's labelling page in a real browser, with the points that were predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.demo.samples import Material
from end_to_end.browser import labelling_page
from end_to_end.conftest import Stack

pytestmark = [pytest.mark.label_studio, pytest.mark.browser]
NEAR = 0.5  # per cent of the image


def test_the_labelling_page_draws_the_predicted_points(
    stack: Stack, insects: Callable[[int], Material], chromium: tuple[str, str], tmp_path: Path, artifacts: Path
) -> None:
    tour = stack.tour(insects(3))
    labelled, *others = tour.project.material.pictures
    tour.label([labelled])
    predicted = tour.predict(others)[others[0].path.name]
    expected = {
        region["value"]["keypointlabels"][0]: (region["value"]["x"], region["value"]["y"])
        for region in predicted
        if region["type"] == "keypointlabels"
    }
    assert expected

    with labelling_page(chromium, stack.label_studio, tmp_path / "profile") as page:
        page.log_in(stack.login)
        page.open(tour.project.id, tour.project.tasks[others[0].path], len(expected))
        regions = {region.label: (region.x, region.y) for region in page.regions()}
        circles = np.array([(circle.x, circle.y) for circle in page.circles()])
        picture = artifacts / "labelling-page.png"
        page.screenshot(picture)

    assert set(regions) == set(expected), "the page holds other points than the prediction"
    for label, xy in expected.items():
        np.testing.assert_allclose(regions[label], xy, atol=NEAR, err_msg=label)
        distances = np.linalg.norm(circles - xy, axis=1)
        assert distances.min() < NEAR, f"no circle is painted where {label} was predicted"
    with Image.open(picture) as shown:
        assert shown.width >= 1200
        assert len(shown.convert("RGB").resize((200, 120)).getcolors(100_000) or []) > 100, "an empty page"
