"""Processes that each hold one model, forked from one that has torch loaded already. No Ray or torch to import this.

Loading torch and transformers takes many times longer than loading a small model, and every replica would do it again.
So the first replica of a machine starts the *nursery*: a process of one thread that imports both and from then on forks
a *model process* for whoever asks. A replica that replaces a lost one need not import them again, and what does not
change in memory is there once. A model process ends with the replica it works for, in the middle of a call too, and the
nursery with Ray.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from deliberation.types import InputError
from serving.worker import Refusal

HOSTED = "serving.hosted"
"""The module with the classes that a model process can hold."""

START_TIMEOUT_S = 120.0
WATCH_EVERY_S = 1.0


class ModelLost(RuntimeError):
    """The model's process has ended."""


class ModelProcess:
    """A model in a process of its own.

    Args:
        kind: name of a class in ``serving.hosted``.
        args: what it is made from.

    Raises:
        InputError, RuntimeError: what the class raises when it is made; the latter with its traceback as text.
    """

    def __init__(self, kind: str, *args: Any):
        self._connection = _connect()
        self._connection.send((dict(os.environ), kind, args))
        made = self._result()
        if isinstance(made, Refusal):
            raise InputError(made.field, made.value, made.mend)

    def call(self, method: str, *args: Any) -> Any:
        """The result of the model's method; an ``InputError`` is returned as a ``Refusal``.

        Raises:
            RuntimeError: what else the method raises, with its traceback as text.
            ModelLost: if the process has ended.
        """
        try:
            self._connection.send((method, args))
            return self._result()
        except (EOFError, OSError) as error:
            raise ModelLost("the model's process has ended") from error

    def close(self) -> None:
        """End the process."""
        self._connection.close()

    def _result(self) -> Any:
        good, value = self._connection.recv()
        if not good:
            raise RuntimeError(value)
        return value


def _connect() -> Connection:
    """A connection to a new process of this machine's nursery, which is started if there is none.

    Raises:
        RuntimeError: if it does not start, or somebody else has taken its place.
    """
    if sys.platform != "linux":
        return _spawn()
    folder = Path(tempfile.gettempdir()) / f"nursery-{os.getuid()}-{os.getppid()}"  # one for each Ray on this machine
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder.lstat()
    if not stat.S_ISDIR(kept.st_mode) or kept.st_uid != os.getuid() or kept.st_mode & 0o077:
        raise RuntimeError(f"{folder} is not ours alone: what answers there must not be trusted; remove it")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one starts it, the others wait
        try:
            return _ask(folder / "socket")
        except (FileNotFoundError, ConnectionRefusedError):
            return _start(folder / "socket")


def _spawn() -> Connection:
    """A connection to a process that starts from nothing: only Linux forks safely once torch is loaded."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "serving.nursery", "--hold", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    return Connection(ours.detach())


def _ask(address: Path) -> Connection:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(address))
        return Connection(caller.detach())


def _start(address: Path) -> Connection:
    address.unlink(missing_ok=True)
    command = [sys.executable, "-m", "serving.nursery", str(address), str(os.getppid())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (address.parent / "log").open("ab") as log:
        # Returns at once: the nursery is a child of what runs here
        subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            return _ask(address)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.05)
    raise RuntimeError(f"the nursery of model processes did not start within {START_TIMEOUT_S:.0f} s")


# --- in the nursery -------------------------------------------------------------------------------------------


def main(address: str, ray_pid: int) -> None:
    """Fork a model process for every connection, until Ray has ended."""
    if os.fork():  # Ray ends the children of a lost replica; a grandchild stays
        os._exit(0)
    os.setsid()
    importlib.import_module(HOSTED)
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["?"]
    if len(threads) != 1:
        raise RuntimeError(f"the nursery has {len(threads)} threads; forking would be unsafe")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for ended model processes
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        door.settimeout(WATCH_EVERY_S)
        while _alive(ray_pid):
            try:
                caller, _ = door.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                door.close()
                _hold_model(Connection(caller.detach()))
            caller.close()
    for file in Path(address).parent.iterdir():
        file.unlink()
    Path(address).parent.rmdir()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _hold_model(connection: Connection) -> NoReturn:
    """In the new process: make the model and carry out calls until the replica has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    try:
        environment, kind, args = connection.recv()
        os.environ.clear()
        os.environ.update(environment)  # the GPUs that Ray gave to the replica, above all
        held: list[Any] = []
        _answer(connection, lambda: held.append(getattr(importlib.import_module(HOSTED), kind)(*args)))
        while True:
            method, args = connection.recv()
            _answer(connection, partial(_call, held, method, args))
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _end_with(connection: Connection) -> NoReturn:
    """End this process when the replica has gone: in a call, the other thread would not see it before its end."""
    watch = select.poll()
    watch.register(connection.fileno(), select.POLLHUP)  # not POLLIN: what is sent is for the other thread
    while not any(event & select.POLLHUP for _, event in watch.poll()):
        pass
    os._exit(0)


def _call(held: list[Any], method: str, args: tuple[Any, ...]) -> Any:
    return getattr(held[0], method)(*args)


def _answer(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        result = (True, work())
    except InputError as error:
        result = (True, Refusal(error.field, error.value, error.mend))
    except Exception:
        result = (False, traceback.format_exc())
    connection.send(result)


if __name__ == "__main__":
    if sys.argv[1] == "--hold":
        _hold_model(Connection(int(sys.argv[2])))
    main(sys.argv[1], int(sys.argv[2]))
