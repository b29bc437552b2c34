"""What the Makefile does beyond calling the ``consensus`` command."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_serve_takes_the_run_with_the_newest_weights(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv/.installed").touch()
    command = tmp_path / ".venv/bin/consensus"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    for day, run in enumerate(("newest_folder", "newest_weights", "no_preference_model"), start=1):
        weights = tmp_path / "runs" / run / "ppo" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        os.utime(weights, (day * 86400, day * 86400))
    for run in ("newest_weights", "newest_folder"):
        (tmp_path / "runs" / run / "preference").mkdir()
        (tmp_path / "runs" / run / "preference" / "calibration.json").touch()
    os.utime(tmp_path / "runs" / "newest_weights", (0, 0))
    done = subprocess.run(["make", "serve"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (
        "--model_name_or_path runs/newest_weights/ppo --preference_model runs/newest_weights/preference" in done.stdout
    )
