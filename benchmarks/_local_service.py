"""The service with models of its own in one process, on loopback: what benchmarks and tests put members in front of.

python -m benchmarks._local_service '{"database": "sqlite:///runs/x.db", "port": 8123, "model_name_or_path": "..."}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks._ports import held_port

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "configs" / "embedded" / "serve.yaml"


@contextmanager
def running(log: Path, **keys: Any) -> Iterator[str]:
    """A process with the keys of ``configs/embedded/serve.yaml``, some replaced; yields its URL, and ends it.

    Args:
        log: file for what it says.
        keys: of ``ServeConfig``; the port is a free one.

    Raises:
        RuntimeError: if it ends, or is not up within two minutes; with what it said.
    """
    with held_port() as port, log.open("w") as said:
        command = [sys.executable, "-m", "benchmarks._local_service", json.dumps(keys | {"port": port}, default=str)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            _wait(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    with httpx.Client(trust_env=False) as http:
        for _ in range(1200):
            if process.poll() is not None:
                break
            try:
                if http.get(f"{url}/healthz", timeout=1).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
    raise RuntimeError(f"the service is not up: {log.read_text()[-3000:]}")


def main() -> None:
    """Serve until ended."""
    import torch
    import uvicorn
    import yaml

    from serving.api import make_app
    from serving.config import ServeConfig
    from serving.local import LocalServices

    torch.set_num_threads(1)
    config = ServeConfig(**yaml.safe_load(EMBEDDED.read_text()) | json.loads(sys.argv[1]))
    app = make_app(LocalServices.load(config), config)
    uvicorn.run(app, host="127.0.0.1", port=config.port, log_level="warning")


if __name__ == "__main__":
    main()
