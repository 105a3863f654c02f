"""The envelope of every error, and the only mapping from error codes to HTTP statuses.

Messages are our own sentences and numbers: never the caller's input and never an exception's text.
"""

from __future__ import annotations

import json

from gram_core.errors import DeviceError, GramError, OutOfMemory

STATUS = {
    "malformed_body": 400,
    "invalid_base64": 400,
    "unauthenticated": 401,
    "origin_not_allowed": 403,
    "not_found": 404,
    "class_set_not_found": 404,
    "session_not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "replay_mismatch": 409,
    "session_conflict": 409,
    "body_too_large": 413,
    "image_too_large": 413,
    "too_many_images": 413,
    "too_many_pixels": 413,
    "request_too_costly": 413,
    "unsupported_media_type": 415,
    "unsupported_image_format": 415,
    "host_not_allowed": 421,
    "invalid_request": 422,
    "bad_template": 422,
    "templates_not_allowed": 422,
    "duplicate_class": 422,
    "too_many_classes": 422,
    "class_text_too_long": 422,
    "method_unavailable": 422,
    "url_input_unsupported": 422,
    "undecodable_image": 422,
    "image_too_many_pixels": 422,
    "image_shape_unsupported": 422,
    "image_too_complex": 422,
    "overloaded": 429,
    "rate_limited": 429,
    "internal": 500,
    "class_sets_disabled": 501,
    "sessions_disabled": 501,
    "not_ready": 503,
    "draining": 503,
    "accelerator_failed": 503,
    "deadline_exceeded": 504,
}
RETRYABLE = frozenset({408, 429, 503, 504})
CLIENT_GONE = 499  # in logs and metrics only


class ApiError(Exception):
    """An answer that isn't 200: a code of `STATUS`, a sentence, and maybe the field it is about."""

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = STATUS[code]
        self.message = message
        self.param = param
        self.retry_after = retry_after if retry_after is not None or self.status not in (429, 503) else 1
        self.headers: dict[str, str] = {}
        if self.retry_after is not None:
            self.headers["retry-after"] = str(self.retry_after)

    def envelope(self, request_id: str) -> bytes:
        """The JSON body."""
        error = {
            "message": self.message,
            "type": _kind(self.status),
            "code": self.code,
            "param": self.param,
            "request_id": request_id,
            "retryable": self.status in RETRYABLE,
        }
        return json.dumps({"error": error}).encode()


class ClientGone(Exception):
    """The client left before its answer."""


def from_core(error: GramError, param: str | None = None) -> ApiError:
    """What the core refused, in the wire's terms; `param` is the field that the error's index counts in."""
    if isinstance(error, OutOfMemory):
        return ApiError("accelerator_failed", "the device ran out of memory for this request. Try again.")
    if isinstance(error, DeviceError):
        return ApiError("accelerator_failed", "the device failed; this process is being replaced.")
    if STATUS.get(error.code, 500) >= 500:
        return internal()
    if param is not None and error.index is not None:
        param = f"{param}.{error.index}"
    return ApiError(error.code, error.message, param=param)


def internal() -> ApiError:
    """A bug: the request id finds the traceback in the log."""
    return ApiError("internal", "an internal error; the log has the details under this request id.")


def _kind(status: int) -> str:
    if status == 429:
        return "overloaded_error"
    if status in (401, 403, 421):
        return "access_error"
    return "server_error" if status >= 500 else "invalid_request_error"
