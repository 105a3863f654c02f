"""`python -m server`: read the settings, take the port, serve until told to stop.

Exit codes: 0 stopped in good order, 64 settings, 65 model, 69 port, 70 the engine ended, 80 the device
failed, 81 the engine stalled, 82 the weights changed, 83 work was abandoned after GRAM_DRAIN_S. The last line on
stderr says why.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from gram_core.errors import DeviceError, GramError, WeightsChanged
from server.app import create_app
from server.logs import last_words, log_to_stderr
from server.service import Service
from server.settings import InvalidSettings, Settings, read_settings, usage
from server.wire import http_config

OK, BAD_SETTINGS, BAD_MODEL, NO_PORT, ENGINE_ENDED = 0, 64, 65, 69, 70
DEVICE_FAILED, STALLED, WEIGHTS_CHANGED, ABANDONED = 80, 81, 82, 83
SPARE_FILES = 256  # beside connections: the model, the log, the pools
WAIT_QUIETLY = ("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads would hold the cores that decode and answer
LAST_RESORT_S = 2.0  # a process whose device is broken may hang on its way out

log = logging.getLogger("server")


class Server(uvicorn.Server):
    """uvicorn's server, with an exit code, and with a second signal that means now."""

    code = OK

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        service.engine.on_ready = settle
        service.engine.on_end = self.engine_ended
        service.engine.on_stall = self.engine_stalled

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """First signal: not ready any more, and after GRAM_DRAIN_DELAY_S finish what was admitted. Second: leave."""
        if self.service.leaving:
            os._exit(128 + sig)
        self.service.leaving = True
        delay = self.service.settings.drain_delay_s
        if delay > 0 and self.started:
            later = threading.Timer(delay, self.drain)
            later.daemon = True
            later.start()
        else:
            self.drain()

    def drain(self) -> None:
        """Take no new work, and end when there is none left."""
        self.service.draining = True
        self.should_exit = True

    def engine_ended(self, error: BaseException) -> None:
        """Called from the engine's thread: nothing more can be answered."""
        self.code = code_of(error)
        leave_soon(lambda: self.code)
        self.should_exit = True

    def engine_stalled(self) -> None:
        """Called from the watchdog."""
        give_up(self.service.settings.stall_s)


def code_of(error: BaseException) -> int:
    """The exit code that says what ended the engine."""
    if isinstance(error, DeviceError):
        return DEVICE_FAILED
    if isinstance(error, WeightsChanged):
        return WEIGHTS_CHANGED
    return BAD_MODEL if isinstance(error, GramError) else ENGINE_ENDED


def why(failure: BaseException | None) -> str:
    """What ended the engine, in one line."""
    return failure.message if isinstance(failure, GramError) else "the engine ended; its traceback is above"


def leave_soon(code: Callable[[], int]) -> None:
    """End the process after a moment for the answers that are on their way; what `code` writes is the last line."""
    last = threading.Timer(LAST_RESORT_S, lambda: os._exit(code()))
    last.daemon = True
    last.start()


def give_up(seconds: float) -> NoReturn:
    """End the process now: a thread that is stuck in a driver can't be stopped, only the process can."""
    last_words(STALLED, f"the engine showed no life for {seconds:g} s (GRAM_STALL_S)")
    sys.stderr.flush()
    os._exit(STALLED)


def main(argv: Sequence[str]) -> int:
    """Run the server; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(usage())
        return OK
    try:
        settings = read_settings(argv)
    except InvalidSettings as error:
        return last_words(BAD_SETTINGS, str(error))
    log_to_stderr(settings.log_level, settings.log_format)
    os.environ.setdefault(*WAIT_QUIETLY)  # read when torch is imported, which is later
    _allow_files(settings)
    try:
        port = bind(settings)
    except OSError as error:
        return last_words(NO_PORT, f"can't listen on {settings.host}:{settings.port}: {error.strerror}")
    with port:
        try:
            fetch_model(settings)
        except GramError as error:
            return last_words(BAD_MODEL, error.message)
        try:
            app = create_app(settings)
        except InvalidSettings as error:  # what a setting names can't be used
            return last_words(BAD_SETTINGS, str(error))
        return serve(app, settings, port)


def settle() -> None:
    """What is loaded stays: let the garbage collector, which stops everyone, never look at it again."""
    gc.collect()
    gc.freeze()


def serve(app: FastAPI, settings: Settings, port: socket.socket) -> int:
    """Answer on a bound socket until a signal or the end of the engine; returns the exit code."""
    service: Service = app.state.service
    server = Server(http_config(app, settings), service)
    host, number = port.getsockname()[:2]
    if (keys := service.guard.keys) is not None:
        signal.signal(signal.SIGHUP, lambda *_: keys.reload())
    for sig in (signal.SIGTERM, signal.SIGINT):  # uvicorn takes them too, a moment after the next line
        signal.signal(sig, server.handle_exit)
    try:
        port.listen(settings.max_connections)  # now, so that whoever reads the next line can connect
    except OSError as error:  # another process bound it as well and was first to listen
        return last_words(NO_PORT, f"can't listen on {host}:{number}: {error.strerror}")
    log.info("listening", extra={"fields": {"host": host, "port": number}})
    server.run(sockets=[port])
    if server.code != OK:
        return last_words(server.code, why(service.engine.failure))
    if not service.engine.idle:
        return last_words(ABANDONED, f"work was still unfinished after {settings.drain_s} s (GRAM_DRAIN_S)")
    log.info("stopped", extra={"fields": {"code": OK}})
    return OK


def bind(settings: Settings) -> socket.socket:
    """Take the address; raises OSError where that can't be."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    port = socket.socket(family, kind, protocol)
    try:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(address)
    except OSError:
        port.close()
        raise
    return port


def _allow_files(settings: Settings) -> None:
    """As many open files as the connections need, where the system lets us: most start a process with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def fetch_model(settings: Settings) -> None:
    """Make a model of the hub present on disk; raises ModelUnavailable."""
    if "/" not in settings.model or Path(settings.model).is_dir():
        return  # a bundled model or a folder: there is nothing to fetch, and torch can wait
    from gram_core.backbone import fetch

    fetch(settings.model, settings.model_dir, settings.offline)


def run(argv: Sequence[str]) -> NoReturn:
    """`main`, and the end of the process: the engine's thread may still be loading, or be stuck in a driver."""
    code = main(argv)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(sys.argv[1:])
