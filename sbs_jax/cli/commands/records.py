"""`sbs records`: import existing teacher outputs as records."""

import argparse
import json
from typing import Any


def add(command: Any) -> None:
    records = command("records", run, "Import existing teacher outputs (official release layout or TFDS) as records.")
    records.add_argument("--dataset", required=True, help="dataset name: esnli, anli1, cqa, svamp")
    records.add_argument("--release", required=True, metavar="DIR", help="folder of the release (has <dataset>/)")
    records.add_argument("--records_dir", required=True, metavar="DIR", help="where to write <dataset>/*.jsonl")
    records.add_argument("--parser", choices=("strict", "official"), default="strict", help="parser of the replies")
    records.add_argument("--inputs", choices=("release", "tfds"), default="release", help="source of the inputs")
    records.add_argument("--overwrite", action="store_true", help="replace records of another parser or source")


def run(arguments: argparse.Namespace) -> int:
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.data import registry, release

    manifest = release.import_release(
        registry.get(arguments.dataset),
        release_dir=arguments.release,
        records_dir=arguments.records_dir,
        parser=arguments.parser,
        inputs=arguments.inputs,
        overwrite=arguments.overwrite,
    )
    print(json.dumps(manifest, indent=1, default=str))
    return 0
