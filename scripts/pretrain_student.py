"""Makes the embedded student: vocabulary, pre-training rows, training, and the shipped files.

    python scripts/pretrain_student.py --work runs/pretrain [--gin.NAME=VALUE ..]

Writes tasks/builtin_data/sentencepiece.model and student.npz. Everything is fixed by seeds; settings are in
gin_configs/experiments/builtin/pretrain.gin, figures of the recorded run in docs/experiments.md.
"""

import argparse
import itertools
from pathlib import Path

from sbs_jax.data import records
from sbs_jax.training import gin_files, loop
from sbs_jax.training.step import prepare
from sbs_jax.weights import npz, opening
from tasks import builtin, builtin_corpus

SEED = 20261121
VALIDATION_ROWS = 512


def make_records(folder: Path, *, train_rows: int) -> None:
    """Writes the corpus as records; the first rows of the stream are for validation."""
    stream = builtin_corpus.rows(seed=SEED)
    for split, count in (("validation", VALIDATION_ROWS), ("train", train_rows)):
        rows = [
            records.Record(id=f"{split}-{number}", input=inputs, label=targets)
            for number, (inputs, targets) in enumerate(itertools.islice(stream, count))
        ]
        records.write_records(folder / builtin_corpus.NAME / f"{split}.jsonl", rows)


def run(work: Path, bindings: list[str]) -> None:
    """Makes the vocabulary and the records, trains, and writes the shipped files."""
    Path(builtin.vocabulary_path()).write_bytes(builtin_corpus.vocabulary(seed=SEED))
    given = [*bindings, f"RECORDS_DIR={work / 'records'}", f"MODEL_DIR={work / 'run'}"]
    config, text = gin_files.configure(
        "train.TrainConfig", gin_files=["gin_configs/experiments/builtin/pretrain.gin"], bindings=given
    )
    (work / "records" / builtin_corpus.NAME).mkdir(parents=True, exist_ok=True)
    make_records(work / "records", train_rows=config.train_steps * config.batch_size)
    loop.train(config, config_text=text)
    shapes = prepare(config).abstract.parameters
    last = Path(config.model_dir) / "checkpoints" / str(config.train_steps)
    npz.save_npz(builtin.student_path(), opening.load_parameters(last, like=shapes), dtype="float32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="folder of the records and the run")
    arguments, rest = parser.parse_known_args()
    run(arguments.work, [flag.removeprefix("--gin.") for flag in rest])
