"""Starts an SGLang server, or its router, that answers only those who show the run's key.

Run by path with the interpreter that has SGLang installed; it imports nothing of this package but the guard beside it.
SGLang takes a key as an argument alone, and everybody on a host reads command lines. So it is handed its arguments
here, in the process, with the key from the environment added: it shows the key to itself then, and the router shows
it to the servers. It logs its arguments, from which the key is taken out again. What stands at module level is needed
in the processes that it spawns too, which import this file anew.
"""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import sys
from typing import Any

from server_guard import KEY_VARIABLE, ServerGuard, own_key  # type: ignore[import-not-found]  # this file's folder is on the path


def _hide_key_in_logs(key: str) -> None:
    """Take the key out of every record of this process's loggers."""
    make = logging.getLogRecordFactory()

    def make_without_key(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if key in str(record.msg) or key in str(record.args):
            record.msg, record.args = record.getMessage().replace(key, "(the run's key)"), ()
        return record

    logging.setLogRecordFactory(make_without_key)


if KEY_VARIABLE in os.environ:
    _hide_key_in_logs(own_key())


def main(arguments: list[str]) -> None:
    """Serve until the process is told to end; with `router` as the first argument, route."""
    is_router = arguments[:1] == ["router"]
    module = "sglang_router.launch_router" if is_router else "sglang.launch_server"
    if not is_router:
        if "--enable-http2" in arguments:
            raise SystemExit("servers.extra_args: --enable-http2 serves without the guard that asks for the run's key")
        _guard_uvicorn()
    # In one argument: a key that begins with a dash would be taken for an option.
    sys.argv = [module, *arguments[is_router:], f"--api-key={own_key()}"]
    runpy.run_module(module, run_name="__main__")


def _guard_uvicorn() -> None:
    """Put the guard before whatever is served: SGLang's own key leaves the routes after its health open, one of which
    generates, which crashes the server while its memory is being released."""
    config: Any = importlib.import_module("uvicorn").Config  # by name: not installed where this file is type-checked
    load = config.load

    def load_guarded(self: Any) -> None:
        load(self)
        self.loaded_app = ServerGuard(self.loaded_app)

    config.load = load_guarded


if __name__ == "__main__":
    main(sys.argv[1:])
