"""From what was raised to what the client is told: a status and {"error": {"code", "message", "field"}}. Never a stack trace, never the input.

One table for plain answers, lines of a batch and events of a stream.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.records import Reason
from mulcot_ray.serving.guards import Refused, error
from mulcot_ray.serving.leaving import Left
from mulcot_ray.serving.schemas import Fault

TEXT_FAULTS = (Reason.EMPTY_TEXT, Reason.PROMPT_TOO_LONG)

log = logging.getLogger("ray.serve")  # Serve writes this logger, and no other, to the replica's log file


def describe(e: BaseException) -> tuple[int, Fault, Mapping[str, str]]:
    """Status, body and headers for whatever was raised."""
    match e:
        case Refused():
            return e.status_code, Fault(code=e.code, message=str(e.detail), field=e.field), e.headers or {}
        case RowFault():
            field = "text" if e.reason in TEXT_FAULTS else "image" if e.reason is Reason.BAD_VALUE or e.reason.startswith("image_") else None
            code = "engine_refused" if e.reason is Reason.ENGINE_ERROR else str(e.reason)
            return 422, Fault(code=code, message=e.detail, field=field), {}
        case EngineError():
            log.error("engine: %s", e)
            return 503, Fault(code="engine_error", message="the engine is not available; it is being restarted"), {"Retry-After": "10"}
        case TimeoutError():
            return 504, Fault(code="timeout", message="no answer within the time limit"), {}
        case Left():
            return 499, Fault(code="client_left", message="the client closed the connection"), {}
        case HTTPException():
            return e.status_code, Fault(code=HTTPStatus(e.status_code).name.lower(), message=str(e.detail)), e.headers or {}
    log.error("internal", exc_info=e)
    return 500, Fault(code="internal", message="an error on our side; it is in the server's log"), {}


def invalid(e: ValidationError | RequestValidationError) -> Refused:
    """What pydantic found, without the input: it may be a whole picture. The first fault names the field."""
    found = [(".".join(map(str, x["loc"]))[:100], str(x["msg"]).removeprefix("Value error, ")) for x in e.errors()]
    if e.errors()[0]["type"] == "json_invalid":
        return Refused(400, "invalid_json", f"not JSON: {e.errors()[0]['ctx']['error']}")
    return Refused(422, "invalid_request", "; ".join(f"{f}: {m}" if f else m for f, m in found[:8]), found[0][0] or None)


def add_handlers(api: FastAPI) -> None:
    async def answer(_: Request, e: Exception) -> JSONResponse:
        status, fault, headers = describe(invalid(e) if isinstance(e, RequestValidationError) else e)
        return error(status, fault.code, fault.message, fault.field, headers)

    for kind in (RowFault, RequestValidationError, HTTPException, EngineError, TimeoutError, Left, Exception):
        api.add_exception_handler(kind, answer)
