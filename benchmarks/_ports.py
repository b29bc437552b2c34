"""A port for a process that is yet to start."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A loopback port that the system gives nobody else as long as this lasts, whether somebody listens there or not.

    One that was only looked up could be another's when a server comes to listen. Ours is bound and never listens;
    whoever allows reuse (``SO_REUSEADDR``), as servers do, can listen there.
    """
    with socket.socket() as claim:
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claim.bind(("127.0.0.1", 0))
        yield int(claim.getsockname()[1])
