"""Settings of every test: 8 virtual CPU devices, checked shapes, no implicit rank promotion.

The settings are made before anything imports `sbs_jax`. They are JAX settings of this process, not
environment variables, so that a command line started by a test sees the machine as its user would;
only the platform is inherited.
"""

import gc
import logging
import os
import random
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["SBS_COMPILED"] = "off"  # no test writes to the user's cache

import processes

os.environ["XLA_FLAGS"] = processes.QUICK

import jax
import jaxtyping
import pytest
import shapes

gc.disable()  # until the tests are collected: imports leave next to no garbage, and looking for it took a fifth of them
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # reads the flags, which must not reach command lines that tests start
del os.environ["XLA_FLAGS"]
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same toy again. One folder for all workers of a run of pytest, whose first process made it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="sbs-jax-compiled-")
    os.environ["SBS_TESTS_COMPILED"] = _COMPILED.name
processes.write_whole_entries()
jax.config.update("jax_compilation_cache_dir", os.environ["SBS_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# beartype, not typeguard 4: that one reads shape strings such as "B T" as Python and fails on them.
jaxtyping.install_import_hook("sbs_jax", "beartype.beartype")
shapes.only_where_there_are_some()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, metavar="N", help="cases of each fuzz test (default: 400; CI: 10,000)")
    parser.addoption("--fuzz-seed", metavar="N", help="which cases: a number (default: 0), or 'random'")


REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what only `-m` chooses: `make test-faults`, `make test-teacher` and `make test-wheel`."""
    hidden = [name for name in ("faults", "teacher", "wheel") if name not in config.option.markexpr]
    chosen = [item for item in items if not any(map(item.get_closest_marker, hidden))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects garbage again from here on, also in the process that only hands out tests to workers."""
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Hides imported objects from the garbage collector, which saves a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 10)


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Restores log levels, which commands called in this process change."""
    loggers = [logging.getLogger(name) for name in ("sbs_jax", "absl")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """Folder of the released teacher outputs (`<name>/<name>_test.json`, `<name>/llm/*.json`)."""
    path = SHARED / "data" / "dss"
    if not path.is_dir():
        pytest.skip("the released teacher outputs are not in ../shared/data/dss")
    return path


@pytest.fixture(scope="session")
def real_vocab() -> Path:
    """File of the T5 SentencePiece model (32,000 pieces)."""
    path = SHARED / "vocab" / "t5" / "sentencepiece.model"
    if not path.is_file():
        pytest.skip("the T5 vocabulary is not in ../shared/vocab/t5/sentencepiece.model")
    return path


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Starter]:
    """Starts `sbs` processes from a server with everything imported, shared by all pytest workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with processes.server(folder) as address:
        yield processes.Starter(address=address, compiled=folder / "compiled")


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory):
    """Configuration of a finished run of 6 steps on the toy data; tests must not change it."""
    import toy
    from builders import shared

    from sbs_jax.training import loop

    def make(folder: Path) -> None:
        loop.train(toy.config(folder / "run", toy.write_records(folder / "records")), config_text="")

    folder = shared.folder_of("toy_run", make, tmp_path_factory)
    return toy.config(folder / "run", folder / "records")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    import fuzzing

    with fuzzing.scratch() as folder:
        yield folder


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a case of a fuzz test (tests/fuzzing.py) as often as the options say, or `one_in` so many times."""
    import fuzzing

    chosen = request.config.getoption("--fuzz-seed") or "0"
    start = random.SystemRandom().randrange(2**32) if chosen == "random" else int(chosen)
    print(f"--fuzz-seed {start}")  # shown where the test fails
    cases = request.config.getoption("--fuzz-cases") or fuzzing.CASES
    return lambda case, one_in=1: fuzzing.run(case, name=request.node.name, cases=-(-cases // one_in), start=start)
