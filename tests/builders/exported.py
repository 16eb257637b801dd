"""Exports of a student, and their answers in a Python that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import students

from sbs_jax.export import convert

ANSWER = """
import importlib.abc, json, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} must not be needed")

sys.meta_path.insert(0, Refused())
sys.path.insert(0, sys.argv[1])
import run
texts = json.loads(sys.argv[2])
found = {"answer": run.answer(texts)}
if run.CARD["rationale"] is not None and "rationale" in run.model.TASKS:
    found["rationale"] = run.answer(texts, rationale=True)
import metrics
found["graded"] = metrics.accuracy([text for text, _ in found["answer"]], [text for text, _ in found["answer"]])
assert not {name.partition(".")[0] for name in sys.modules} & set(REFUSED)
print(json.dumps(found))
"""
REFUSED = ("sbs_jax", "tasks", "flax", "tensorflow", "seqio", "transformers", "torch")


def answered(artefact: Path, *, also_refused: tuple[str, ...] = ()) -> dict:
    """Runs an artefact on `students.TEXTS` in a Python that cannot import this package."""
    program = f"REFUSED = {REFUSED + also_refused!r}\n{ANSWER}"
    arguments = ["-I", "-c", program, str(artefact), json.dumps(students.TEXTS)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": processes.QUICK}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def converted(source: Path, target: Path, to_form: str = "stablehlo", **changes) -> dict:
    """Runs `sbs convert` with these options; programs take 4 rows of 20 tokens."""
    options = {"shapes": [(4, 20)] if to_form == "stablehlo" else (), **changes}
    return convert.convert(str(source), str(target), convert.Options(to_form=to_form, **options))
