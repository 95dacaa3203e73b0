"""The HTTP endpoints: models, chat completions, completions, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skv_export.errors import SkvError
from skv_export.runtime.text import Generation
from skv_export.serving.engine import BusyError, Engine, Event, Job, Piece, Request, Token
from skv_export.serving.metrics import Metrics
from skv_export.serving.schema import ChatBody, CompletionBody

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 4 << 20
_POLL_SECONDS = 0.2
_RETRY_SECONDS = 2


def create_app(
    engine: Engine, model: str, *, api_key: str | None = None, allowed_hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """Returns the application.

    Args:
        engine: Runs the requests; stopped when the application ends.
        model: The name that clients ask for.
        api_key: What they must present as a bearer token, except for health; None = nothing.
        allowed_hosts: Names in the Host header; ``*`` = any. On a loopback address it keeps web pages out, whose
            browsers would reach it under a name of their own.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="skv-export serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics(engine)
    app.add_middleware(_Guard, api_key=api_key, metrics=metrics)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    started = int(time.time())

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        refused = first["type"] == "extra_forbidden"
        message = f"{place}: {'not supported here' if refused else first['msg']}"
        return _error(400, message, place)

    @app.exception_handler(HTTPException)
    async def failed(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "stopping"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def exposition() -> PlainTextResponse:
        text, kind = metrics.exposition()
        return PlainTextResponse(text, media_type=kind)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(model, started)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name, model)
        return _model(model, started)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, http: HttpRequest) -> JSONResponse | StreamingResponse:
        _check_model(body.model, model)
        return await _respond(_Chat(engine, model), body, http)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, http: HttpRequest) -> JSONResponse | StreamingResponse:
        _check_model(body.model, model)
        return await _respond(_Completion(engine, model), body, http)

    async def _respond(
        form: _Form, body: ChatBody | CompletionBody, http: HttpRequest
    ) -> JSONResponse | StreamingResponse:
        try:
            run = _Run(engine, body.request(), metrics)
        except SkvError as error:
            raise HTTPException(400, str(error)) from error
        except BusyError:
            detail = "all places in the queue are taken"
            raise HTTPException(503, detail, {"Retry-After": str(_RETRY_SECONDS)}) from None
        if body.stream:
            first = await run.unless_gone(http)  # what is wrong with a request is said before a stream begins
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_stream(form, run, first, usage), media_type="text/event-stream")
        return JSONResponse(await _whole(form, run, http))

    return app


# A request on its way.


class _Run:
    """A job and its events, from the worker's thread into this loop."""

    def __init__(self, engine: Engine, request: Request, metrics: Metrics) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._metrics, self._waited, self._looked = metrics, False, time.monotonic()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.job: Job = engine.submit(request, deliver)

    async def next(self) -> Event:
        """The next event; errors are raised."""
        event = await self._events.get()
        if not self._waited:
            self._waited = True
            self._metrics.first(time.monotonic() - self.job.submitted)
        if isinstance(event, Generation):
            self._metrics.done(event, time.monotonic() - self.job.submitted)
        if isinstance(event, SkvError):
            code = "context_length_exceeded" if "total length" in event.what else None
            raise HTTPException(400, str(event), {"X-Error-Code": code} if code else None)
        if isinstance(event, Exception):
            raise HTTPException(500, "the request failed; the server's log says why")
        return event

    async def unless_gone(self, http: HttpRequest) -> Event:
        """The next event, unless the client has gone away."""
        waiting = asyncio.ensure_future(self.next())
        try:
            while True:
                await asyncio.wait([waiting], timeout=_POLL_SECONDS)
                if time.monotonic() - self._looked >= _POLL_SECONDS:
                    self._looked = time.monotonic()
                    if await http.is_disconnected():
                        self._metrics.abandoned()
                        raise HTTPException(499, "the client went away")
                if waiting.done():
                    return waiting.result()
        except BaseException:
            waiting.cancel()
            self.job.give_up()
            raise


async def _whole(form: _Form, run: _Run, http: HttpRequest) -> dict[str, Any]:
    """The response of a request without a stream."""
    text, tokens = "", list[Token]()
    while True:
        event = await run.unless_gone(http)
        if isinstance(event, Generation):
            return form.whole(text, tokens, event)
        assert isinstance(event, Piece)
        text += event.text
        tokens += event.tokens


