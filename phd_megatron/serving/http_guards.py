"""What stands before the routes: the key, the size of a body, and the count of requests."""

from __future__ import annotations

import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phd_megatron.serving.metrics import Metrics
from phd_megatron.serving.refusals import Refusal

#: paths that are counted by name; a client may ask for any other
PATHS = frozenset({"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"})


class Guards:
    """An ASGI application around another one.

    Args:
        api_key: that paths below ``/v1`` ask for; None asks for none.
        max_body_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, max_body_bytes: int) -> None:
        self._app, self._metrics, self._key, self._most = app, metrics, api_key, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                path = scope["path"] if scope["path"] in PATHS else "other"
                self._metrics.answered(path, message["status"])
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._limited(receive), counted)
        except Refusal as refusal:
            if begun:
                raise
            await _answer(refusal, counted)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is not None and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                said = "is not this server's" if given else "is not there"
                raise Refusal(
                    f"the API key {said}; send it in the header Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal(
            f"the body has more than the {self._most:,} bytes of --max-body-bytes; send less",
            status=413,
            code="too_large",
        )

    def _limited(self, receive: Receive) -> Receive:
        """A body without a length is counted while it comes."""
        got = 0

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._most:
                raise self._too_large()
            return message

        return limited


async def _answer(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body()).encode()
    headers = {"Content-Type": "application/json", "Connection": "close", **refusal.headers()}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
