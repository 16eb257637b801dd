"""Python interface: train a student on rows at hand, and ask it.

    rows = [{"input": "I was charged twice.", "rationale": "It is about money.", "label": "billing"}, ..]
    student = sbs_jax.distill(rows, output="runs/tickets")
    student.predict(["My parcel is late."])

It writes what the commands write, so every command goes on from there: `sbs report runs/tickets`.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.data import dataset_folder, own_data, own_experiments, records, table
from sbs_jax.prediction import compiled, engine
from sbs_jax.prediction.engine import Settings
from sbs_jax.run import directory
from sbs_jax.student import partitioning
from sbs_jax.training import gin_files, loop, students

Rows = Iterable[Mapping[str, Any]] | str | Path


class Student:
    """A trained student: `run` is its directory."""

    def __init__(self, run: str | Path, trained: students.Student) -> None:
        self.run = Path(run)
        self._trained = trained
        self._predictors: dict[Settings, engine.Predictor] = {}

    @classmethod
    def load(cls, run: str | Path, *, base: str | None = None) -> "Student":
        """Loads the best checkpoint of a run directory, or one `checkpoints/<step>`.

        `base` is the new path of an adapter run's base, if it has moved. FileNotFoundError or ValueError says what is
        wrong with the directory.
        """
        return cls(run, students.load_student(run, layout=partitioning.DATA_PARALLEL, base=base))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Returns the run's last metrics of each kind: "train", "validation" and, after the end, "test"."""
        return directory.last_lines(directory.read_metrics(self.run))

    def predict(self, inputs: Sequence[str], *, settings: Settings | None = None) -> list[str]:
        """Answers inputs, in order, with the label alone. ValueError names an input that cannot be answered."""
        found = []
        for number, answer in enumerate(self.answer(inputs, settings=settings)):
            if answer.prediction is None:
                raise ValueError(f"inputs[{number}]: {answer.error}")
            found.append(answer.prediction)
        return found

    def explain(self, inputs: Sequence[str], *, settings: Settings | None = None) -> list[engine.Answer]:
        """Answers inputs with labels and rationales; see `answer`."""
        return self.answer(inputs, settings=dataclasses.replace(settings or Settings(), rationale=True))

    def answer(self, inputs: Sequence[str], *, settings: Settings | None = None) -> list[engine.Answer]:
        """Answers inputs, in order, with log probabilities; an input that cannot be answered has an `error`.

        `settings` choose decoding, batch size and precision; the default is greedy decoding in float32.
        """
        if isinstance(inputs, str) or not all(isinstance(each, str) for each in inputs):
            raise ValueError(
                f"inputs is {str(inputs)[:100]!r}; expected a list of texts, such as ['My parcel is late.']."
            )
        settings = settings or Settings()
        if settings not in self._predictors:
            self._predictors[settings] = engine.Predictor(
                {None: self._trained}, settings=settings, places={None: str(self.run)}, cache=_kept
            )
        return self._predictors[settings].answer(
            [engine.Question(id=str(number), input=each) for number, each in enumerate(inputs)]
        )


