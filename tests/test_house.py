"""The plan of the house holds: who may import whom, what stays light, what no file may name."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BELOW = {
    "deliberation": set(),
    "embedded": {"deliberation"},
    "reward": {"deliberation", "embedded"},
    "rl": {"deliberation", "embedded"},
    "evaluation": {"deliberation", "embedded", "reward", "rl"},
    "serving": {"deliberation", "embedded", "reward", "rl", "evaluation"},
}
"""Room -> rooms it may import: an arrow only ever points down."""

ALSO = {"rl/train.py": {"reward"}}
"""The one exception: it wires a reward into a trainer."""

RECIPES = {"reward", "rl"}
"""What the recipes of the shipped models (``embedded/*.py`` but ``__init__``) may import too: no room imports them."""

HEAVY = {"torch", "transformers", "trl", "ray", "accelerate", "peft"}
"""What ``deliberation`` must do without."""

TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".cfg", ".txt", ".html", ""}
SKIPPED = {".git", ".hypothesis", "build", "dist", "runs", "__pycache__"}


def modules(room: str) -> list[Path]:
    return sorted(p for p in (ROOT / room).rglob("*.py") if "__pycache__" not in p.parts)


def imported(source: str) -> set[str]:
    """Top-level names of everything that ``source`` imports, inside functions too (but not for type checkers only)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_the_import_reader_sees_nested_imports():
    source = "import os\ndef f():\n    from reward.welfare import welfare\n    import ray.serve\n"
    assert imported(source) == {"os", "reward", "ray"}


@pytest.mark.parametrize("room", BELOW)
def test_arrows_point_down(room):
    files = modules(room)
    assert files, f"{room}/ has no modules"
    rooms = set(BELOW) | {"cli", "demo", "benchmarks", "tests"}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        allowed = BELOW[room] | {room} | ALSO.get(name, set())
        if room == "embedded" and path.name != "__init__.py":
            allowed |= RECIPES
        upward = (imported(path.read_text()) & rooms) - allowed
        assert not upward, f"{name} imports {sorted(upward)}; it may import {sorted(allowed)}"


def test_no_room_imports_the_recipes_of_the_embedded_models():
    for path in (path for room in BELOW if room != "embedded" for path in modules(room)):
        assert not re.search(r"^\s*(from|import) embedded\.", path.read_text(), re.MULTILINE), path.name


def test_deliberation_does_without_models():
    for path in modules("deliberation"):
        heavy = imported(path.read_text()) & HEAVY
        assert not heavy, f"{path.name} imports {sorted(heavy)}"


LIGHT = {
    "deliberation.types, deliberation.prompts, deliberation.citizens, deliberation.datasets": ["torch", "ray"],
    "cli": ["torch", "transformers", "ray"],
    "reward.welfare, evaluation.measures": ["torch", "ray"],
    "reward.preference, reward.scoring, reward.group_reward, rl.ppo, rl.policy": ["ray"],
    "serving.best_of_n, serving.api": ["ray"],
}
"""Modules -> packages that importing them must not load."""


@pytest.mark.parametrize("names", LIGHT)
def test_pure_modules_stay_light(names):
    code = f"import json, sys, {names}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & set(LIGHT[names])


def repository_files() -> list[Path]:
    """Text files of the project, without what .gitignore names."""

    def skipped(name: str) -> bool:
        return name in SKIPPED or name.startswith(".venv") or name.endswith((".egg-info", "_cache"))

    found = []
    for folder, folders, names in os.walk(ROOT):  # never into what is skipped: other tests write there meanwhile
        folders[:] = [name for name in folders if not skipped(name)]
        found += [Path(folder, name) for name in names if not skipped(name)]
    return [path for path in found if path.is_file() and path.suffix in TEXT and path != Path(__file__)]


MACHINE_PATH = re.compile(r"(?<![\w.~-])/(work|home|root|opt|Users|mnt)/\w")
REGISTRY = re.compile(r"(pypi\.org|pythonhosted\.org|download\.pytorch\.org)")


def test_the_path_pattern_finds_paths():
    assert MACHINE_PATH.search('open("/home/anna/x")') and MACHINE_PATH.search("cd /" + "work/main")
    assert not MACHINE_PATH.search("../shared/data, ~/opt/x, schools/homes, at home/opt/x")


def test_no_file_names_a_machine_path_or_a_registry():
    files = repository_files()
    assert ROOT / "cli.py" in files and ROOT / "Makefile" in files
    for path in files:
        text = path.read_text(encoding="utf-8")
        for pattern in (MACHINE_PATH, REGISTRY):
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(ROOT)} names {found and found.group()!r}"


def test_every_room_ships_in_the_wheel_with_its_data():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {pattern.rstrip("*") for pattern in tool["packages"]["find"]["include"]} == {*BELOW, "configs"}
    for package, patterns in tool["package-data"].items():
        for file in (p for p in (ROOT / package).rglob("*") if p.suffix in (".json", ".jsonl", ".safetensors")):
            inside = file.relative_to(ROOT / package)
            assert any(inside.full_match(p) if hasattr(inside, "full_match") else _matches(inside, p) for p in patterns)


def _matches(path: Path, pattern: str) -> bool:
    """``Path.full_match`` for the two forms in use, before Python 3.13."""
    if pattern.startswith("**/"):
        return path.match(pattern[3:])
    return path.match(pattern) and len(path.parts) == len(Path(pattern).parts)


def test_shipped_weights_are_small_enough():
    sizes = [p.stat().st_size for p in (ROOT / "embedded").rglob("*.safetensors")]
    assert sum(sizes) <= 25 * 2**20
