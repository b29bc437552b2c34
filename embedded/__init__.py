"""The embedded default: a base writer and a base judge of our own making, small enough to ship.

They know simulated citizens only. ``make embedded-models`` makes them again; nobody who uses the project needs to.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("writer", "judge")


def resolve(name_or_path: str) -> str:
    """``embedded/writer`` and ``embedded/judge`` as folders of this package, from any working directory.

    Any other name (a folder, a hub id) is returned unchanged.
    """
    prefix, _, name = name_or_path.partition("/")
    return str(Path(__file__).parent / name) if prefix == "embedded" and name in NAMES else name_or_path
