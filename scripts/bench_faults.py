"""Measures what checkpoints cost: of training time, and of the time to the first step after a restart.

    python scripts/bench_faults.py                               # 8 minutes; appends to bench.json
    python scripts/bench_faults.py --steps 6 --rounds 2 --starts 1  # shorter

T5 v1.0 small (60,506,624 parameters, random), AdamW, float32: 726 MB a checkpoint. `checkpoint_overhead` runs the loop
of `sbs train` in two processes that take turns of some steps; one of them saves in the middle of each of its turns.
What a turn with a save takes longer than its neighbour without is the price of a save, and is set against 100 steps.
`restart_vs_cold_start` starts `sbs train` anew and anew, from nothing and from a checkpoint in turns, and takes the
time from the start of the process to its first line of metrics. How, and what came out: docs/speed.md.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import bench_ours

from sbs_jax import bench

PERIOD = 100  # steps between checkpoints
NEVER = 1_000_000
GIN_FILES = ("runs/train", "models/t5_1_0_small", "methods/step_by_step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--steps", type=int, default=10, help="training steps in a turn")
    parser.add_argument("--starts", type=int, default=3, help="from nothing and from a checkpoint, each")
    parser.add_argument("--threads", type=int, default=2, help="CPUs that each process may use")
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a process that trains, and its run directory
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder)
        rows = []
        if arguments.rounds:
            rows.append(checkpoint_overhead(folder, arguments))
        if arguments.starts:
            rows.append(restart_vs_cold_start(folder, arguments))
    bench.append(arguments.output, rows)
    print(bench.table(rows))
    return 0


def write_records(folder: Path) -> None:
    """Random text of the lengths of SVAMP, for training and validation."""
    bench_ours.RELEASE = folder / "none"
    bench_ours.write_records(folder)
    records = (folder / "svamp" / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "svamp" / "validation.jsonl").write_text("".join(records[-16:]), "utf-8")
    (folder / "svamp" / "train.jsonl").write_text("".join(records[:-16]), "utf-8")


def bindings(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    """Rows as those of scripts/bench_ours.py: 16 examples of each task an update, packed."""
    return {
        "DATASET": "svamp",
        "RECORDS_DIR": folder,
        "MODEL_DIR": folder / run,
        "VOCABULARY": "byte",
        "TASK_FEATURE_LENGTHS": bench_ours.LENGTHS,
        "EXAMPLES": bench_ours.EXAMPLES,
        "PACK": True,
        "EXAMPLES_PER_ROW": 2 * bench_ours.EXAMPLES / bench_ours.ROWS,
        "TRAIN_STEPS": NEVER,
        "LEARNING_RATE": 5e-5,
        "LOG_PERIOD": NEVER,
        "EVAL_PERIOD": NEVER,
        "CHECKPOINT_PERIOD": NEVER,
        **changes,
    }


# ------------------------------------------------------------------------------------- checkpoint_overhead


def checkpoint_overhead(folder: Path, arguments: argparse.Namespace) -> bench.Row:
    sides: list[bench.Side] = []
    with bench.started(sides):
        for name in ("with", "without"):
            command = [sys.executable, str(Path(__file__).resolve()), "--side", name, "--folder", str(folder)]
            sides.append(
                bench.Side(name, [*command, "--steps", str(arguments.steps), "--threads", str(arguments.threads)])
            )
            print(f"{name}: {sides[-1].ready}", flush=True)
        turns = bench.in_turns(sides, rounds=arguments.rounds, steps=arguments.steps)
        for side in sides:
            side.finish()
    saved = json.loads((folder / "with.json").read_text("utf-8"))
    cpu = {name: json.loads((folder / f"{name}.json").read_text("utf-8"))["cpu"] for name in turns}
    step = statistics.median(turn.seconds / turn.steps for turn in turns["without"])
    prices = [ours.seconds - theirs.seconds for ours, theirs in zip(*turns.values(), strict=True)]
    work = [ours - theirs for ours, theirs in zip(*cpu.values(), strict=True)]
    for name, of_side in turns.items():
        print(f"{name}: seconds of turns of {arguments.steps} steps:", *(f"{turn.seconds:.1f}" for turn in of_side))
    print("price of a save, s:", *(f"{x:.2f}" for x in prices), "; in CPU seconds:", *(f"{x:.2f}" for x in work))
    print("of which the loop stood still, s:", *(f"{x:.2f}" for x in saved["blocked"]))
    print(f"copying the {saved['bytes'] / 1e6:,.0f} MB once in memory takes {saved['copy']:.2f} s")
    print(f"seconds until a checkpoint was on disk: {' '.join(f'{x:.1f}' for x in saved['written'])}")
    return bench.Row(
        name="checkpoint_overhead",
        unit=f"s for {PERIOD} steps and a checkpoint",
        ours=PERIOD * step + statistics.median(prices),
        peer=PERIOD * step,
        goal="<= 1.03",
        versions=bench.versions("jax", "orbax-checkpoint", "tensorstore"),
    )


def serve(arguments: argparse.Namespace) -> None:
    """A side: the loop of `sbs train` in a thread, which does a step when it is asked for one."""
    stream = bench.protocol()
    bench.use_threads(arguments.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sbs_jax import configuration
    from sbs_jax import main as command

    command.import_tensorflow()
    import jax
    import numpy as np

    from sbs_jax import checkpoints, train

    folder = Path(arguments.folder)
    period = arguments.steps if arguments.side == "with" else NEVER
    config, text = configuration.configure(
        "train.TrainConfig",
        gin_files=[f"gin_configs/{file}.gin" for file in GIN_FILES],
        bindings=[
            f"{name}={value}"
            for name, value in bindings(folder, arguments.side, LOG_PERIOD=50, CHECKPOINT_PERIOD=period).items()
        ],
    )
    asked, done = threading.Semaphore(0), threading.Semaphore(0)
    cpu: list[float] = []  # seconds used until each step
    blocked: list[float] = []
    written: list[float] = []
    last: list[train.TrainState] = []
    prepare, save = train.prepare, checkpoints.Checkpoints.save

    def gated(config: train.TrainConfig) -> train.Trainer:
        trainer = prepare(config)

        def step(state: train.TrainState, batch: train.Batch) -> Any:
            if last:
                done.release()  # what the loop did since the last step belongs to that
            asked.acquire()
            cpu.append(time.process_time())
            state, metrics = jax.block_until_ready(trainer.step(state, batch))
            last[:] = [state]
            return state, metrics

        return dataclasses.replace(trainer, step=step)

    def timed(self: checkpoints.Checkpoints, step: int, **contents: Any) -> None:
        begin = time.perf_counter()
        save(self, step, **contents)
        blocked.append(time.perf_counter() - begin)

        def watch() -> None:
            while not (self.directory / str(step)).exists():
                time.sleep(0.05)
            written.append(time.perf_counter() - begin)

        threading.Thread(target=watch, daemon=True).start()

    train.prepare, checkpoints.Checkpoints.save = gated, timed
    loop = threading.Thread(target=train.train, args=(config,), kwargs={"config_text": text}, daemon=True)
    loop.start()

    def one(index: int) -> int:
        asked.release()
        while not done.acquire(timeout=1):
            if not loop.is_alive():
                os._exit(1)
        return 1

    # Compilation comes before the turns; and the saves, in the middle of them, end before the other's turn.
    for index in range(arguments.steps // 2):
        one(index)
    warm = len(cpu)
    bench.serve(one, ready={"parameters": sum(x.size for x in last[0].parameters.values())}, stream=stream)
    cpu.append(time.process_time())
    arrays = jax.tree.leaves((last[0].parameters, last[0].optimizer))
    begin = time.perf_counter()
    for array in arrays:
        np.array(array)
    told = {
        "cpu": [cpu[i + arguments.steps] - cpu[i] for i in range(warm, len(cpu) - 1, arguments.steps)],
        "blocked": blocked,
        "written": written,
        "bytes": sum(array.nbytes for array in arrays),
        "copy": time.perf_counter() - begin,
    }
    (folder / f"{arguments.side}.json").write_text(json.dumps(told), "utf-8")
    os._exit(0)  # the loop waits for a step for ever


# ------------------------------------------------------------------------------------ restart_vs_cold_start


def restart_vs_cold_start(folder: Path, arguments: argparse.Namespace) -> bench.Row:
    start(folder, "restart", threads=arguments.threads, ending=signal.SIGTERM)  # leaves a checkpoint
    seconds: dict[str, list[float]] = {"restart": [], "cold": []}
    for number in range(arguments.starts):
        for kind, of_kind in seconds.items():
            run = kind if kind == "restart" else f"cold-{number}"
            of_kind.append(start(folder, run, threads=arguments.threads, ending=signal.SIGKILL))
            print(f"{kind}: {of_kind[-1]:.1f} s from the start of the process to its first step", flush=True)
    return bench.Row(
        name="restart_vs_cold_start",
        unit="s to the first step",
        ours=statistics.median(seconds["restart"]),
        peer=statistics.median(seconds["cold"]),
        goal="<= 1.3",
        versions=bench.versions("jax", "orbax-checkpoint", "tensorflow"),
    )


def start(folder: Path, run: str, *, threads: int, ending: int) -> float:
    """Starts `sbs train` and ends it after its first line of metrics; the seconds until that line."""
    flags = [f"--gin_file=gin_configs/{file}.gin" for file in GIN_FILES]
    flags += [f"--gin.{name}={value}" for name, value in bindings(folder, run, LOG_PERIOD=1).items()]
    code = "import sys; from sbs_jax import bench, main; bench.use_threads(int(sys.argv.pop())); sys.exit(main.main())"
    command = [sys.executable, "-c", code, "train", *flags, str(threads)]
    before = lines(folder / run)
    with (folder / f"{run}.log").open("w+") as said:
        begin = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=said, stderr=said)
        try:
            while lines(folder / run) == before:
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(f"sbs train ended with status {process.returncode}:\n{said.read()}")
                time.sleep(0.05)
            seconds = time.monotonic() - begin
        finally:
            process.send_signal(ending)
            process.wait()
    metrics = folder / run / "metrics.jsonl"
    if ending == signal.SIGKILL and before:  # for the next start to find what this one found
        metrics.write_text("".join(metrics.read_text("utf-8").splitlines(keepends=True)[:before]), "utf-8")
    return seconds


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text("utf-8").count("\n") if metrics.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
