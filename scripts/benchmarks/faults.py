"""Measures the cost of checkpoints: in training time, and in the time to the first step after a restart.

    make bench-faults                                                     # a quarter of an hour
    python scripts/bench.py faults --steps 6 --rounds 2 --starts 1        # shorter

T5 v1.0 small (60,506,624 parameters, random), AdamW, float32: 726 MB a checkpoint. `checkpoint_overhead` runs the loop
of `sbs train` in two processes that take turns; one of them saves in the middle of each of its turns. The cost of a
save is the difference between such a turn and its neighbour, relative to 100 steps. `gs_save_overhead` does so with
both saving, one into a bucket of an emulator on loopback, the other onto the disk. `restart_vs_cold_start` starts
`sbs train` from nothing and from a checkpoint in turns, and measures the time until its first metrics line.
`checkpoint_hash_s_per_gb_per_host` syncs and hashes new files, as each process does with those that it wrote.
Results: docs/speed.md.
"""

import argparse
import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness, svamp, train

PERIOD = 100  # steps between checkpoints
NEVER = 1_000_000
GIN_FILES = [f"gin_configs/{name}.gin" for name in ("runs/train", "models/t5_1_0_small", "methods/step_by_step")]


def add_options(parser: argparse.ArgumentParser) -> None:
    harness.add_turns(parser, rounds=4, steps=10)
    parser.add_argument("--starts", type=int, default=3, help="starts from nothing, and as many from a checkpoint")
    parser.add_argument("--hashes", type=int, default=5, help="times to hash a GB")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    with tempfile.TemporaryDirectory() as name:
        rows, _ = svamp.read(released=False)
        svamp.write(Path(name), train=rows[:-16], validation=rows[-16:])
        if arguments.rounds:
            yield checkpoint_overhead(Path(name), arguments)
            buckets = harness.of_tests("buckets")
            with buckets.emulator() as address:
                place = f"gs://{buckets.BUCKET}/run"
                yield gs_save_overhead(Path(name), arguments, place, buckets.environment(address))
        if arguments.starts:
            harness.use_threads(arguments.threads)  # for the processes started from here
            yield restart_vs_cold_start(Path(name), arguments.starts)
        if arguments.hashes:
            yield checkpoint_hash(Path(name), arguments.hashes)


def bindings(folder: Path, run: str, **changes: Any) -> list[str]:
    periods = {"LOG_PERIOD": NEVER, "EVAL_PERIOD": NEVER, "CHECKPOINT_PERIOD": NEVER, **changes}
    place = run if run.startswith("gs://") else str(folder / run)
    return train.bindings(folder, vocabulary="byte", **{"MODEL_DIR": place, **periods})


# ------------------------------------------------------------------------------------- checkpoint_overhead


def checkpoint_overhead(folder: Path, arguments: argparse.Namespace) -> harness.Row:
    with harness.Sides() as sides:
        for name, period in (("with", arguments.steps), ("without", NEVER)):
            options = {"folder": str(folder), "run": name, "steps": arguments.steps, "period": period}
            sides.start(name, loop, **options, threads=arguments.threads)
        found = sides.compare(rounds=arguments.rounds, steps=arguments.steps, unit="steps/s")
    saving, plain = found["with"], found["without"]
    prices = [ours.seconds - theirs.seconds for ours, theirs in zip(saving.turns, plain.turns, strict=True)]
    cpu = [ours - theirs for ours, theirs in zip(saving.finish["cpu"], plain.finish["cpu"], strict=True)]
    print(f"price of a save, s: {harness.listed(prices)}; in CPU seconds: {harness.listed(cpu)}")
    print(f"of which the loop was blocked, s: {harness.listed(saving.finish['blocked'])}")
    megabytes = saving.finish["bytes"] / 1e6
    print(f"copying the {megabytes:,.0f} MB once in memory takes {saving.finish['copy']:.2f} s")
    print(f"seconds until a checkpoint was on disk: {harness.listed(saving.finish['written'])}")
    return harness.Row(
        name="checkpoint_overhead",
        unit=f"s for {PERIOD} steps and a checkpoint",
        ours=PERIOD * plain.step_seconds + statistics.median(prices),
        peer=PERIOD * plain.step_seconds,
        goal="<= 1.03",
        versions=harness.versions("jax", "orbax-checkpoint", "tensorstore"),
    )


def gs_save_overhead(
    folder: Path, arguments: argparse.Namespace, place: str, environment: dict[str, str]
) -> harness.Row:
    with harness.Sides() as sides:
        for name, run in (("bucket", place), ("disk", "disk")):
            options = {"folder": str(folder), "run": run, "steps": arguments.steps, "period": arguments.steps}
            sides.start(name, loop, **options, environment=environment, threads=arguments.threads)
        found = sides.compare(rounds=arguments.rounds, steps=arguments.steps, unit="steps/s")
    for name, side in found.items():
        print(f"{name}: seconds until a checkpoint was there: {harness.listed(side.finish['written'])}")
    disk = PERIOD * found["disk"].step_seconds
    prices = [
        ours.seconds - theirs.seconds for ours, theirs in zip(found["bucket"].turns, found["disk"].turns, strict=True)
    ]
    return harness.Row(
        name="gs_save_overhead",
        unit=f"s for {PERIOD} steps and a checkpoint",
        ours=disk + statistics.median(prices),
        peer=disk,
        goal="<= 1.1",
        versions=harness.versions("jax", "orbax-checkpoint", "tensorstore", "google-cloud-storage"),
    )


