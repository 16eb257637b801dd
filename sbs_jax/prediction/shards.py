"""Shards of an output: each of several processes answers a block of the input and writes it to a file of its own.

`answers.jsonl-00000-of-00002` and `answers.jsonl-00001-of-00002`, one after the other, are the `answers.jsonl` of a
single process. A block is made of whole windows (files.py), so that batches are those of a single process too.
"""

import dataclasses
import re
from pathlib import Path

PARTIAL = ".partial"  # ending of a journal (outputs.py)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` parts of an output; a single part is the whole."""

    index: int = 0
    count: int = 1

    def file(self, output: Path) -> Path:
        """Returns the file of this shard: `output` itself if there is only one."""
        return output if self.count == 1 else output.with_name(f"{output.name}-{self.index:05d}-of-{self.count:05d}")

    def files(self, output: str | Path) -> str:
        """Names the files of all shards, for messages."""
        return str(output) if self.count == 1 else f"{output}-*-of-{self.count:05d}"

    def windows(self, total: int) -> range:
        """Returns the windows of this shard out of `total`: blocks of equal size, to within one."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def check_count(self, output: Path) -> None:
        """Refuses shards and journals of another number of processes beside `output`; FileExistsError names one.

        Readers of `<output>-*` would take those of both.
        """
        pattern = re.compile(rf"{re.escape(output.name)}(?:-\d{{5}}-of-(\d{{5}}))?(?P<partial>{re.escape(PARTIAL)})?")
        for path in sorted(output.parent.iterdir()) if output.parent.is_dir() else ():
            match = pattern.fullmatch(path.name)
            count = int((match and match[1]) or 1)
            if match is None or count == self.count:
                continue
            of, now = _processes(count), _processes(self.count)
            if match["partial"]:
                raise FileExistsError(
                    f"{path} holds answers of an interrupted run of {of}, and this one has {now}. Repeat it with {of} "
                    "to resume it, or remove the files of that run to start again."
                )
            raise FileExistsError(
                f"{path} is the output of {of}, and this run has {now}, whose files would lie beside it. Choose "
                "another --output, or remove the earlier files."
            )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
