"""What every HTTP application of ours has: the guard, errors as JSON, /healthz, /v1/stats and the page /docs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from .http_guard import Guard, Limits, bearer_token, error_json
from .http_page import page
from .service_request import ServiceError


class ErrorAnswer(BaseModel):
    error: str = Field(description="what is wrong, and what to do")
    fields: list[str] = Field(default=[], description="where in the request, such as hypotheses.0.1.box")


def errors(own: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """The statuses that an address of the application answers with, for its schema."""
    texts = {
        400: "not JSON, or no JSON by its Content-Type",
        401: "no token, or a wrong one",
        408: "the body came too slowly",
        429: "too many requests of this client at a time; Retry-After says when to come again",
        503: "the service is full, or too slow; Retry-After says when to come again",
    }
    return {status: {"description": text, "model": ErrorAnswer} for status, text in sorted({**texts, **own}.items())}


def guarded_app(
    config: Limits, title: str, description: str, stats: Callable[[], dict[str, Any]], uploads: str | None = None, lifespan: Any = None
) -> FastAPI:
    """An application to add addresses to. Raises UnsafeServer where it would let others in without a token.

    stats: what /v1/stats tells beside its counts; called in a thread. uploads: the address to which large bodies are posted.
    """
    token = bearer_token(config)
    in_flight: Counter[str] = Counter()
    answers: Counter[int] = Counter()
    app = FastAPI(title=title, description=description, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Guard, config=config, token=token, in_flight=in_flight, answers=answers, uploads=uploads)
    app.add_exception_handler(ServiceError, lambda _, error: _answer(error))
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers; needs no token."""
        return {"status": "ok"}

    @app.get("/v1/stats", responses={401: errors({})[401]})
    async def counts() -> dict[str, Any]:
        """Counts since the start."""
        return {
            "in_flight": in_flight.total(),
            "answers": {str(status): count for status, count in sorted(answers.items())},
            **await asyncio.to_thread(stats),
        }

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"})

    return app


def _answer(error: ServiceError, **more: Any) -> Response:
    text, headers = error_json(error, **more)
    return Response(text, error.status, headers)


def _validation_error(request: Request, error: RequestValidationError) -> Response:
    found = error.errors()[:20]
    inner = {q["loc"][:n] for q in found for n in range(len(q["loc"]))}
    problems = [p for p in found if p["loc"] not in inner]  # a list with a wrong item also counts as too short
    first = problems[0]
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if first["type"] == "json_invalid":
        return _answer(ServiceError(400, f"not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"))
    if first["loc"] == ("body",) and (first["type"] == "missing" or not kind.endswith("json")):
        return _answer(ServiceError(400, "send a JSON object, with the header `Content-Type: application/json`"))
    fields = [".".join(str(part) for part in p["loc"][1:])[:200] for p in problems]
    return _answer(ServiceError(422, f"{fields[0] or 'the request'}: {first['msg'].removeprefix('Value error, ')}"), fields=fields)


def _http_error(request: Request, error: HTTPException) -> Response:
    """Errors of the framework: no such address, a method that it does not have, a body that cannot be read as JSON."""
    known = {400: "the body cannot be read as JSON", 404: "no such address; GET /docs lists them", 405: f"{request.method} is not possible here"}
    response = _answer(ServiceError(error.status_code, known.get(error.status_code, str(error.detail))))
    response.headers.update(error.headers or {})
    return response
