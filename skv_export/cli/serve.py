"""The command `skv-export serve`: an exported model behind OpenAI's endpoints, on this machine."""

from __future__ import annotations

import ipaddress
from typing import Any

import click

from skv_export.cli.options import Number, Provider, debug_option, exported_model
from skv_export.errors import SkvError, require_module

DEFAULT_SLOTS = 4
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


@click.command("serve")
@exported_model
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--api-key", envvar="SKV_API_KEY", help="What clients must present.  [or $SKV_API_KEY]")
@click.option("--model-name", help="What clients call the model.  [default: the folder's name]")
@click.option("--queue-size", default=16, show_default=True, type=click.IntRange(1), help="Requests that may wait.")
@click.option(
    "--slots",
    type=click.IntRange(1),
    help="Requests that run at the same time.  [default: 4, or as many as half the memory holds]",
)
@click.option("--max-length", type=click.IntRange(1), help="Tokens of one request.  [default: the model's context]")
@click.option(
    "--prefix-memory",
    type=Number(0),
    metavar="MIB",
    help="For what prompts and answers left, so that a prompt that begins with them runs only what is new.  [default: "
    "as much as the slots' caches]",
)
@click.option(
    "--prompt-chunk",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="Tokens of a prompt that run between two tokens of the others.",
)
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0 = the runtime's choice.")
@click.option("--execution-provider", default="cpu", show_default=True, type=Provider())
@click.option("--cuda-graph", is_flag=True, help="On a GPU: decode as one captured CUDA graph per token.")
@debug_option
def serve_command(
    folder: str,
    revision: str | None,
    host: str,
    port: int,
    api_key: str | None,
    model_name: str | None,
    queue_size: int,
    slots: int | None,
    max_length: int | None,
    prefix_memory: float | None,
    prompt_chunk: int,
    threads: int,
    execution_provider: str,
    cuda_graph: bool,
) -> None:
    """Serve an exported model over HTTP, as OpenAI's clients expect it: chat completions, completions, models.

    Requests run side by side in slots, further ones wait in a queue; a client that goes away ends its request. /health
    and /metrics are for supervision. For one machine: listen beyond it only with --api-key, behind a proxy that does
    TLS.

    \b
    skv-export serve demo-model
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "demo-model", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require_module(module, "serve")
    loopback = is_loopback(host)
    if not loopback and not api_key:
        raise SkvError(f"--host {host}: others can reach it", expected="--api-key, or an address such as 127.0.0.1")
    import uvicorn

    from skv_export.model_folder import hub
    from skv_export.runtime.batch import slots_that_fit
    from skv_export.runtime.prefixes import PrefixStore
    from skv_export.runtime.session import Session
    from skv_export.serving.app import create_app
    from skv_export.serving.engine import Engine

    local = hub.fetch(folder, revision=revision)
    session = Session(local, execution_provider=execution_provider, cuda_graph=cuda_graph, num_threads=threads)
    slots = slots or min(DEFAULT_SLOTS, slots_that_fit(session, max_length))
    engine = Engine(session, slots=slots, queue_size=queue_size, max_length=max_length, prompt_chunk=prompt_chunk)
    kept = slots * engine.slot_bytes if prefix_memory is None else int(prefix_memory * 2**20)
    session.prefixes = PrefixStore(kept) if kept else None
    name = model_name or (local.resolve().name if local.resolve().name != local.resolve().anchor else "model")
    hosts: Any = (*LOOPBACK_NAMES, host) if loopback else ("*",)
    app = create_app(engine, name, api_key=api_key, allowed_hosts=hosts)
    caches = f"{slots} slots of {engine.max_length:,} tokens, {engine.slot_bytes / 2**20:,.1f} MiB each"
    click.echo(f"Serving {name} at http://{host}:{port}/v1 in {caches}; Ctrl-C ends it.", err=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
