"""TPU generations: what one chip is and costs, from the dated table `chips.json`, and the names of topologies."""

import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 2**30
# libtpu as a compiler alone: look for no TPU, let other processes do the same at once, keep no log files, and say
# warnings (a sharding that it cannot keep to is one) to standard error. To be set before it is loaded.
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
    """One generation. Rates and memory are per chip, except where `devices` (as JAX counts them) is said."""

    name: str
    shapes: tuple[str, ...]  # the slices that are offered
    devices: int  # per chip
    options: Mapping[str, Any]  # that libtpu wants with the topology's name
    peak_flops: float  # bfloat16, per second
    flops_per_cycle: int  # of one device, at that peak
    memory_gib: float
    available_gib: float  # of one device, to a program
    links: float  # bytes per second that one chip sends to its neighbours
    network: float  # and to other slices
    on_demand: float  # USD per chip and hour
    three_years: float

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak_flops / (self.flops_per_cycle * self.devices)


@functools.cache
def table() -> dict[str, Any]:
    """`chips.json` as it is: its date, its sources and its chips."""
    return json.loads((Path(__file__).parent / "chips.json").read_text("utf-8"))


def known() -> dict[str, Chip]:
    """Generation to what is known of it."""
    return {
        name: Chip(name=name, **{**fields, "shapes": tuple(fields["shapes"])})
        for name, fields in table()["chips"].items()
    }


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` times a box of chips, for example 2 of v5e:4x4."""

    name: str
    chip: Chip
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(int(n) for n in self.name.partition(":")[2].split("x"))

    @property
    def title(self) -> str:
        """v5e:4x4, or 2 x v5e:4x4."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    def describe(self) -> list[Any]:
        """Its devices, absent though they are. ValueError, with the shapes on offer, where libtpu knows no such box."""
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
    """The topology of a name such as "v5e:4x4" or "v5p:2x2x2". ValueError with the names that are known."""
    chips = known()
    match = _NAME.fullmatch(name)
    generation = name.partition(":")[0]
    if match is None or generation not in chips:
        names = [f"{chip}:{shape}" for chip, fields in chips.items() for shape in fields.shapes]
        near = difflib.get_close_matches(name.replace("-", ":"), names, n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
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
    """ModuleNotFoundError, with the command to install it, where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "sbs plan asks the TPU compiler, which is not installed. It needs Linux, 600 MB on disk and no TPU: "
            "pip install libtpu"
        )
