"""Every refusal and failure in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from agent.errors import AgentError, WorkerRefused
from agent.http.collaborators import ServiceFailure
from agent.http.paths import is_inference
from agent.http.reasons import WORDS
from agent.mode import Refused

LOG = logging.getLogger(__name__)

# code of a service -> status, OpenAI's type, code for the client, seconds until a retry makes sense (0: none)
FAILURES: dict[str, tuple[int, str, str, float]] = {
    "invalid": (400, "invalid_request_error", "invalid_value", 0),
    "context_length_exceeded": (400, "invalid_request_error", "context_length_exceeded", 0),
    "unknown_model": (404, "invalid_request_error", "model_not_found", 0),
    "unknown_camera": (404, "invalid_request_error", "camera_not_found", 0),
    "busy": (429, "rate_limit_error", "busy", 1),
    "not_ready": (503, "server_error", "not_ready", 5),
    "worker_lost": (503, "server_error", "worker_lost", 2),
    "cancelled": (503, "server_error", "cancelled", 1),
    "deadline": (504, "server_error", "deadline", 1),
}
UNEXPECTED = (500, "server_error", "internal_error", 0.0)


class ApiError(HTTPException):
    """An answer with an error status. `param` names the field of the request that is at fault.

    It is an HTTPException because FastAPI lets only those through when they are raised while it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message = message
        self.type = type_
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status_code, headers=self.headers)


# DeepSeek calls these 422 and keeps 400 for bodies that are no request at all: https://api-docs.deepseek.com/quick_start/error_codes
PARAMETER_FAULTS = frozenset({"invalid_value", "unsupported_parameter", "unknown_parameter", "missing_required_parameter"})


def answer_of(error: ApiError, scope: Scope) -> JSONResponse:
    """The answer for an error, with the status that clients of this base URL know: OpenAI's under /v1, DeepSeek's elsewhere."""
    response = error.response()
    if error.status_code == 400 and error.code in PARAMETER_FAULTS and is_inference(scope) and not scope["path"].startswith("/v1/"):
        response.status_code = 422
    return response


def unsupported(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def invalid(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def failed(failure: AgentError) -> ApiError:
    """The answer for a failure that a service reported."""
    reason = failure.reason if isinstance(failure, (ServiceFailure, WorkerRefused)) else failure.code
    status, type_, code, retry_s = FAILURES.get(reason, UNEXPECTED)
    if retry_s and isinstance(failure, (ServiceFailure, WorkerRefused)) and failure.retry_after_s is not None:
        retry_s = failure.retry_after_s or retry_s
    headers = {"Retry-After": retry_after(retry_s)} if retry_s else {}
    param = "model" if code == "model_not_found" else None
    return ApiError(status, str(failure), type_=type_, param=param, code=code, headers=headers)


def refused(refusal: Refused) -> ApiError:
    """503 with what a balancer and a person need to know: when to ask again, the mode, the reason."""
    return ApiError(
        503,
        f"this node does not serve now (mode {refusal.mode}): {WORDS[refusal.reason]}",
        type_="server_error",
        code="not_serving",
        headers={"Retry-After": retry_after(refusal.retry_after_s), "X-Hotspare-Mode": refusal.mode},
    )


def retry_after(seconds: float) -> str:
    """Retry-After takes whole seconds (RFC 9110, 10.2.3); rounded up, at least 1."""
    return str(max(1, math.ceil(seconds)))


def fault_of(errors: Sequence[Any], body: Any) -> ApiError:
    """One fault of those that validation found, with the path as OpenAI writes it: `messages[2].content`."""
    fault = _most_telling(errors)
    source, *path = fault["loc"]
    if fault["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if fault["type"] in ("missing", "model_attributes_type", "model_type", "dict_type") and not path:
        return ApiError(400, "the body must be a JSON object sent as application/json", code="invalid_json")
    param = _path(path, body, fault["type"] == "missing") if source == "body" else ".".join(map(str, path))
    if fault["type"] == "missing":
        return ApiError(400, f"{param}: this field is required", param=param, code="missing_required_parameter")
    return invalid(param or None, f"{param or 'body'}: {fault['msg']}"[:500])


def _most_telling(errors: Sequence[Any]) -> Any:
    """Where a field takes several forms, validation complains once for each: the form that was meant fails later than on its type."""
    first = errors[0]["loc"][1:2]
    faults = [fault for fault in errors if fault["loc"][1:2] == first]
    return min(faults, key=lambda fault: (fault["type"].endswith("_type"), -len(fault["loc"])))


def _path(path: Sequence[str | int], body: Any, is_missing: bool) -> str:
    """Pydantic mixes the branches of unions into the path; only what can be found in the body is part of it."""
    text = ""
    for position, part in enumerate(path):
        if not isinstance(body, (dict, list)):
            break
        is_last_missing = is_missing and position == len(path) - 1
        try:
            body = None if is_last_missing else body[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def install(app: FastAPI) -> None:
    """Make `app` answer every error in this shape."""

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        return answer_of(error if isinstance(error, ApiError) else ApiError(500, "unexpected"), request.scope)

    async def service_failure(request: Request, error: Exception) -> JSONResponse:
        return answer_of(failed(error) if isinstance(error, AgentError) else ApiError(500, "unexpected"), request.scope)

    async def not_valid(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            return ApiError(500, "unexpected").response()
        return answer_of(fault_of(error.errors(), error.body), request.scope)

    async def no_route(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        words = {404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        message = words.get(status) or (str(error.detail) if isinstance(error, HTTPException) else "unexpected")
        code = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed"}.get(status)
        if status == 400 and isinstance(error.__cause__, (UnicodeError, RecursionError)):  # what the framework does not take for bad JSON
            message, code = "the body is not valid JSON", "invalid_json"
        return ApiError(status, message[:500], code=code, headers=headers).response()

    async def our_bug(_: Request, error: Exception) -> JSONResponse:
        words = "the node failed on this request; its log has the cause"
        return ApiError(500, words, type_="server_error", code="internal_error").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(AgentError, service_failure)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, our_bug)
