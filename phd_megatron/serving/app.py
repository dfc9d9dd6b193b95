"""The routes: OpenAI's ``/v1``, ``/health`` and ``/metrics``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from phd_megatron.config.plain import Json
from phd_megatron.serving.engine import Engine
from phd_megatron.serving.http_guards import Guards
from phd_megatron.serving.jobs import Job, job_of
from phd_megatron.serving.metrics import Metrics
from phd_megatron.serving.refusals import Refusal, stopping
from phd_megatron.serving.requests import ChatRequest, CompletionRequest, parsed
from phd_megatron.serving.row import Piece
from phd_megatron.serving.served import Served

_HUNG_UP = 499  #: nobody reads this status; the count of requests does


def make_app(served: Served, engine: Engine, metrics: Metrics, api_key: str | None = None) -> Guards:
    """The ASGI application of one model.

    Args:
        api_key: that ``/v1`` asks for.
    """
    app = FastAPI(title="phd-megatron", openapi_url=None, docs_url=None, redoc_url=None)
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        if not engine.is_well:
            return _refused(stopping())
        return JSONResponse({"status": "ok", "running": engine.running, "waiting": engine.waiting})

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(served, engine, started)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != served.name:
            raise Refusal(f"model={name[:200]!r} is not served here; this server has {served.name!r}", status=404)
        return JSONResponse(_model(served, engine, started))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, CompletionRequest, served, engine)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(request, ChatRequest, served, engine)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return _refused(refusal)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path[:200]}: {error.detail}; docs/serving.md has the paths"
        return _refused(Refusal(said, status=error.status_code))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_HUNG_UP)  # within its own body; nobody reads this

    return Guards(app, metrics, api_key, engine.limits.max_body_bytes)


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers())


def _model(served: Served, engine: Engine, started: int) -> Json:
    return {
        "id": served.name,
        "object": "model",
        "created": started,
        "owned_by": "phd-megatron",
        "max_model_len": engine.limits.max_model_len,
        "chat": served.has_template,
    }


class _Mailbox:
    """Takes pieces on the engine's thread and gives them in the loop's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def put(self, index: int, piece: Piece) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop is closed, and so is every connection
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def pieces(self, job: Job) -> AsyncIterator[tuple[int, Piece]]:
        """All pieces of a job, each added to its answer.

        Raises:
            Refusal: a row ended without an answer.
        """
        left = len(job.rows)
        while left:
            index, piece = await self._queue.get()
            if piece.error is not None:
                raise piece.error
            job.answers[index].add(piece)
            left -= piece.is_last
            yield index, piece


async def _answer(
    request: Request, kind: type[CompletionRequest] | type[ChatRequest], served: Served, engine: Engine
) -> Response:
    asked = parsed(kind, await request.body())
    mailbox = _Mailbox()
    job = await asyncio.to_thread(job_of, asked, served, engine.limits, mailbox.put)
    engine.submit(job.rows)
    if job.streams:
        return _Stream(job, mailbox, engine)
    try:
        return await _whole(request, job, mailbox)
    finally:
        engine.cancel(job.rows)


async def _whole(request: Request, job: Job, mailbox: _Mailbox) -> Response:
    async def collected() -> None:
        async for _ in mailbox.pieces(job):
            pass

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.create_task(collected()), asyncio.create_task(hung_up())
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return Response(status_code=_HUNG_UP)
        reading.result()  # raises what it did
        return JSONResponse(await asyncio.to_thread(job.replies.whole, job.answers))
    finally:
        for task in (reading, leaving):
            task.cancel()


class _Stream(StreamingResponse):
    """Server-sent events; a client that hangs up at any moment takes its rows out of the batch."""

    def __init__(self, job: Job, mailbox: _Mailbox, engine: Engine) -> None:
        super().__init__(
            self._events(job, mailbox), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._job, self._engine = job, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.cancel(self._job.rows)

    @staticmethod
    async def _events(job: Job, mailbox: _Mailbox) -> AsyncIterator[bytes]:
        for index in range(len(job.rows)):
            if (opening := job.replies.opening(index)) is not None:
                yield _event(opening)
        try:
            async for index, piece in mailbox.pieces(job):
                yield _event(job.replies.chunk(index, job.answers[index], piece, job.tells_usage))
        except Refusal as refusal:  # the status is sent, so it is told in the stream
            yield _event({**refusal.body()})
            return
        if job.tells_usage:
            yield _event(job.replies.closing(job.answers))
        yield b"data: [DONE]\n\n"


def _event(content: Json) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
