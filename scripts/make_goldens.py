"""Records the answers of PyTorch and transformers to the cases of the parity tests, for machines without them.

    make test-parity; .venv/bin/python scripts/make_goldens.py     # writes tests/goldens/<case>.npz

Run it again when a case changes; `make test-parity` fails if a recording differs from PyTorch.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import parity_cases as cases
import torch_reference as reference


def main() -> None:
    cases.GOLDENS.mkdir(exist_ok=True)
    for case in cases.CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = reference.exported(case, Path(folder) / "exported")
            recorded = reference.answers(model)
            if case in cases.TRAINED:
                recorded |= reference.training(model)
        np.savez_compressed(cases.GOLDENS / f"{case}.npz", allow_pickle=False, **recorded)
        size = (cases.GOLDENS / f"{case}.npz").stat().st_size
        print(f"{case}: {len(recorded)} arrays, {size / 1000:.0f} kB; beam search: {recorded['beam'][0].tolist()}")


if __name__ == "__main__":
    main()