def checkpoint_hash(folder: Path, rounds: int) -> harness.Row:
    """Hashes a GB in 16 files, about as many as a host of an XXL model has arrays at a time."""
    from sbs_jax.storage import checksums

    files, size = 16, 10**9 // 16
    seconds = []
    for number in range(rounds):
        place = folder / f"hashes-{number}"
        place.mkdir()
        for index in range(files):
            (place / str(index)).write_bytes(os.urandom(size))
        os.sync()
        begin = time.perf_counter()
        checksums.entries(place, [str(index) for index in range(files)])
        seconds.append((time.perf_counter() - begin) / (files * size / 1e9))
        shutil.rmtree(place)
    print(f"seconds to hash a GB: {harness.listed(seconds)}")
    value = statistics.median(seconds)
    return harness.Row("checkpoint_hash_s_per_gb_per_host", "s/GB", value, 1.0, "<= 1", {})


def loop(
    *, folder: str, run: str, steps: int, period: int, threads: int, environment: dict[str, str] | None = None
) -> harness.Worker:
    """Runs the loop of `sbs train` in a thread, which does one step per request."""
    harness.use_threads(threads)
    os.environ.update(environment or {})
    from sbs_jax.cli import main as command
    from sbs_jax.training import gin_files

    command.import_tensorflow()
    import jax
    import numpy as np

    from sbs_jax.run import checkpoints
    from sbs_jax.storage import checksums
    from sbs_jax.training import loop as training
    from sbs_jax.training.config import TrainConfig
    from sbs_jax.training.step import Batch, Trainer, TrainState

    given = bindings(Path(folder), run, LOG_PERIOD=50, CHECKPOINT_PERIOD=period)
    config, text = gin_files.configure("train.TrainConfig", gin_files=GIN_FILES, bindings=given)
    asked, done = threading.Semaphore(0), threading.Semaphore(0)
    cpu: list[float] = []  # seconds used until each step
    blocked: list[float] = []
    written: list[float] = []
    last: list[TrainState] = []
    prepare, save = training.prepare, checkpoints.Checkpoints.save

    def gated(config: TrainConfig) -> Trainer:
        trainer = prepare(config)

        def step(state: TrainState, batch: Batch) -> Any:
            if last:
                done.release()  # the loop's work since the last step belongs to that step
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
            while not (self.directory / str(step) / checksums.FILE).exists():
                time.sleep(0.05)
            written.append(time.perf_counter() - begin)

        threading.Thread(target=watch, daemon=True).start()

    training.prepare, checkpoints.Checkpoints.save = gated, timed
    thread = threading.Thread(target=training.train, args=(config,), kwargs={"config_text": text}, daemon=True)
    thread.start()

    def one(index: int) -> int:
        del index
        asked.release()
        while not done.acquire(timeout=1):
            if not thread.is_alive():
                os._exit(1)
        return 1

    # Compilation comes before the turns; the saves, in the middle of turns, end before the other side's turn.
    for index in range(steps // 2):
        one(index)
    warm = len(cpu)

    def finish() -> dict[str, Any]:
        cpu.append(time.process_time())
        arrays = jax.tree.leaves((last[0].parameters, last[0].optimizer))
        begin = time.perf_counter()
        for array in arrays:
            np.array(array)
        return {
            "copy": time.perf_counter() - begin,
            "bytes": sum(array.nbytes for array in arrays),
            "cpu": [cpu[i + steps] - cpu[i] for i in range(warm, len(cpu) - 1, steps)],
            "blocked": blocked,
            "written": written,
            "peak_memory": harness.peak_memory(),
        }

    return harness.Worker(one, {"parameters": sum(x.size for x in last[0].parameters.values())}, finish)


# ------------------------------------------------------------------------------------ restart_vs_cold_start


def restart_vs_cold_start(folder: Path, starts: int) -> harness.Row:
    start(folder, "restart", ending=signal.SIGTERM)  # leaves a checkpoint
    seconds: dict[str, list[float]] = {"restart": [], "cold": []}
    for number in range(starts):
        for kind, of_kind in seconds.items():
            of_kind.append(start(folder, kind if kind == "restart" else f"cold-{number}", ending=signal.SIGKILL))
            print(f"{kind}: {of_kind[-1]:.1f} s from the start of the process to its first step", flush=True)
    return harness.Row(
        name="restart_vs_cold_start",
        unit="s to the first step",
        ours=statistics.median(seconds["restart"]),
        peer=statistics.median(seconds["cold"]),
        goal="<= 1.3",
        versions=harness.versions("jax", "orbax-checkpoint", "tensorflow"),
    )


def start(folder: Path, run: str, *, ending: int) -> float:
    """Starts `sbs train`, ends it after its first line of metrics, and returns the seconds until that line."""
    flags = [f"--gin_file={file}" for file in GIN_FILES]
    flags += [f"--gin.{binding}" for binding in bindings(folder, run, LOG_PERIOD=1)]
    metrics = folder / run / "metrics.jsonl"

    def lines() -> list[str]:
        return metrics.read_text("utf-8").splitlines(keepends=True) if metrics.exists() else []

    before = lines()
    with (folder / f"{run}.log").open("w+") as log:
        begin = time.monotonic()
        process = subprocess.Popen([*harness.SBS, "train", *flags], stdout=log, stderr=log)
        try:
            while len(lines()) == len(before):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"sbs train ended with status {process.returncode}:\n{log.read()}")
                time.sleep(0.05)
            seconds = time.monotonic() - begin
        finally:
            process.send_signal(ending)
            process.wait()
    if ending == signal.SIGKILL and before:  # the next start resumes where this one did
        metrics.write_text("".join(before), "utf-8")
    return seconds
