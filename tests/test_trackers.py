"""Trackers of metrics: MLflow and Weights & Biases themselves where installed, and a client that fails in every way."""

import json
import logging
import textwrap
import time
from pathlib import Path

import pytest

from sbs_jax.run import directory, trackers

DATA = {"dataset": "toy", "options": {"records_dir": "records"}}
SETTINGS = {"alpha": 0.5, "model": {"emb_dim": 8}}
MLFLOW = ("tensorboard", "mlflow")
# A client of MLflow whose server is as the environment says. It writes what it gets to a file.
CLIENT = """
import os, sys, time

def record(*values):
    with open(os.environ["TEST_FILE"], "a") as file:
        print(*values, file=file)

class entities:
    Metric = staticmethod(lambda name, value, stamp, step: (name, value, step))
    Param = staticmethod(lambda name, value: (name, value))

class MlflowClient:
    tries = 0
    def get_experiment_by_name(self, name):
        mode = os.environ.get("TEST_SERVER")
        MlflowClient.tries += 1
        if mode == "hangs":
            time.sleep(1000)
        if mode == "dies":
            os._exit(7)
        if mode == "is down" or (mode == "recovers" and self.tries < 2):
            raise ConnectionError("refused\\nby server")
    def create_experiment(self, name):
        return name
    def create_run(self, experiment, run_name):
        record("created", experiment, run_name)
        class run:
            class info:
                run_id = "the-id"
        return run
    def update_run(self, id_, status):
        record("updated", id_, status)
    def log_batch(self, id_, metrics=(), params=()):
        record(id_, *metrics, *params)
    def set_terminated(self, id_, status):
        record("ended", id_, status)
"""


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Puts the client above in the place of MLflow's; returns the file that it writes."""
    (tmp_path / "packages" / "mlflow").mkdir(parents=True)
    (tmp_path / "packages" / "mlflow" / "__init__.py").write_text(textwrap.dedent(CLIENT))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("TEST_FILE", str(tmp_path / "sent"))
    monkeypatch.setattr(trackers, "_GRACE", {True: 30.0, False: 30.0})
    return tmp_path / "sent"


def begun(path: Path, *, names=MLFLOW, step: int = 0) -> directory.RunDir:
    run = directory.RunDir(path, config_text="SEED = 0\n", tracker_names=names)
    run.__enter__()
    contents = {"data": DATA, "settings": {**SETTINGS, "trackers": list(names)}}
    run.begin(contents, step=step, accept_changes=False)
    return run


def lines_of(run: directory.RunDir, *steps: int, **more: float) -> None:
    for step in steps:
        run.log("train", step, {"loss": step / 2, "loss/label": 1.0, **more})


def test_every_line_is_sent_and_a_resumed_run_is_continued(tmp_path, client, caplog):
    run = begun(tmp_path / "run")
    lines_of(run, 2, 4)
    run.__exit__(KeyboardInterrupt)
    sent = client.read_text().splitlines()
    assert sent == [
        "created sbs_jax run",
        "the-id ('alpha', '0.5') ('model.emb_dim', '8') ('trackers', \"['tensorboard', 'mlflow']\")",
        "the-id ('train/loss', 1.0, 2) ('train/loss.label', 1.0, 2)",
        "the-id ('train/loss', 2.0, 4) ('train/loss.label', 1.0, 4)",
        "ended the-id KILLED",
    ]
    assert json.loads((tmp_path / "run" / "trackers" / "mlflow.json").read_text()) == {"id": "the-id"}
    run = begun(tmp_path / "run", step=4)
    lines_of(run, 6)
    run.__exit__(None)
    assert client.read_text().splitlines()[len(sent) :] == [
        "updated the-id RUNNING",
        "the-id ('train/loss', 3.0, 6) ('train/loss.label', 1.0, 6)",
        "ended the-id FINISHED",
    ]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("is down", "mlflow: a line was not sent (ConnectionError: refused). This is repeated in the background"),
        ("hangs", "mlflow: not done 1 s after the end of the run"),
        ("dies", "mlflow: its process ended with status 7"),
    ],
)
def test_a_server_that_fails_costs_no_step_and_is_named_once(server, said, tmp_path, client, monkeypatch, caplog):
    monkeypatch.setenv("TEST_SERVER", server)
    monkeypatch.setattr(trackers, "_GRACE", {True: 1.0, False: 1.0})
    run = begun(tmp_path / "run")
    start = time.monotonic()
    lines_of(run, *range(1, 100), **{f"value_{number}": 1.0 for number in range(60)})  # more than a pipe holds
    assert time.monotonic() - start < 10
    deadline = time.monotonic() + 60
    while server != "hangs" and not caplog.records and time.monotonic() < deadline:
        lines_of(run, 100)
        time.sleep(0.1)
    start = time.monotonic()
    run.__exit__(None)
    assert time.monotonic() - start < 10
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in warned if text.startswith(said)]) == 1
    assert len(directory.read_metrics(tmp_path / "run")) >= 99
    assert not client.exists()


