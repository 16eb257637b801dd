"""TPU chips and topologies: memory, rates and prices from the dated table `chips.json`."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax import checks

GIB = 2**30
# Use libtpu as a compiler only: do not look for a TPU, let other processes load it too, write no log files, and send
# warnings (such as a sharding it cannot keep) to standard error. Set these before libtpu is loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
}
_NAME = re.compile(r"([a-z0-9]+):(\d+(?:x\d+){1,2})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU generation. Rates and memory are per chip unless the comment says per device (as JAX counts them)."""

    name: str
    kinds: tuple[str, ...]  # JAX's names of its devices
    shapes: tuple[str, ...]  # slices on offer
    devices: int  # per chip
    options: Mapping[str, Any]  # libtpu needs them with the topology's name
    peak_flops: float  # bfloat16, per second
    flops_per_cycle: int  # per device, at that peak
    memory_gib: float
    available_gib: float  # per device, to a program
    links: float  # bytes per second from one chip to its neighbors
    network: float  # bytes per second to other slices
    on_demand: float  # USD per chip and hour
    three_years: float

    @property
    def clock(self) -> float:
        """Returns cycles per second."""
        return self.peak_flops / (self.flops_per_cycle * self.devices)


@functools.cache
def table() -> dict[str, Any]:
    """Reads `chips.json`: date, sources and chips."""
    return json.loads((Path(__file__).parent / "chips.json").read_text("utf-8"))


def known() -> dict[str, Chip]:
    """Returns the chips by generation."""
    return {
        name: Chip(name=name, **{**fields, "kinds": tuple(fields["kinds"]), "shapes": tuple(fields["shapes"])})
        for name, fields in table()["chips"].items()
    }


def peak_flops(kind: str) -> float | None:
    """Returns the bfloat16 peak of a JAX device by its `device_kind`, per second; None if it is not known (a CPU)."""
    for chip in known().values():
        if kind in chip.kinds:
            return chip.peak_flops / chip.devices
    return next((peak for name, peak in table()["gpus"].items() if kind.startswith(name)), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal slices of chips: for example 2 of v5e:4x4."""

    name: str
    chip: Chip
    slices: int = 1

    @property
    def chips(self) -> int:
        """Counts the chips of all slices."""
        return self.slices * math.prod(int(n) for n in self.name.partition(":")[2].split("x"))

    @property
    def title(self) -> str:
        """Returns "v5e:4x4", or "2 x v5e:4x4"."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    def describe(self) -> list[Any]:
        """Describes its absent devices. ValueError with the available shapes if libtpu has no such slice."""
        os.environ.update(ENVIRONMENT)
        from jax.errors import JaxRuntimeError
        from jax.experimental import topologies

        options = dict(self.chip.options) | ({"num_slices": self.slices} if self.slices > 1 else {})
        try:
            description = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except JaxRuntimeError as error:
            reason = str(error).partition(": ")[2].partition("\n")[0]
            raise ValueError(
                f"libtpu refuses {self.title}: {reason}. Shapes of {self.chip.name}: {', '.join(self.chip.shapes)}."
            ) from error
        return list(description.devices)


def topology(name: str, *, slices: int = 1) -> Topology:
    """Parses a name such as "v5e:4x4" or "v5p:2x2x2". ValueError lists the known names."""
    chips = known()
    match = _NAME.fullmatch(name)
    generation = name.partition(":")[0]
    if match is None or generation not in chips:
        names = [f"{chip}:{shape}" for chip, fields in chips.items() for shape in fields.shapes]
        hint = checks.nearest(name.replace("-", ":"), names)
        lines = "".join(f"\n  {chip}: {' '.join(fields.shapes)}" for chip, fields in chips.items())
        raise ValueError(f"Unknown topology {name!r}; expected CHIP:SHAPE of these:{lines}\n{hint.strip()}".rstrip())
    dimensions = {shape.count("x") for shape in chips[generation].shapes}
    shape = [int(n) for n in match[2].split("x")]
    if 0 in shape or len(shape) - 1 not in dimensions:
        raise ValueError(
            f"Topology {name!r}: expected {dimensions.pop() + 1} sizes of at least 1; shapes of {generation}: "
            f"{', '.join(chips[generation].shapes)}."
        )
    if slices < 1:
        raise ValueError(f"Got {slices} slices; expected at least 1.")
    return Topology(name, chips[generation], slices)


def check_compiler() -> None:
    """Raises ModuleNotFoundError with the install command if libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "sbs plan needs the TPU compiler, which is not installed. It needs Linux, 600 MB on disk and no TPU: "
            "pip install 'sbs-jax[plan]'"
        )
