"""The README is true: settings, commands, options, attributes and files that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from backend.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMAND = re.compile(r"python -m (backend|kptllm_core)((?: +[^\s`#|\\]+)*)")


@cache
def help_of(module: str, command: str | None) -> str:
    words = [sys.executable, "-m", module, *([command] if command else []), "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{' '.join(words[1:])} failed: {done.stderr[-500:]}"
    return done.stdout


def test_every_setting_is_documented_as_the_code_says() -> None:
    """To mend it, put the output of `Settings.table()` between the two comments."""
    table = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", README, re.DOTALL)
    assert table, "the README has lost the comments around its table of settings"
    assert table[1].strip() == Settings.table()


def test_the_settings_of_the_core_are_documented() -> None:
    for path in (ROOT / "kptllm_core").rglob("*.py"):
        for name in re.findall(r"os\.environ(?:\.get\(|\[)\s*[\"'](\w+)", path.read_text(encoding="utf-8")):
            assert f"`{name}`" in README, f"{path.name} reads {name}, which the README does not name"


def commands() -> list[tuple[str, str]]:
    return sorted({(found[1], found[2].strip()) for found in COMMAND.finditer(README)})


@pytest.mark.parametrize(("module", "arguments"), commands(), ids=lambda value: str(value)[:60])
def test_every_command_exists_with_its_options(module: str, arguments: str) -> None:
    words = arguments.split()
    command = words[0] if words and not words[0].startswith("-") else None
    text = help_of(module, command)
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", text), f"python -m {module} {command or ''} has no option {option}"


def test_every_make_target_and_variable_exists() -> None:
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", re.sub(r"```.*?```|`[^`]*`", lambda m: m[0].replace("`", " "), README)))
    targets &= set(re.findall(r"[`\n]\s*make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"the Makefile has no target {target}"
    for variable in re.findall(r"make [a-z-]+ ([A-Z_]+)=", README):
        assert f"$({variable})" in MAKEFILE


def test_every_attribute_of_a_label_config_is_documented() -> None:
    import label_config.schema

    text = label_config.schema.__doc__ or ""
    for attribute in sorted(set(re.findall(r"\bmodel_[a-z]+(?:_[a-z]+)*|\bpredicted_values\b", text))):
        assert f"`{attribute}`" in README, f"the attribute {attribute} is not in the README"


def test_the_config_that_the_readme_shows_is_read_as_it_says() -> None:
    from label_config.schema import parse

    shown = re.search(r"```xml\n(.*?)```", README, re.DOTALL)
    assert shown
    (control,) = parse(shown[1]).controls
    assert control.schema.names == ("nose", "neck", "tail", "left_ear", "right_ear")
    assert control.schema.skeleton == ((0, 1), (1, 2))
    assert control.schema.symmetric == ((3, 4),)
    assert control.schema.category == "dog"
    assert control.box is not None
    assert control.occluded == "hidden"


def test_every_file_of_the_tree_exists() -> None:
    tree = re.search(r"```\n(backend/.*?)```", README, re.DOTALL)
    assert tree
    folder = ""
    for line in tree[1].splitlines():
        names = re.match(r"( *)((?:\S+ ?)+)", line)
        assert names
        if not names[1]:
            folder = names[2].split()[0]
            assert (ROOT / folder).is_dir(), folder
            continue
        for name in names[2].split():
            if "." in name or name.endswith("/"):
                assert (ROOT / folder / name).exists(), f"{folder}{name} is in the README's tree and nowhere else"


def test_every_link_and_picture_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|md|xml|yml))`", README):
        if "://" not in target:
            assert (ROOT / target).exists(), f"the README names {target}, which does not exist"
