"""Responses to what ends a request over HTTP: errors of the shared table, and Tornado's own."""

import tornado.web

from server.protocols.errors import INTERNAL, ErrorStatus, answer_to

HTTP_ERRORS: dict[int, ErrorStatus] = {
    400: ErrorStatus(
        400, "invalid_request", "not a valid HTTP request: check its headers and body"
    ),
    404: ErrorStatus(404, "not_found", "no such page: POST an image to /caption, or see /"),
    405: ErrorStatus(405, "method_not_allowed", "this method is not served here: see /"),
    431: ErrorStatus(431, "head_too_large"),
}


def http_answer(error: BaseException | None, status_code: int) -> ErrorStatus:
    """The response to an error. status_code: of errors that are Tornado's, and where there is none;
    INTERNAL for those without an entry.
    """
    if error is None or isinstance(error, tornado.web.HTTPError):
        return HTTP_ERRORS.get(status_code, INTERNAL)
    return answer_to(error)
