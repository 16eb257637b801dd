"""scripts/vertex_job.yaml as docs/howto/vertex.md fills it in: valid for the API, on machines that exist, startable.

goldens/vertex_custom_job.json is the schema of CustomJobSpec in google-cloud-aiplatform 2.7.0. That package stays out:
it wants google-genai below 3, and `sbs teach` wants 3.
"""

import copy
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sbs_jax.cli import main
from sbs_jax.training import gin_files

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/howto/vertex.md").read_text("utf-8")
GOLDEN = json.loads((ROOT / "tests/goldens/vertex_custom_job.json").read_text("utf-8"))


def schema_of(message: Any) -> dict[str, Any]:
    """Makes the JSON schema of a protobuf message, from its descriptor; only camelCase names, as gcloud wants."""
    if message.full_name == "google.protobuf.Duration":
        return {"type": "string", "pattern": r"^\d+(\.\d{1,9})?s$"}
    fields = {}
    for field in message.fields:
        if field.message_type is not None:
            schema = schema_of(field.message_type)
        elif field.enum_type is not None:
            schema = {"enum": [value.name for value in field.enum_type.values]}
        else:
            kinds = {field.TYPE_STRING: "string", field.TYPE_BOOL: "boolean"}
            schema = {"type": kinds.get(field.type, "integer")}
        fields[field.json_name] = {"type": "array", "items": schema} if field.is_repeated else schema
    return {"type": "object", "additionalProperties": False, "properties": fields}


def test_the_schema_is_that_of_the_client_library() -> None:
    types = pytest.importorskip(
        "google.cloud.aiplatform_v1.types", reason="google-cloud-aiplatform excludes google-genai 3, which is installed"
    )
    assert schema_of(types.CustomJobSpec.pb(types.CustomJobSpec()).DESCRIPTOR) == GOLDEN


@pytest.fixture(scope="module", params=["vertex.yaml", "vertex_16.yaml"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job's file as the page's commands write it."""
    folder = tmp_path_factory.mktemp("vertex")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
    edits = re.findall(r"^sed (?:.*\\\n)*.*$", blocks, flags=re.MULTILINE)
    assert len(edits) == 2
    given = {"SBS_IMAGE": "us-west4-docker.pkg.dev/my-project/sbs/sbs:1a2b3c4", "SBS_BUCKET": "my-project-sbs"}
    given |= {"SBS_ACCOUNT": "sbs-train@my-project.iam.gserviceaccount.com", "PATH": "/usr/bin:/bin"}
    (folder / "scripts").symlink_to(ROOT / "scripts")
    subprocess.run(["bash", "-euc", "\n".join(edits)], cwd=folder, env=given, check=True)
    return yaml.safe_load((folder / request.param).read_text("utf-8"))


def test_a_job_is_one_that_vertex_takes(job: dict[str, Any]) -> None:
    jsonschema.validate(job, GOLDEN)
    text = yaml.safe_dump(job)
    assert not re.search(r"\b(IMAGE|BUCKET|ACCOUNT)\b", text)
    (pool,) = job["workerPoolSpecs"]
    assert pool["replicaCount"] == 1
    assert "command" not in pool["containerSpec"]  # it would replace tini, which passes SIGTERM on


def test_a_job_names_machines_of_the_page(job: dict[str, Any]) -> None:
    (pool,) = job["workerPoolSpecs"]
    machine, topology = pool["machineSpec"]["machineType"], pool["machineSpec"]["tpuTopology"]
    rows = re.findall(r"^\| (`ct.*?) \| ([\dx, ]+) \| ([\d, ]+) \|$", PAGE, flags=re.MULTILINE)
    hosts = {
        (kind, grid): int(number)
        for kinds, grids, numbers in rows
        for kind in re.findall(r"`(.*?)`", kinds)
        for grid, number in zip(grids.split(", "), numbers.split(", "), strict=True)
    }
    assert len(hosts) == 18
    for (kind, grid), number in hosts.items():
        chips = int(re.findall(r"-(\d)t$", kind)[0])
        assert chips * number == math.prod(map(int, grid.split("x"))), (kind, grid)
    several = hosts[machine, topology] > 1
    assert ("--multihost" in pool["containerSpec"]["args"]) == several
    assert (job["scheduling"]["strategy"] == "SPOT") != several


def test_a_job_can_start(job: dict[str, Any]) -> None:
    """Through the real parser, and gin files with their bindings to a configuration."""
    program, *words = job["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert (program, words[0]) == ("sbs", "train")
    arguments, rest = main._parser()[0].parse_known_args(words)
    assert all(word.startswith("--gin.") for word in rest)
    config, _ = gin_files.configured("train.TrainConfig", arguments, [word.removeprefix("--gin.") for word in rest])
    assert config.model_dir.startswith("gs://my-project-sbs/runs/esnli")
    for path in (config.data.records_dir, config.data.vocabulary, config.initial_checkpoint_path):
        assert path.startswith("gs://my-project-sbs/")


def pool(job: dict[str, Any]) -> dict[str, Any]:
    return job["workerPoolSpecs"][0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda job: job.update(service_account="a"), "'service_account' was unexpected"),
        (lambda job: job["scheduling"].update(restartJobOnWorkerRestrt=True), "'restartJobOnWorkerRestrt' was unexp"),
        (lambda job: job["scheduling"].update(timeout=86400), "86400 is not of type 'string'"),
        (lambda job: job["scheduling"].update(timeout="1d"), "'1d' does not match"),
        (lambda job: job["scheduling"].update(strategy="PREEMPTIBLE"), "'PREEMPTIBLE' is not one of"),
        (lambda job: job.update(workerPoolSpecs=pool(job)), "is not of type 'array'"),
        (lambda job: pool(job)["machineSpec"].update(tpuTopology=16), "16 is not of type 'string'"),
        (lambda job: pool(job)["containerSpec"].update(args="sbs train"), "'sbs train' is not of type 'array'"),
        (lambda job: pool(job)["containerSpec"].update(env={"A": "b"}), "is not of type 'array'"),
    ],
)
def test_a_wrong_job_would_be_seen(
    job: dict[str, Any], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    wrong = copy.deepcopy(job)
    change(wrong)
    with pytest.raises(jsonschema.ValidationError, match=re.escape(complaint)):
        jsonschema.validate(wrong, GOLDEN)
