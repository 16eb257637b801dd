"""A dataset of a user's own Python file: `--module my_task.py`."""

import json
import re
from pathlib import Path

import pytest

from sbs_jax.cli import main
from sbs_jax.data import catalogue, dataset_module, records, registry
from sbs_jax.run import directory, manifest
from sbs_jax.sweep import cells

HOWTO = (Path(__file__).parents[1] / "docs" / "howto" / "dataset.md").read_text("utf-8")
(SOURCE,) = re.findall(r'```python title="my_task.py"\n(.*?)```', HOWTO, re.DOTALL)
LABELS = ("billing", "delivery", "other")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's own my_task.py and records; the datasets are as before afterwards."""
    others = {name: each for name, each in catalogue.registered().items() if name != "tickets"}
    monkeypatch.setattr(catalogue, "_DATASETS", others)
    monkeypatch.setattr(dataset_module, "_loaded", {})
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(SOURCE)
    for split, count in (("train", 8), ("validation", 3), ("test", 3)):
        rows = [
            records.Record(
                id=f"{split}{n}",
                input=f"Ticket {n} about {LABELS[n % 3]}.",
                label=LABELS[n % 3],
                teacher_label=LABELS[n % 3],
                rationale="It says so.",
                teacher_text=f"It says so. So the answer is {LABELS[n % 3]}.",
                outcome="ok",
            )
            for n in range(count)
        ]
        records.write_records(tmp_path / "records" / "tickets" / f"{split}.jsonl", rows)
    return tmp_path


def test_a_run_of_a_module_names_it_and_later_commands_ask_for_it(folder, capsys):
    """Trains three steps, then measures, then predicts without and with the module."""
    before = registry.options()
    Path("tickets.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom sbs_jax.student import t5\n"
        'include "gin_configs/runs/train.gin"\ninclude "gin_configs/models/t5_1_1_mini.gin"\n'
        'include "gin_configs/methods/step_by_step.gin"\n'
        'DATASET = "tickets"\nVOCABULARY = "byte"\nVOCAB_SIZE = 384\nEXAMPLES = 4\nTRAIN_STEPS = 2\n'
        'LEARNING_RATE = 1e-3\nTASK_FEATURE_LENGTHS = {"inputs": 48, "targets": 24}\nMAX_DECODE_LENGTH = 8\n'
        "EVAL_BATCH_SIZE = 8\nt5.T5Config.num_encoder_layers = 1\nt5.T5Config.emb_dim = 16\n"
    )
    train = ["train", "--gin_file=tickets.gin", "--records_dir=records", "--run=runs/tickets"]
    assert main.main(train) == 1
    assert "Unknown dataset 'tickets'" in capsys.readouterr().err
    assert main.main([*train, "--module=my_task.py"]) == 0
    capsys.readouterr()
    said = directory.read_manifest("runs/tickets")["data"]["module"]
    assert said["file"] == "my_task.py"
    assert main.main(["baseline", "--module=my_task.py", "--dataset=tickets", "--records_dir=records"]) == 0
    Path("in.jsonl").write_text('{"id": "1", "input": "Ticket 9"}\n')
    predict = ["predict", "runs/tickets", "--input=in.jsonl", "--output=out.jsonl"]
    predict += ["--decoding=choices", "--batch_size=1"]
    catalogue._DATASETS.pop("tickets")
    dataset_module._loaded.clear()
    capsys.readouterr()
    assert main.main(predict) == 1
    assert re.search(r"'tickets' is defined by the Python file 'my_task.py'.*--module", capsys.readouterr().err)
    assert main.main([*predict, "--module=my_task.py"]) == 0
    assert json.loads(Path("out.jsonl").read_text())["prediction"] in LABELS
    catalogue._DATASETS.pop("tickets")
    registry.configure(before)


def test_a_changed_module_does_not_forbid_to_resume():
    old = {"data": {"dataset": "tickets", "module": {"file": "a.py", "sha256": "1"}}}
    new = {"data": {"dataset": "tickets", "module": {"file": "b.py", "sha256": "2"}}}
    decisive = [manifest._decisive(one, same_vocabulary=False) for one in (old, new)]
    assert decisive[0] == decisive[1]
    assert decisive[0]["data"]["dataset"] == "tickets"


def test_a_module_is_loaded_once_per_contents_and_may_import_its_neighbours(folder):
    Path("labels_of_mine.py").write_text(f"LABELS = {LABELS}\n")
    Path("my_task.py").write_text(
        SOURCE.replace(f"LABELS = {LABELS}".replace("'", '"'), "from labels_of_mine import LABELS")
    )
    loaded = dataset_module.load("my_task.py")
    (first,) = loaded.datasets
    assert (first.name, first.labels) == ("tickets", LABELS)
    assert dataset_module.load(Path("my_task.py").absolute()) == loaded
    assert catalogue.get("tickets") is first
    Path("my_task.py").write_text(SOURCE.replace('name="tickets"', 'name="other_tickets"'))
    assert dataset_module.load("my_task.py").datasets[0].name == "other_tickets"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "where no file is; expected a Python file that defines DATASET. Did you mean 'my_task.py'"),
        ("x = 1\n", "defines no DATASET; expected DATASET = sbs_jax.data.dataset.Dataset"),
        ("DATASET = 'tickets'\n", "defines a str as one"),
        ("\n\nx = (\n", "my_tsk.py:3: SyntaxError"),
        ("import json\n\njson.loads('')\n", "my_tsk.py:3: JSONDecodeError"),
        (SOURCE.replace('name="tickets"', 'name="svamp"'), "Another dataset is already registered as 'svamp'"),
        (SOURCE.replace('name="tickets"', 'name="Tickets"'), "lower-case letters"),
    ],
)
def test_a_module_that_cannot_be_used_is_named(source, message, folder, capsys):
    if source is not None:
        Path("my_tsk.py").write_text(source)
    assert main.main(["records", "--module=my_tsk.py", "--dataset=tickets", "--release=r", "--records_dir=x"]) == 1
    assert message in capsys.readouterr().err


def test_cells_of_a_sweep_get_the_module(folder):
    """Their commands are run by other processes."""
    plan = cells.Sweep(
        sweep_dir="s",
        records_dir="records",
        datasets=("svamp",),
        sizes=("cpu",),
        methods=("step_by_step",),
        fractions=(1.0,),
        seeds=(0,),
    )
    found = cells.searching(plan, "", modules=["my_task.py"]).cells()
    assert ["--module=my_task.py" in cell.arguments() for cell in found] == [True]
