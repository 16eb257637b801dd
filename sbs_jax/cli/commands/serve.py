"""`sbs serve`: answer over HTTP."""

import argparse
from typing import Any

from sbs_jax.cli import runs
from sbs_jax.cli.commands import predict
from sbs_jax.training.gin_files import UsageError

# Batch sizes compiled beside --batch_size, for the small batches of an idle server.
SMALLER = (1, 8)
LIMITS = {
    "max_batch": ("ROWS", "rows taken from the queue together; choices count as a row for every 8"),
    "max_queue": ("ROWS", "waiting rows of all requests"),
    "max_inputs": ("ROWS", "rows of one request"),
    "max_choices": ("N", "choices of one request, those of all its rows together"),
    "max_body_bytes": ("BYTES", "size of one request's body"),
    "max_connections": ("N", "open connections"),
    "request_timeout": ("SECONDS", "from the end of a request's body to its answer"),
    "read_timeout": ("SECONDS", "for a request's headers, for its body, and for a client to read its answer"),
    "keep_alive": ("SECONDS", "idle time of a connection"),
    "stop_timeout": ("SECONDS", "for requests in flight when the server stops"),
}


def add(command: Any) -> None:
    from sbs_jax.serve.limits import Limits

    serve = command(
        "serve",
        run,
        check=check,
        epilog="example:\n  sbs serve runs/svamp --port 8000\n"
        '  curl -H \'Content-Type: application/json\' -d \'{"inputs": [{"input": "Ann has 3 pens .."}]}\' \\\n'
        "      http://127.0.0.1:8000/predict\n\n"
        "SIGTERM or Ctrl-C finishes the requests in flight; a second one ends at once. See docs/serving.md.",
    )
    runs.add(serve, old=("--model",))
    runs.add_dataset(serve)
    serve.add_argument("--base", metavar="PATH", help="new path of the base of a run's adapters, if it has moved")
    serve.add_argument(
        "--adapters",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="another run over the same base, for rows that name it; repeatable",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; 127.0.0.1: only this machine")
    serve.add_argument("--port", type=int, default=8000, help="port; 0: any free one")
    predict.add_settings(serve)
    limits = serve.add_argument_group("queue and limits")
    limits.add_argument(
        "--max_wait_ms",
        type=float,
        default=1000 * Limits.max_wait,
        metavar="MS",
        help="wait of a first row for more while the model is idle",
    )
    for name, (metavar, text) in LIMITS.items():
        default = getattr(Limits, name)
        limits.add_argument(f"--{name}", type=type(default), default=default, metavar=metavar, help=f"{text}")


def check(arguments: argparse.Namespace) -> None:
    try:
        import h11  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed; sbs serve needs the extra: pip install 'sbs-jax[serve]'."
        ) from None
    from sbs_jax.cli import early

    early.port(arguments.host, arguments.port)
    predict.check_runs(arguments)


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.prediction import compiled
    from sbs_jax.serve import server
    from sbs_jax.serve.limits import Limits

    limits = Limits(max_wait=arguments.max_wait_ms / 1000, **{name: getattr(arguments, name) for name in LIMITS})
    smaller = tuple(size for size in SMALLER if size < arguments.batch_size)
    return server.serve(
        arguments.run_dir,
        settings=predict.settings(arguments, smaller=smaller),
        limits=limits,
        host=arguments.host,
        port=arguments.port,
        kept=arguments.compiled or compiled.default(),
        base=arguments.base,
        adapters=predict.named(arguments.adapters),
        dataset=arguments.dataset,
        say=lambda line: print(f"sbs serve: {line}", flush=True),
    )
