"""The rooms of this product and the arrows between them, held by their imports: backend → label_config → kptllm_core."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("backend", "label_config", "kptllm_core")
VALUE_TYPES = {"kptllm_core.keypoints", "kptllm_core.geometry", "kptllm_core.errors"}
LEARNING = {"torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers"}
SERVING = {"flask", "werkzeug", "gunicorn"}
LABEL_STUDIO = {"label_studio_sdk", "label_studio_ml", "label_studio"}
# The tour renders or reads images with truth and measures with the metrics of the core; none of these loads torch.
DEMO = {"kptllm_core.synthetic", "kptllm_core.dataset", "kptllm_core.metrics"}


def modules(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; `from kptllm_core import errors` counts as kptllm_core.errors."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path)
            found |= {f"{base}.{alias.name}" for alias in node.names} if base in ROOMS else {base}
    return found


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parts[: -node.level]
    return ".".join((*package, *((node.module,) if node.module else ())))


def within(name: str, allowed: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in allowed)


def complain(path: Path, names: list[str], why: str) -> str:
    return f"{path.relative_to(ROOT)} imports {', '.join(sorted(names))}: {why}"


@pytest.mark.parametrize("path", modules("kptllm_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_nothing_of_label_studio(path: Path) -> None:
    wrong = [name for name in imports(path) if within(name, {"backend", "label_config"} | LABEL_STUDIO)]
    assert not wrong, complain(path, wrong, "the core knows nothing of the other rooms.")


@pytest.mark.parametrize("path", modules("label_config"), ids=lambda path: str(path.relative_to(ROOT)))
def test_label_config_uses_only_the_value_types(path: Path) -> None:
    names = imports(path)
    wrong = [n for n in names if within(n, {"backend"} | LEARNING | SERVING)]
    wrong += [n for n in names if within(n, {"kptllm_core"}) and not within(n, VALUE_TYPES)]
    assert not wrong, complain(path, wrong, "label_config may use only the core's value types; no torch, no Flask.")


@pytest.mark.parametrize("path", modules("backend"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_backend_reaches_the_core_over_http_only(path: Path) -> None:
    allowed = VALUE_TYPES | {"kptllm_core.imaging"} | (DEMO if "demo" in path.parts else set())
    names = imports(path)
    wrong = [n for n in names if within(n, LEARNING)]
    wrong += [n for n in names if within(n, {"kptllm_core"}) and not within(n, allowed)]
    assert not wrong, complain(path, wrong, "the backend may use only value types and image reading of the core.")


def test_only_the_settings_read_the_environment() -> None:
    """Whoever starts processes hands the environment on, or to Settings.from_env; nobody else looks into it."""
    may = {"settings.py", "supervisor.py", "__main__.py"}
    for path in modules("backend"):
        if path.name in may or "demo" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        assert "os.environ" not in text, f"{path.name} reads the environment: take it from Settings."
        assert "getenv" not in text, f"{path.name} reads the environment: take it from Settings."


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("backend", LEARNING), ("backend.app", LEARNING), ("backend.model", LEARNING), ("backend.demo.tour", LEARNING),
        ("label_config.schema", LEARNING | SERVING), ("label_config.regions", LEARNING | SERVING),
        ("kptllm_core", LEARNING), ("kptllm_core.keypoints", LEARNING), ("kptllm_core.__main__", {"torch"}),
    ],
)  # fmt: skip
def test_what_an_import_really_loads(module: str, never: set[str]) -> None:
    """The sources may look innocent and still load torch through a third module: ask a fresh interpreter."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & never, f"importing {module} loads {set(done.stdout.split()) & never}"
