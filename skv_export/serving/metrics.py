"""What Prometheus reads: requests, tokens, times, and how long the queue is."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from skv_export.runtime.text import Generation
from skv_export.serving.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        engine: Its queue and slots are looked at when the metrics are read.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("skv_requests", "Answers, by path and status.", ["path", "status"], registry=registry)
        self._prompt = Counter("skv_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("skv_cached_prompt_tokens", "Those of them that did not have to run.", registry=registry)
        self._new = Counter("skv_generated_tokens", "Generated tokens.", registry=registry)
        self._gone = Counter("skv_abandoned_requests", "Clients that went away.", registry=registry)
        self._first = Histogram(
            "skv_time_to_first_token_seconds", "With the time in the queue.", buckets=_SECONDS, registry=registry
        )
        self._whole = Histogram(
            "skv_request_seconds", "From the request to its last token.", buckets=_SECONDS, registry=registry
        )
        for name, what, value in (
            ("skv_slots", "Requests that can run at the same time.", lambda: engine.slots),
            ("skv_waiting_requests", "Requests in the queue.", lambda: engine.waiting),
            ("skv_running_requests", "Requests that run.", lambda: engine.running),
            ("skv_cache_tokens", "Tokens in the slots' caches.", lambda: engine.held_tokens),
            ("skv_kept_bytes", "Bytes kept for prompts that begin like earlier ones.", lambda: engine.kept_bytes),
        ):
            Gauge(name, what, registry=registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        """Counts an answer; a path that nobody serves counts as ``other``."""
        known = next((each for each in _PATHS if path == each or path.startswith(f"{each}/")), "other")
        self._requests.labels(known, str(status)).inc()

    def first(self, seconds: float) -> None:
        """Notes how long a first event took."""
        self._first.observe(seconds)

    def done(self, figures: Generation, seconds: float) -> None:
        """Notes a finished request."""
        self._whole.observe(seconds)
        self._prompt.inc(figures.prompt_tokens)
        self._cached.inc(figures.cached_tokens)
        self._new.inc(len(figures.tokens))

    def abandoned(self) -> None:
        """Counts a client that went away."""
        self._gone.inc()

    def exposition(self) -> tuple[str, str]:
        """Returns the metrics as text, and its media type."""
        return generate_latest(self._registry).decode(), CONTENT_TYPE_LATEST