def distill(
    train: Rows,
    validation: Rows | None = None,
    test: Rows | None = None,
    *,
    output: str | Path,
    name: str | None = None,
    student: str = "laptop",
    method: str = "step_by_step",
    input_column: str | None = None,
    label_column: str | None = None,
    rationale_column: str | None = None,
    labels: str = "auto",
    macros: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Student:
    """Trains a student on rows, or resumes that run, and returns it; the best checkpoint by validation is loaded.

    Args:
      train: rows as mappings (a pandas DataFrame and a dataset of Hugging Face are such rows too), a table's path, or a
        folder of `sbs init`. A teacher's rationales are a column of the rows.
      validation, test: further rows; a tenth of `train` each if they are missing. Not with a folder, which has them.
      output: run directory. The rows go into its folder `dataset`, as `sbs init` writes it.
      name: of the dataset (default: the last part of `output`).
      student: "laptop" (0.8 million parameters, from scratch), "t5_base" (from the Hugging Face Hub), "smollm2"
        (needs the macros INITIAL_CHECKPOINT_PATH and VOCABULARY), or the path of a gin file.
      method: a file of gin_configs/methods/ without its ending, or a path: "standard_finetuning" needs no rationales.
      input_column, label_column, rationale_column: columns by name; usual names are found without.
      labels: "closed" (the column has all possible labels), "free" text, or "auto".
      macros: values of the gin macros of `sbs train`: {"TRAIN_STEPS": 500, "LEARNING_RATE": 1e-3}.
      quiet: do not print the decisions about the rows.

    Raises:
      ValueError: rows that cannot be used, or rationales that the method needs and the rows lack.
      FileExistsError: `output` holds a run of other rows or another configuration.
      gin_files.UsageError: an unknown macro or a value that does not fit.
    """
    folder = Path(output) / directory.ROWS
    if isinstance(train, str | Path) and dataset_folder.is_folder(str(train)):
        if validation is not None or test is not None:
            raise ValueError(f"{train} has its own splits; give rows instead of the folder, or no validation and test.")
        folder = Path(train)
    else:
        given = {"train": train, "validation": validation, "test": test}
        tables: dict[str | None, table.Table] = {
            split: _table(rows, where=split) for split, rows in given.items() if rows is not None
        }
        plan = own_data.plan(
            str(output),
            tables=tables,
            name=name,
            input_column=input_column,
            label_column=label_column,
            rationale_column=rationale_column,
            labels=labels,
        )
        if not quiet:
            print("\n".join(plan.lines))
        own_data.write(plan, folder, gin=own_experiments.of(plan, folder), keep=True)
    bindings = {"MODEL_DIR": str(output), "RECORDS_DIR": str(_records(folder, method)), **(macros or {})}
    config, text = gin_files.configure(
        "train.TrainConfig",
        gin_files=[
            student if student.endswith(".gin") else str(folder / f"{student}.gin"),
            method if method.endswith(".gin") else f"gin_configs/methods/{method}.gin",
        ],
        bindings=[f"{name}={value!r}" for name, value in bindings.items()],
    )
    with _kept():
        loop.train(config, config_text=text)
    return Student.load(output)


def _kept() -> contextlib.AbstractContextManager[compiled.Cache]:
    """Opens the cache of compiled programs, which changes settings of JAX: only while programs are compiled."""
    return compiled.kept(compiled.default())


def _table(rows: Rows, *, where: str) -> table.Table:
    if isinstance(rows, str | Path):
        return table.read_file(Path(rows))
    listed: Any = rows
    if hasattr(rows, "features"):  # of Hugging Face: its labels are numbers
        listed = table.named_labels(rows)
    elif hasattr(rows, "to_dict"):  # a DataFrame of pandas iterates over its columns
        listed = listed.to_dict("records")
    held = list(listed)
    wrong = next((number for number, row in enumerate(held) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise ValueError(
            f"{where}[{wrong}] is {str(held[wrong])[:100]!r}; expected a mapping of columns, such as "
            "{'input': 'I was charged twice.', 'label': 'billing'}."
        )
    return table.table_of(held, [f"{where}[{number}]" for number in range(len(held))], where=where)


def _records(folder: Path, method: str) -> Path:
    """Returns the folder of records to train on: with rationales, or the bare inputs if the method needs none."""
    name = dataset_folder.read(folder).name
    if (folder / dataset_folder.RECORDS / name / records.MANIFEST).is_file():
        return folder / dataset_folder.RECORDS
    if Path(method).stem != "standard_finetuning":
        raise ValueError(
            f"The rows have no rationales, which method {method!r} learns from. Give them in a column "
            f"({', '.join(own_data.RATIONALE_NAMES)}, or rationale_column=..), ask a teacher (sbs teach --dataset "
            f"{folder}, then distill({str(folder)!r}, ..)), or take method='standard_finetuning'."
        )
    return folder / dataset_folder.INPUTS
