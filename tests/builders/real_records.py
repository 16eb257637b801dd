"""Records of the real release, imported once per run of pytest, for every test file that reads them."""

from pathlib import Path

import pytest

from builders import shared
from sbs_jax.data import records, registry, release
from sbs_jax.data.records import Manifest


def imported(
    name: str, parser: str, *, release_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Path]:
    """Returns the manifest of a dataset's records and the records directory, which tests must not change."""

    def make(folder: Path) -> None:
        release.import_release(registry.get(name), release_dir=release_dir, records_dir=folder, parser=parser)

    folder = shared.folder_of(f"{name}-{parser}", make, tmp_path_factory)
    return records.read_manifest(folder / name), folder
