"""Records of the real release, imported once per process, for every test file that reads them."""

from pathlib import Path

import pytest

from sbs_jax.data import registry, release
from sbs_jax.data.records import Manifest

_made: dict[tuple[str, str], tuple[Manifest, Path]] = {}


def imported(
    name: str, parser: str, *, release_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Path]:
    """Returns the manifest of a dataset's records and the records directory, which tests must not change."""
    if (name, parser) not in _made:
        folder = tmp_path_factory.mktemp(f"{name}-{parser}")
        dataset = registry.get(name)
        manifest = release.import_release(dataset, release_dir=release_dir, records_dir=folder, parser=parser)
        _made[name, parser] = manifest, folder
    return _made[name, parser]
