"""Runs begun before the modules moved into folders, resumed by this code, end as the old code ended them.

tests/goldens/run_of_before.tar.xz was written at revision 6ad40a3 and holds two runs of a student of 4,792 parameters
on the built-in dataset: `whole`, preempted after step 11 of 32, and `lora`, which adapts step 8 of `whole`, preempted
after step 7; and their records and the gin files of their user. expected.json and expected.npz hold the metrics and
the parameters of both, finished by that code. They are equal but for rounding.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from builders.finished_runs import unmeasured

from sbs_jax.cli import main
from sbs_jax.weights import runs

ARCHIVE = Path(__file__).parent / "goldens" / "run_of_before.tar.xz"
STEPS, STOPPED = 32, {"whole": 11, "lora": 7}
IMPORTS = {
    "from sbs_jax import adapters": "from sbs_jax.student import adapters",
    "from sbs_jax import t5": "from sbs_jax.student import t5",
    "from sbs_jax import train": "from sbs_jax.training import config as train",
}
# A step compiled from other code, by another XLA or for another processor, rounds differently; 21 updates amplify it.
ROUNDING = 1e-3


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Folder of the unpacked archive."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def flags(run: str) -> list[str]:
    """Returns the command line of a run, for the archive's folder."""
    files = ["whole.gin"] if run == "whole" else ["whole.gin", "lora.gin"]
    return ["train", *(f"--gin_file={file}" for file in files), "--gin.RECORDS_DIR=records", f"--gin.MODEL_DIR={run}"]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [unmeasured(line) for line in lines]


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_run_of_before_ends_as_that_code_ended_it(old: Path, name: str, starter: processes.Starter) -> None:
    for file in old.glob("*.gin"):
        text = file.read_text()
        for before, now in IMPORTS.items():
            text = text.replace(f"{before}\n", f"{now}\n")
        file.write_text(text)
    done = starter.run(old, flags(name), cwd=old)
    assert done.returncode == 0, done.stderr
    assert json.loads((old / name / "manifest.json").read_text())["starts"][-1]["step"] == STOPPED[name]
    expected = json.loads((old / "expected.json").read_text())
    arrays = runs.open_run(old / name / "checkpoints" / str(STEPS)).arrays
    found = {of: np.asarray(array.whole()) for of, array in sorted(arrays.items())}
    for got, wanted in zip(metrics(old / name), expected[name]["metrics"], strict=True):
        assert (got["kind"], got["step"], got.keys()) == (wanted["kind"], wanted["step"], wanted.keys())
        assert got.get("loss", 0.0) == pytest.approx(wanted.get("loss", 0.0), rel=ROUNDING)
    with np.load(old / "expected.npz") as file:
        assert {f"{name}:{of}" for of in found} == {key for key in file.files if key.startswith(f"{name}:")}
        for of, array in found.items():
            np.testing.assert_allclose(array, file[f"{name}:{of}"], rtol=0, atol=ROUNDING, err_msg=of)


def test_the_configuration_of_a_run_of_before_is_read_by_replay(old: Path, starter: processes.Starter) -> None:
    done = starter.run(old, ["replay", "whole", "--step", "999"], cwd=old)
    assert done.returncode == 1
    assert "999" in done.stderr, done.stderr
    assert "moved" not in done.stderr


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_gin_file_of_before_is_refused_with_the_new_import(
    old: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(old)
    assert main.main(flags(name)) == 1
    said = capsys.readouterr().err
    assert any(now in said for now in IMPORTS.values()), said
    assert metrics(old / name)[-1]["step"] < STOPPED[name]  # the run is as it was
