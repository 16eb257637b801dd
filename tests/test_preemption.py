"""Signals noticed while the main thread is busy, all processes stopping at one step, reports of who waits for whom."""

import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sbs_jax import hosts
from sbs_jax.hosts import api, link, preemption, roll, watchdog

# Busy like a compiler: in C, without the interpreter, for longer than the test waits.
BUSY = """
import hashlib, sys
from sbs_jax import hosts
from sbs_jax.hosts import preemption
with preemption.listening():
    print("ready", flush=True)
    if {busy}:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)
    while not hosts.preemption_requested():
        pass
    print("told", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def listening(*, busy: bool) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(busy=busy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_is_noted_and_a_second_one_ends_the_process(number):
    with listening(busy=False) as process:
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(5) == 128 + number


def test_a_second_signal_ends_even_a_process_that_is_busy_in_c():
    with listening(busy=True) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 128 + signal.SIGINT


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with preemption.listening():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not hosts.preemption_requested():
            assert time.monotonic() < deadline
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with preemption.listening():
        assert not hosts.preemption_requested()  # of another run


@contextlib.contextmanager
def linked(count: int) -> Iterator[list[link.Link]]:
    """Links so many processes, all in this one, over real sockets."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("localhost", 0)))
        pairs = []
        for _ in range(1, count):
            calling = stack.enter_context(socket.create_connection(listener.getsockname()))
            pairs.append((stack.enter_context(listener.accept()[0]), calling))
        places = [hosts.Place(coordinator="localhost:1", count=count, index=index) for index in range(count)]
        wires = [{index: roll.Wire(mine) for index, (mine, _) in enumerate(pairs, start=1)}]
        wires += [{0: roll.Wire(theirs)} for _, theirs in pairs]
        links = [link.Link(place, of) for place, of in zip(places, wires, strict=True)]
        try:
            yield links
        finally:  # a link that is cut without notice ends its process, which is this one
            for each in links:
                for event in each._leaving.values():
                    event.set()
            for of in wires:
                for wire in of.values():
                    with contextlib.suppress(OSError):  # the other end is shut already
                        wire.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("told", [0, 2])
def test_all_processes_stop_at_the_same_step(told):
    with linked(3) as links:
        stopped: dict[int, int] = {}

        def loop(index: int) -> None:
            waits, step = random.Random(index), 1
            while not links[index].preemption_requested():
                time.sleep(waits.random() * 0.004 * (1 + index))
                step += 1
            stopped[index] = step

        threads = [threading.Thread(target=loop, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        links[told].request_preemption()
        links[0].request_preemption()  # told twice is told once
        for thread in threads:
            thread.join(10)
        assert len(stopped) == 3
        assert len(set(stopped.values())) == 1, stopped
        # Whoever asks later still hears it.
        assert all(link.preemption_requested() for link in links)


def test_a_process_that_is_busy_delays_the_stop_and_changes_nothing():
    """One process is still compiling: the others wait, and all stop at the same step."""
    with linked(2) as links:
        for _ in range(5):
            assert not links[0].preemption_requested()
        links[1].request_preemption()  # reaches the other one at its next call, or some calls later
        calls = [6]

        def loop() -> None:
            while not links[0].preemption_requested():
                calls.append(calls[-1] + 1)

        waiting = threading.Thread(target=loop, daemon=True)
        waiting.start()
        waiting.join(10)
        assert not waiting.is_alive()
        stop = calls[-1]
        assert [links[1].preemption_requested() for _ in range(stop)] == [False] * (stop - 1) + [True]


def test_the_report_names_the_process_that_the_others_wait_for(monkeypatch, caplog):
    with linked(3) as links:
        monkeypatch.setattr(link, "_ANSWERS_WITHIN", 0.5)
        monkeypatch.setattr(api, "_link", links[0])
        links[1].here = lambda: {"doing": watchdog.INPUT, "step": 8, "seconds": 310.0}

        frozen = threading.Event()

        def nothing() -> dict[str, str]:
            frozen.wait()
            return {}

        links[2].here = nothing
        with caplog.at_level(logging.WARNING), watchdog.Watchdog(0.2) as watch:
            watch.at(watchdog.DEVICES, step=7)
            deadline = time.monotonic() + 10
            while not caplog.records:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        frozen.set()
        said = caplog.records[0].getMessage()
        assert "process 0 waits for its devices (step 7, " in said
        assert "process 1 waits for its input (step 8, 310 s)" in said
        assert "process 2 does not answer" in said
        assert "The others wait for processes 1, 2." in said


def test_a_stalled_process_makes_the_first_one_report():
    with linked(2) as links:
        asked = threading.Event()
        links[0].report = asked.set
        assert links[1].collect_activities(lambda: {"doing": "x"}) == {1: {"doing": "x"}}
        assert asked.wait(5)


def test_a_stalled_input_is_reported_with_its_place(caplog):
    held = threading.Event()
    thread = threading.Thread(target=held.wait, daemon=True, name="batches ahead")
    thread.start()
    with caplog.at_level(logging.WARNING), watchdog.Watchdog(0.2) as watch:
        watch.at(watchdog.INPUT, step=3)
        time.sleep(1.2)
    held.set()
    reports = [record.getMessage() for record in caplog.records]
    # After 0.2, 0.4 and 0.8 s.
    assert 1 <= len(reports) <= 3
    assert reports[0].startswith("Nothing moves: process 0 waits for its input (step 3, 0 s); its thread is in wait (")


def test_a_loop_that_moves_is_not_reported(caplog):
    with caplog.at_level(logging.WARNING), watchdog.Watchdog(0.3) as watch:
        for step in range(20):
            watch.at(watchdog.DEVICES, step=step)
            time.sleep(0.05)
    assert not caplog.records
