"""A server's life: it listens, and at a signal takes nothing new, finishes what runs, and ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from phd_megatron.errors import UserError
from phd_megatron.serving.engine import Engine

_LOOK = 0.05  #: seconds between two looks at what still runs
_LAST_BYTES = 5  #: seconds for connections to close


def listening(host: str, port: int) -> socket.socket:
    """A socket of that address, which takes no connections yet; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: it must be at least 0 (any free one) and at most 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host!r} is no address here ({error}); use one of this machine's") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise UserError(
            f"{host}:{port} cannot be listened on ({error.strerror}); use another --port, or --port 0 for a free one"
        ) from error
    return found


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are heard below: uvicorn would close the door at once, where waiting clients are to be told."""
        yield


def serve(
    app: ASGIApp, engine: Engine, place: socket.socket, shutdown_seconds: float, ready: Callable[[], None]
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; a second one does not wait for what runs.

    Args:
        shutdown_seconds: for rows that run and wait when the signal comes.
        ready: called when connections are taken.
    """
    try:
        asyncio.run(_serve(app, engine, place, shutdown_seconds, ready))
    finally:
        engine.stop()
        place.close()


async def _serve(
    app: ASGIApp, engine: Engine, place: socket.socket, shutdown_seconds: float, ready: Callable[[], None]
) -> None:
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=_LAST_BYTES, ws="none"
    )
    server, signals = _Server(config), 0
    asked = asyncio.Event()

    def stop() -> None:
        nonlocal signals
        signals += 1
        asked.set()

    loop = asyncio.get_running_loop()
    heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if _is_heard(number)]
    for number in heard:
        loop.add_signal_handler(number, stop)
    running = asyncio.create_task(server.serve(sockets=[place]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(_LOOK / 10)
        if not running.done():
            ready()
        waiting = asyncio.create_task(asked.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        engine.drain()
        end = time.monotonic() + shutdown_seconds
        while signals < 2 and time.monotonic() < end and (engine.running or engine.waiting):
            await asyncio.sleep(_LOOK)
        await asyncio.to_thread(engine.stop)
        server.should_exit = True
        await running
    finally:
        for number in heard:
            loop.remove_signal_handler(number)


def _is_heard(number: int) -> bool:
    """``nohup`` has SIGHUP ignored."""
    return signal.getsignal(number) != signal.SIG_IGN
