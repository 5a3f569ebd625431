"""Errors of the server in OpenAI's form. Their texts are our own, without a path or an address."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error of one HTTP request: status, a message for its sender, the parameter and OpenAI's code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """Return the object that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return it as an answer to the client."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


class ClientGoneError(Exception):
    """The client has hung up; nobody reads an answer."""


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of status 400."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, status: int = 503, seconds: int = 1) -> ApiError:
    """Return the error of a server that cannot take the request now; seconds: when to try again."""
    return ApiError(status, message, headers={"Retry-After": str(seconds)})