def test_lines_wait_for_a_server_that_comes_back(tmp_path, client, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("TEST_SERVER", "recovers")
    run = begun(tmp_path / "run")
    lines_of(run, 1, 2)
    run.__exit__(None)
    assert [line.split("'")[1] for line in client.read_text().splitlines() if "train/" in line] == ["train/loss"] * 2
    assert [record.getMessage() for record in caplog.records if "mlflow" in record.getMessage()][-1] == (
        "mlflow: works again; every line was sent."
    )


def test_names_and_packages_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"trackers is 'mlfow'; expected one of .*Did you mean 'mlflow'"):
        trackers.check(["mlfow"])
    with pytest.raises(ValueError, match="expected each tracker once"):
        trackers.check(["mlflow", "mlflow"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package wandb.*pip install wandb"):
        directory.RunDir(tmp_path / "run", config_text="", tracker_names=("wandb",))
    assert not (tmp_path / "run").exists()


def test_a_run_without_lines_or_without_trackers_starts_none(tmp_path, client):
    run = begun(tmp_path / "run")
    run.__exit__(None)
    assert not client.exists()
    run = begun(tmp_path / "run", names=())  # which is no change that a resumed run refuses
    lines_of(run, 1)
    run.__exit__(None)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found - {"lock"} == {"config.gin", "manifest.json", "metrics.jsonl"}


def test_mlflow_itself_in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(trackers, "_GRACE", {True: 60.0, False: 60.0})
    for steps, error in (((2, 4), KeyboardInterrupt), ((6,), None)):
        run = begun(tmp_path / "run", step=steps[0] - 2)
        lines_of(run, *steps)
        run.__exit__(error)
    (loss,) = tmp_path.glob("mlruns/*/*/metrics/train/loss")
    assert [line.split()[1:] for line in loss.read_text().splitlines()] == [["1.0", "2"], ["2.0", "4"], ["3.0", "6"]]
    assert (loss.parent / "loss.label").is_file()
    assert (loss.parents[2] / "params" / "model.emb_dim").read_text() == "8"
    assert "status: 3" in (loss.parents[2] / "meta.yaml").read_text()  # finished


def test_weights_and_biases_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "_GRACE", {True: 60.0, False: 60.0})
    for steps, error in (((2, 4), KeyboardInterrupt), ((6,), None)):
        run = begun(tmp_path / "run", names=("wandb",), step=steps[0] - 2)
        lines_of(run, *steps)
        run.__exit__(error)
    id_ = json.loads((tmp_path / "run" / "trackers" / "wandb.json").read_text())["id"]
    files = list(tmp_path.glob(f"run/trackers/wandb/offline-run-*-{id_}/run-{id_}.wandb"))
    assert len(files) == 2  # of one run; `wandb sync` joins them
    assert all(b"train/loss/label" in file.read_bytes() for file in files)
