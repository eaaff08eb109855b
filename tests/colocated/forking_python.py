"""A stand-in for `servers.python` that forks instead of importing torch again for every server.

`forking_python` writes an executable that takes a command line as Python does. It hands command line, environment and
outputs to a process that has imported what servers need, which forks and runs the script there. The executable lives
as long as the fork, ends as that ended, and takes it along when it is killed itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import selectors
import shlex
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

_SIZE_BYTES = 4
_ASK = f"""\
import json, os, socket, sys
order = json.dumps([sys.argv[2:], dict(os.environ), os.getcwd()]).encode()
with socket.socket(socket.AF_UNIX) as forker:
    forker.connect(sys.argv[1])
    socket.send_fds(forker, [len(order).to_bytes({_SIZE_BYTES}, "big")], [1, 2])
    forker.sendall(order)
    status = forker.recv(1)
sys.exit(status[0] if status else "the process that forks servers is gone")
"""


@contextmanager
def forking_python(folder: Path) -> Iterator[Path]:
    """The executable, in a folder whose path is short enough for a socket."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.preload"])
    ours, theirs = context.Pipe(duplex=False)
    forker = context.Process(target=_fork_on_demand, args=(str(folder / "forker"), theirs), daemon=True)
    forker.start()
    try:
        assert ours.recv() == "listening"
        python = folder / "python"
        ask = shlex.join([sys.executable, "-ISc", _ASK, str(folder / "forker")])
        python.write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
        python.chmod(0o700)
        yield python
    finally:
        forker.kill()
        forker.join()


def _fork_on_demand(address: str, ready: Connection) -> None:
    """Fork for everybody who asks, until this process is killed."""
    import megatron_fipo.rollout.servers.sglang.checksums  # noqa: F401
    import tests.colocated.fake_gpus  # noqa: F401

    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    ready.send("listening")
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        key, _ = selector.select()[0]  # one at a time: what ends one may end another
        if key.fileobj is listener:
            _begin(listener, selector)
        elif isinstance(key.fileobj, socket.socket):  # whoever asked is gone
            selector.unregister(key.fileobj)
            os.kill(key.data, signal.SIGKILL)  # it is not reaped yet, so that the number is still its own
        else:
            _end(key, selector)


def _begin(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    asker, _ = listener.accept()
    size, outputs, _, _ = socket.recv_fds(asker, _SIZE_BYTES, 2)
    with asker.makefile("rb") as file:
        order = json.loads(file.read(int.from_bytes(size, "big")))
    pid = os.fork()
    if not pid:
        _run(order, outputs)
    for output in outputs:
        os.close(output)
    selector.register(asker, selectors.EVENT_READ, pid)
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, asker))


def _end(key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
    """Tell whoever asked how the fork ended, if there still is somebody."""
    pid, asker = key.data
    assert isinstance(key.fileobj, int)
    selector.unregister(key.fileobj)
    os.close(key.fileobj)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with asker, contextlib.suppress(BrokenPipeError):
        if asker in selector.get_map():
            selector.unregister(asker)
            asker.send(bytes([code if code >= 0 else 128 - code]))


def _run(order: list[Any], outputs: list[int]) -> NoReturn:
    """Run a script as Python would, in a session of its own."""
    code: Any = 1
    try:
        arguments, environment, folder = order
        os.setsid()
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)  # the forker's own
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = arguments
        sys.path[:0] = [str(Path(arguments[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - as Python ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
