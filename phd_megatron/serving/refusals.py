"""What a client is told when a request cannot be answered: a status, and OpenAI's error object."""

from __future__ import annotations

from phd_megatron.errors import UserError

#: what OpenAI calls the kind of an error, by HTTP status
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(UserError):
    """A request that is refused: value, reason, cure, and how HTTP and OpenAI's clients call it.

    Attributes:
        status: of HTTP; the client's fault below 500.
        param: field of the request at fault.
        code: a word for programs.
        retry_after: seconds after which another try may go through.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def stopping() -> Refusal:
    """The server is going away."""
    return Refusal(
        "the server is stopping and takes no new requests; send it to another one, or again when it is back",
        status=503,
        code="stopping",
        retry_after=5,
    )
