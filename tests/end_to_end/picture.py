"""The README's picture, taken anew from a running `make demo`:

python tests/end_to_end/picture.py http://127.0.0.1:8080/projects/1/data?task=7 docs/label-studio.png
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from backend.demo.services import Login  # noqa: E402
from end_to_end.browser import labelling_page  # noqa: E402


def main(address: str, out: Path) -> None:
    url, project, task = re.fullmatch(r"(.*)/projects/(\d+)/data\?task=(\d+)", address).groups()  # type: ignore[union-attr]
    chromium = (shutil.which("chromium") or "chromium", shutil.which("chromedriver") or "chromedriver")
    with tempfile.TemporaryDirectory() as profile, labelling_page(chromium, url, Path(profile)) as page:
        page.log_in(Login.of(ROOT / ".data" / "demo"))
        page.open(int(project), int(task), points=3)
        time.sleep(1.0)  # panels slide into place
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
