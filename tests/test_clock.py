"""Where the time of a run goes: parts, rates, goodput, and a profile of some steps."""

import contextlib
import time
from types import SimpleNamespace

import jax
import pytest
import toy

from sbs_jax import chips, compiling
from sbs_jax.training import clock, loop, profile
from sbs_jax.training.metrics_window import is_measured


class _Time:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        fake = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now + 1e9)
        monkeypatch.setattr(clock, "time", fake)


def test_time_is_of_the_part_in_which_it_passes(monkeypatch):
    moment, compiled = _Time(monkeypatch), [0.0]
    spent = clock.Clock(None, began=moment.now - 5, compiled=lambda: compiled[0])
    spent.enter("steps")
    moment.now += 10
    compiled[0] += 4  # of the first step
    with spent.within("data"):
        moment.now += 1
    with contextlib.suppress(ZeroDivisionError), spent.within("evaluation"):
        moment.now += 7
        compiled[0] += 2
        raise ZeroDivisionError
    moment.now += 3
    expected = {"start": 5, "steps": 9, "compiling": 6, "data": 1, "evaluation": 5, "saving": 0, "lost": 0}
    assert spent.seconds() == expected
    assert spent.metrics() == {"goodput": 9 / 26, **{f"seconds/{part}": each for part, each in expected.items()}}


def test_what_came_after_the_checkpoint_is_lost(monkeypatch):
    moment = _Time(monkeypatch)
    first = clock.Clock(None, began=moment.now, compiled=lambda: 0.0)
    first.enter("steps")
    moment.now += 30
    saved = first.state()
    moment.now += 12  # steps that are done again, and the wait for a machine
    began = moment.now
    moment.now += 2
    second = clock.Clock(saved, began=began, compiled=lambda: 0.0)
    second.enter("steps")
    moment.now += 6
    found = second.seconds()
    assert (found["steps"], found["lost"], found["start"]) == (36, 12, 2)
    assert second.metrics()["goodput"] == 36 / 50


def test_a_program_counts_as_compiling_in_its_first_call_alone():
    progress = compiling.Progress(count=1)
    for _ in range(2):
        with progress.compiling("the step"):
            time.sleep(0.05)
    assert 0.05 <= progress.seconds < 0.1


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2),  # JAX counts two devices a chip
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_of_a_device(kind, peak):
    assert chips.peak_flops(kind) == peak


def test_rates_are_of_one_device_and_utilisation_is_that_of_the_plan(monkeypatch, tmp_path):
    config = toy.config(tmp_path / "run", tmp_path)
    plain = clock.rates(config, tokens_per_second=1_200.0, seconds_per_step=0.5)
    assert plain == {"tokens_per_second_per_device": 1_200.0 / jax.device_count()}  # a CPU keeps no statistics
    statistics = [{"peak_bytes_in_use": 3 * 2**30}, {"peak_bytes_in_use": 5 * 2**30}]
    devices = [SimpleNamespace(device_kind="TPU v5 lite", memory_stats=lambda one=one: one) for one in statistics]
    monkeypatch.setattr(clock.jax, "devices", lambda: devices * 2)
    monkeypatch.setattr(clock.jax, "local_devices", lambda: devices)
    found = clock.rates(config, tokens_per_second=1_200.0, seconds_per_step=0.5)
    from sbs_jax.plan import command

    assert found["utilisation"] == pytest.approx(command._flops(config) / (0.5 * 4 * 197e12))
    assert found["tokens_per_second_per_device"] == 300.0
    assert found["device_memory_gib"] == 5.0


def test_a_second_profiler_costs_the_run_nothing(tmp_path, caplog, monkeypatch):
    def refused(*_, **__):  # as JAX says it
        raise RuntimeError("Profile has already been started. Only one profile may be run at a time.")

    monkeypatch.setattr(profile.jax.profiler, "start_trace", refused)
    profiler = profile.Profiler((1, 2), folder=tmp_path)
    for step in (1, 2, 3):
        with profiler.step(step, ready=lambda: None):
            pass
    assert caplog.text.count("no profile of the steps 1 to 2: Profile has already been started") == 1
    assert not (tmp_path / "plugins").exists()


@pytest.mark.parametrize("steps", [(0, 3), (5, 4), (5,), (True, 2)])
def test_a_window_that_is_none_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=r"profile_steps is .*; expected the first and the last step"):
        toy.config(tmp_path / "run", tmp_path, profile_steps=steps)


def test_measured_names_are_those_that_differ_between_runs():
    assert is_measured("seconds/steps")
    assert not is_measured("loss/label")
    assert loop._NEW.get("clock") is None
