"""Refusals: what is wrong with a request, with its status in HTTP and in gRPC."""

from __future__ import annotations

from http import HTTPStatus


class Refusal(Exception):
    """A request that is not answered; its text is sent to the client."""

    status = HTTPStatus.BAD_REQUEST
    code = "INVALID_ARGUMENT"  # of gRPC


class Unauthorized(Refusal):
    """The bearer token is missing or wrong."""

    status = HTTPStatus.UNAUTHORIZED
    code = "UNAUTHENTICATED"


class NotServed(Refusal):
    """The model, or this version of it, is not served here."""

    status = HTTPStatus.NOT_FOUND
    code = "NOT_FOUND"


class TooLarge(Refusal):
    """The body is larger than the limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "RESOURCE_EXHAUSTED"


class Incomplete(Refusal):
    """The request did not arrive whole in time."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "DEADLINE_EXCEEDED"


class Draining(Refusal):
    """The server is about to end."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "UNAVAILABLE"


class Damaged(Refusal):
    """A file of the package differs from its hash."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "UNAVAILABLE"


class Overloaded(Refusal):
    """Too many requests wait already."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "UNAVAILABLE"
