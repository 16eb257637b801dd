"""`sbs serve`: answer over HTTP."""

import argparse
from typing import Any

from sbs_jax.cli.commands import predict
from sbs_jax.training.gin_files import UsageError

# Batch sizes compiled beside --batch_size, for the small batches of an idle server.
SMALLER = (1, 8)


def add(command: Any) -> None:
    serve = command(
        "serve",
        run,
        "Answer questions over HTTP: POST /predict, GET /health, /metrics, /openapi.json.",
        epilog="example:\n  sbs serve --model runs/svamp --port 8000\n"
        '  curl -H \'Content-Type: application/json\' -d \'{"inputs": [{"input": "Ann has 3 pens .."}]}\' \\\n'
        "      http://127.0.0.1:8000/predict\n\n"
        "SIGTERM or Ctrl-C finishes the requests in flight; a second one ends at once. See docs/serving.md.",
    )
    serve.add_argument("--model", required=True, metavar="DIR", help="run directory, or one of its checkpoints/<step>")
    serve.add_argument(
        "--base", metavar="PATH", help="new place of the base that a run's adapters were trained on, if it moved"
    )
    serve.add_argument(
        "--adapters",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="another run over the same base, for rows that name it; repeatable",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: only this machine)")
    serve.add_argument("--port", type=int, default=8000, help="port; 0: any free one")
    predict.add_settings(serve)
    limits = serve.add_argument_group("queue and limits")
    limits.add_argument("--max_batch", type=int, default=128, metavar="ROWS", help="rows taken from the queue together")
    limits.add_argument(
        "--max_wait_ms", type=float, default=5.0, help="how long a first row waits for more while the model is idle"
    )
    limits.add_argument("--max_queue", type=int, default=1024, metavar="ROWS", help="waiting rows of all requests")
    limits.add_argument("--max_inputs", type=int, default=256, metavar="ROWS", help="rows of one request")
    limits.add_argument("--max_body_bytes", type=int, default=2**20, help="bytes of one request's body")
    limits.add_argument("--max_connections", type=int, default=1024, help="open connections")
    limits.add_argument(
        "--request_timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="from the end of a request's body to its answer",
    )
    limits.add_argument(
        "--read_timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="for a request's headers, for its body, and for a client to read its answer",
    )
    limits.add_argument("--keep_alive", type=float, default=30.0, metavar="SECONDS", help="idle time of a connection")
    limits.add_argument(
        "--stop_timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for requests in flight when the server stops",
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        import h11  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed; sbs serve needs the extra: pip install 'sbs-jax[serve]'."
        ) from None
    from sbs_jax.prediction import compiled
    from sbs_jax.serve import server
    from sbs_jax.serve.limits import Limits

    names = ("max_batch", "max_queue", "max_inputs", "max_body_bytes", "max_connections")
    times = ("request_timeout", "read_timeout", "keep_alive", "stop_timeout")
    limits = Limits(
        max_wait=arguments.max_wait_ms / 1000, **{name: getattr(arguments, name) for name in (*names, *times)}
    )
    smaller = tuple(size for size in SMALLER if size < arguments.batch_size)
    return server.serve(
        arguments.model,
        settings=predict.settings(arguments, smaller=smaller),
        limits=limits,
        host=arguments.host,
        port=arguments.port,
        kept=arguments.compiled or compiled.default(),
        base=arguments.base,
        adapters=predict.named(arguments.adapters),
        say=lambda line: print(f"sbs serve: {line}", flush=True),
    )
