"""docs/api.md and docs/openapi.json: the document is the code's, and every example runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stub import StubServices
from test_client import Running

from serving.api import make_app
from serving.config import ServeConfig
from serving.problems import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
EXAMPLES = re.findall(r"```(sh|python|js)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = {"sh": ["bash", "-euc"], "python": [sys.executable, "-c"], "js": ["node", "--input-type=module", "-e"]}


@pytest.fixture
def app(tmp_path):
    return make_app(StubServices(), ServeConfig(database=f"sqlite:///{tmp_path}/service.db"))


def test_the_document_is_the_codes(app):
    kept = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert app.openapi() == kept, "the interface changed: look at `git diff` after `make openapi`"
    assert kept["openapi"].startswith("3.1")


def test_the_page_names_every_path_and_every_type_of_problem(app):
    experiments = (ROOT / "docs" / "experiments.md").read_text()
    for path in app.openapi()["paths"]:
        last = re.sub(r"/\{(request|experiment)_id\}|/events$", "", path).removesuffix(".{suffix}")
        short = last.rsplit("/", 1)[-1]  # several verbs of one thing stand in one line
        assert f"/{short}" in (experiments if path.startswith("/v1/experiments") else PAGE), path
    for kind, known in KINDS.items():
        assert f"`{kind}`" in PAGE and str(known.status) in PAGE


@pytest.mark.parametrize("number", [k for k, (_, code) in enumerate(EXAMPLES) if "127.0.0.1" in code])
def test_the_examples_run_as_they_stand(app, number):
    language, code = EXAMPLES[number]
    with Running(app) as running:
        words = [*COMMANDS[language], code.replace("http://127.0.0.1:8000", running.url)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Tea " in done.stdout


def test_there_is_an_example_in_every_language():
    assert {language for language, code in EXAMPLES if "127.0.0.1" in code} == set(COMMANDS)
