"""`sbs records`: teacher outputs that exist already, as records."""

import argparse
import json
from typing import Any


def add(command: Any) -> None:
    records = command("records", run, "Import teacher outputs (official release layout or TFDS) as records.")
    records.add_argument("--dataset", required=True, help="name of a dataset: esnli, anli1, cqa, svamp")
    records.add_argument("--release", required=True, metavar="DIR", help="folder that holds <name>/ of the release")
    records.add_argument("--records_dir", required=True, metavar="DIR", help="where to write <dataset>/*.jsonl")
    records.add_argument("--parser", choices=("strict", "official"), default="strict", help="how replies are read")
    records.add_argument("--inputs", choices=("release", "tfds"), default="release", help="where inputs come from")
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
