"""Records of SVAMP to train on, or random text of the same lengths if the release or T5's vocabulary is missing."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"
RELEASE, VOCABULARY = SHARED / "data" / "dss", SHARED / "vocab" / "t5" / "sentencepiece.model"


def vocabulary() -> str:
    """Returns T5's vocabulary if its file exists, else the byte vocabulary."""
    return str(VOCABULARY) if VOCABULARY.is_file() else "byte"


def read(*, released: bool = True) -> tuple[list, str]:
    """Returns the records of the training split, and a description of them. Random ones unless `released`."""
    import numpy as np

    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.data import records, registry, release

    if released and RELEASE.is_dir() and VOCABULARY.is_file():
        with tempfile.TemporaryDirectory() as folder:
            release.import_release(registry.get("svamp"), release_dir=RELEASE, records_dir=folder, parser="strict")
            return list(records.read_records(Path(folder) / "svamp" / "train.jsonl")), "SVAMP, T5's vocabulary"
    # One byte is one token: these numbers of characters are docs/lengths.md's numbers of tokens, less prefix and EOS.
    random = np.random.default_rng(0)

    def text(*, mean: float, spread: float, least: int, most: int, of: str = "abcdefghij") -> str:
        length = int(np.clip(random.normal(mean, spread), least, most))
        return "".join(random.choice(list(of), length))

    rows = [
        records.Record(
            id=f"svamp-{number}",
            input=text(mean=33, spread=10, least=12, most=73),
            label=text(mean=10, spread=3, least=5, most=18, of="123456789"),
            teacher_text="",
            rationale=text(mean=38, spread=20, least=8, most=98),
            teacher_label="0",
            outcome=records.OK,
        )
        for number in range(800)
    ]
    return rows, "random text of the lengths of SVAMP, bytes as tokens"


def write(folder: Path, **splits: Sequence) -> None:
    """Writes records of each split, as `RECORDS_DIR` expects them."""
    from sbs_jax.data import records

    (folder / "svamp").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        records.write_records(folder / "svamp" / f"{split}.jsonl", rows)
