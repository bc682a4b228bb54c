"""What goes wrong with a request: a status, a code for programs, and words for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

CODES: Mapping[str, HTTPStatus] = {
    "malformed": HTTPStatus.BAD_REQUEST,
    "unauthorized": HTTPStatus.UNAUTHORIZED,
    "cross_origin": HTTPStatus.FORBIDDEN,
    "not_found": HTTPStatus.NOT_FOUND,
    "method_not_allowed": HTTPStatus.METHOD_NOT_ALLOWED,
    "upload_timeout": HTTPStatus.REQUEST_TIMEOUT,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unsupported_media_type": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "wrong_host": HTTPStatus.MISDIRECTED_REQUEST,
    "invalid_request": HTTPStatus.UNPROCESSABLE_ENTITY,
    "class_names": HTTPStatus.UNPROCESSABLE_ENTITY,
    "unreadable_image": HTTPStatus.UNPROCESSABLE_ENTITY,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
    "model_failed": HTTPStatus.INTERNAL_SERVER_ERROR,
    "busy": HTTPStatus.SERVICE_UNAVAILABLE,
    "not_ready": HTTPStatus.SERVICE_UNAVAILABLE,
    "timeout": HTTPStatus.GATEWAY_TIMEOUT,
}
"""Every code that an answer may have, and its status."""

RETRY_SECONDS = 1


@dataclass(frozen=True)
class Detail:
    """One thing that is wrong: `where` is a place in the request, such as `images[2]` or `class_names`."""

    where: str
    message: str


@dataclass(eq=False)
class Problem(Exception):  # noqa: N818 - an answer, more than an error of ours
    """A request that is not answered, and why.

    Attributes:
        code: one of `CODES`.
        message: what is wrong, what is allowed, what to do.
        details: the same for each part that is wrong, where there are several.
        headers: HTTP headers beside the usual ones.
    """

    code: str
    message: str
    details: Sequence[Detail] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """The HTTP status that goes with the code."""
        return int(CODES[self.code])

    def answer(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        details = [{"where": detail.where, "message": detail.message} for detail in self.details]
        return {"error": {"code": self.code, "message": self.message, "details": details}}

    def all_headers(self) -> dict[str, str]:
        """The headers of the answer that go with the problem."""
        later = {"Retry-After": str(RETRY_SECONDS)} if self.status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        return {**later, **self.headers}


def busy(what: str) -> Problem:
    """The problem of a server that has enough to do."""
    return Problem("busy", f"the server is busy: {what}; send the request again in a moment")
