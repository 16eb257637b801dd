"""The four real datasets in one run of real processes, killed and resumed: it ends as an uninterrupted one does."""

import json
import signal
from pathlib import Path

import pytest
from builders.finished_runs import unmeasured
from processes import Starter, until

from sbs_jax.cli import main
from sbs_jax.data import records
from sbs_jax.run import directory

DATASETS = ("svamp", "cqa", "esnli", "anli1")
ROWS = 400  # of each file; validation and test a tenth of them
BINDINGS = (
    *("VOCAB_SIZE=32128", "EXAMPLES=5", "TRAIN_STEPS=8", "LOG_PERIOD=1", "EVAL_PERIOD=4", "CHECKPOINT_PERIOD=2"),
    *(
        "WARMUP_STEPS=2",
        "MAX_DECODE_LENGTH=4",
        "TRAIN_SPLIT={'esnli': 'validation', 'anli1': 'validation'}",
        "RATES='proportional'",
    ),
)


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory: pytest.TempPathFactory, real_data_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for dataset in DATASETS:
        flags = ["--dataset", dataset, "--release", str(real_data_dir), "--records_dir", str(folder)]
        assert main.main(["records", *flags]) == 0
        for file in (folder / dataset).glob("*.jsonl"):
            most = ROWS if file.stem == "train" or dataset in ("esnli", "anli1") else ROWS // 10
            records.write_records(file, records.read_records(file)[: ROWS // 10 if file.stem == "test" else most])
    return folder


def lines_of(run: Path) -> list[dict[str, object]]:
    return [unmeasured(line) for line in directory.read_metrics(run)]


def predictions_of(run: Path) -> dict[str, list[dict[str, object]]]:
    files = sorted((run / "predictions").iterdir())
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.mark.faults
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_of_four_datasets_is_killed_and_ends_bit_for_bit_alike(
    starter: Starter, records_dir: Path, real_vocab: Path, tmp_path: Path, count: int
) -> None:
    def flags(run: Path) -> list[str]:
        given = [f"VOCABULARY='{real_vocab}'", *BINDINGS]
        file = "--gin_file=gin_configs/experiments/mixtures/cpu.gin"
        return ["train", file, f"--records_dir={records_dir}", f"--run={run}", *(f"--gin.{each}" for each in given)]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with starter.together(tmp_path, flags(whole), count=count) as processes:
        assert [process.wait(600) for process in processes] == [0] * count, processes[0].complained()
    with starter.together(tmp_path, flags(broken), count=count) as processes:
        until(lambda: (broken / "checkpoints" / "4").is_dir(), processes, seconds=600)
        for process in processes:
            process.send(signal.SIGKILL)
    assert len(lines_of(broken)) < len(lines_of(whole))
    with starter.together(tmp_path, flags(broken), count=count) as processes:
        assert [process.wait(600) for process in processes] == [0] * count, processes[0].complained()
    assert lines_of(broken) == lines_of(whole)
    assert predictions_of(broken) == predictions_of(whole)
    assert {f"{name}_label-8.jsonl" for name in DATASETS} <= set(predictions_of(whole))