async def _stream(form: _Form, run: _Run, first: Event, usage: bool) -> AsyncIterator[str]:
    """The chunks of a stream; however it ends, the job does too."""
    try:
        for chunk in form.begin():
            yield _line(chunk)
        event = first
        while not isinstance(event, Generation):
            assert isinstance(event, Piece)
            yield _line(form.piece(event))
            event = await run.next()
        yield _line(form.end(event))
        if usage:
            yield _line(form.chunk([], usage=_usage(event)))
        yield "data: [DONE]\n\n"
    except HTTPException as error:  # the headers are out: all that is left is to say it in the stream
        yield _line(_problem(error.status_code, str(error.detail)))
    finally:
        run.job.give_up()


def _line(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


# What responses look like.


class _Form(ABC):
    """The shapes that both endpoints share."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, engine: Engine, model: str) -> None:
        self._tokenizer = engine.session.tokenizer
        self._base = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._base, "object": self.chunk_kind, "choices": choices, **more}

    def whole(self, text: str, tokens: Sequence[Token], figures: Generation) -> dict[str, Any]:
        choice = {"index": 0, **self.content(text, tokens), "finish_reason": _finish(figures)}
        return {**self._base, "object": self.kind, "choices": [choice], "usage": _usage(figures)}

    @abstractmethod
    def content(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]: ...

    def begin(self) -> list[dict[str, Any]]:
        return []

    @abstractmethod
    def piece(self, piece: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def end(self, figures: Generation) -> dict[str, Any]: ...

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


class _Chat(_Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}, "logprobs": self._logprobs(tokens)}

    def begin(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self.chunk([{"index": 0, "delta": delta, "finish_reason": None}])]

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens)
        choice = {"index": 0, "delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None}
        return self.chunk([choice])

    def end(self, figures: Generation) -> dict[str, Any]:
        return self.chunk([{"index": 0, "delta": {}, "finish_reason": _finish(figures)}])

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not tokens:
            return None
        entries = [
            {**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*each) for each in t.top]} for t in tokens
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class _Completion(_Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def content(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(tokens)}

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self.chunk([{"index": 0, **self.content(piece.text, piece.tokens), "finish_reason": None}])

    def end(self, figures: Generation) -> dict[str, Any]:
        return self.chunk([{"index": 0, "text": "", "logprobs": None, "finish_reason": _finish(figures)}])

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not tokens:
            return None
        return {
            "tokens": [self._text(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self._text(i): logprob for i, logprob in t.top} for t in tokens],
            "text_offset": [],
        }


def _finish(figures: Generation) -> str:
    return "stop" if figures.stop_reason in ("eos", "stop") else "length"


def _usage(figures: Generation) -> dict[str, Any]:
    prompt, new = figures.prompt_tokens, len(figures.tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": figures.cached_tokens},
    }


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "skv_export"}


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise HTTPException(404, f"model {asked!r}: not served here; {served!r} is")


def _problem(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    rest = dict(headers or {})
    code = rest.pop("X-Error-Code", "model_not_found" if status == 404 else None)
    return JSONResponse(_problem(status, message, param, code), status, rest)


class _Guard:
    """Before the application: the key, the body's type and size; and it counts what was answered."""

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self._app, self._key, self._metrics = app, api_key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, read = scope["path"], 0
        headers = {name.lower(): value for name, value in scope["headers"]}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(path, message["status"])
            await send(message)

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise HTTPException(413, f"a body of more than {MAX_BODY_BYTES} bytes")
            return message

        refusal = self._refusal(path, scope["method"], headers)
        if refusal is not None:
            await refusal(scope, receive, counted)
            return
        await self._app(scope, limited, counted)

    def _refusal(self, path: str, method: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if self._key is not None and path != "/health" and not hmac.compare_digest(given, self._key.encode()):
            return _error(401, "the API key is missing or wrong", headers={"WWW-Authenticate": "Bearer"})
        if method == "POST" and not headers.get(b"content-type", b"").startswith(b"application/json"):
            return _error(415, "the body must be application/json")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _error(413, f"a body of more than {MAX_BODY_BYTES} bytes")
        return None
