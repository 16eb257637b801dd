"""Cases for the fuzz tests: choices read from bytes, hostile values, damage to valid inputs, and guards.

hypothesis draws a case as bytes, and makes zeros of those that do not matter to a failure. A `Tape` reads them as
choices; where they are zeros, or at their end, every choice is the first one, which is the harmless one. So a case is
damage to a valid input, and a failure comes down to the one piece of damage that matters.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

# hypothesis stores what it found in the sources there, outside the checkout.
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis-of-sbs")

CASES = 400
# Processor seconds of one case, after which it counts as a hang. The longest takes 0.1 s here.
PATIENCE = 20.0
# Seconds after which a case that takes no processor time counts as one.
_WAITING = 60.0
# Bytes of address space that a reader may take beyond what the process has.
ROOM = 3 * 2**30
_LINE = ROOM + 2**27  # bytes of one line, more than fits
# Characters of a message: only a part of the value is shown.
LONGEST_MESSAGE = 4_000
# One drawing serves so many cases, which read it from different places: drawing takes longer than most readers.
_CASES_PER_DRAWING = 4
_BYTES_PER_CASE = 32

# Every payload creates this file when it is executed.
CANARY = Path(tempfile.gettempdir()) / f"sbs-input-was-run-{os.getpid()}"
_TOUCH = f"touch {CANARY}"
PROGRAMS = (
    f"__import__('os').system('{_TOUCH}')",
    f"$({_TOUCH})",
    f"`{_TOUCH}`",
    f"; {_TOUCH} #",
    f"!!python/object/apply:os.system ['{_TOUCH}']",
    f"cos\nsystem\n(S'{_TOUCH}'\ntR.",  # a pickle
    "@os.system()",
    "{{7*7}}${7*7}",
    "%(os.system)s {0.__class__}",
)
TEXTS = (
    *("", " ", "\n", "\t", "\r\n", "\x00", "\x0b\x0c\x1c\x85", "\u2028", "\ufeff", "\ufffe", "\u202eabc", "e\u0301"),
    *("\ud800", "\udfff\ud800", "\U0001f600", "١٢٣", "½²", "None", "null", "NaN", "1e9", "-0", "../../x"),
    "/etc/passwd",
    *("a/b\\c", "'", '"', "\\", "</s>", "<script>", "{}", "{input}", "%s", "__proto__", "(", ")", "#", "=", ",", "Q:"),
    *("Answer:", "So the answer is", "The answer is", "(a)", "(1 + 2)", "1/0", "9**9**9", "x" * 9_000, "(" * 9_000),
    *PROGRAMS,
)
# Pieces of valid and of invalid JSON.
_DEEP = 10_000
FRAGMENTS = (
    *("null", "true", "false", "0", "-1", "1", "2", "1.5", "1e400", "-0.0", "NaN", "Infinity", "-Infinity", "1e-400"),
    *("1" * 400, "1" * 5_000, str(2**60), str(2**63), str(-(2**64)), "[]", "{}", "[[]]", "[null]", '{"a": 1}'),
    *('""', '" "', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\\ud83d\\ude00"', '["a", 1]', "[1, 2]", "[0, -1]"),
    *("[" * _DEEP + "]" * _DEEP, "[" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * 400 + "]" * 400),
    *("[" * 900 + "]" * 900, '{"a":' * 930 + "1" + "}" * 930, '"' + "x" * 20_000 + '"', "[" + "1," * 5_000 + "1]"),
    *("undefined", "'text'", "0x10", "01", "1_000", "1,", "", "{", '"', "\\", "/* */ 1", '"\x01"', "\ufeff1"),
    *(json.dumps(text) for text in PROGRAMS),
)
_BYTES = (
    *(b"", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xfe\xff", b"\r", b"\n", b"\r\n", b" ", b","),
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b":", b"\x80", b"\xf4\x90\x80\x80", b"\x1b", b"9" * 5_000, b"\x00" * 64),
    *(b"\xff" * 8, b"\xe2\x80\xa8", b"//", b"#", b"NaN", b"\\u", b"\\ud800", b"x" * 30_000, b"[" * _DEEP),
)


class Tape:
    """Reads choices from bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, count: int) -> int:
        """Draws a number from 0 to `count` - 1."""
        size = 1 if count <= 256 else 4
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little") % count if part else 0

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]

    def chance(self, one_in: int) -> bool:
        """Returns True about once in so many calls; False when the bytes are used up."""
        return self.below(256) > 255 - 256 // one_in

    def text(self) -> str:
        """Draws one text or several, hostile ones among them."""
        found = self.one_of(TEXTS)
        while self.chance(3):
            found += self.one_of(TEXTS)
        return found


# ------------------------------------------------------------------------------------------ JSON


class Fragment(str):
    """A piece of JSON that is written verbatim."""


class Pairs(list):
    """A JSON object as a list of [name, value], so that a name can occur twice."""


def tree(value: Any) -> Any:
    """Copies a JSON value, with objects as `Pairs`, so that it can be damaged."""
    if isinstance(value, dict):
        return Pairs([name, tree(each)] for name, each in value.items())
    if isinstance(value, list | tuple):
        return [tree(each) for each in value]
    return value


def written(node: Any) -> str:
    """Writes a tree as JSON; fragments make it invalid."""
    if isinstance(node, Fragment):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)}: {written(value)}" for name, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(written, node)) + "]"
    return json.dumps(node, ensure_ascii=False)


def places(node: Any, found: list[tuple[list, int]] | None = None) -> list[tuple[list, int]]:
    """Lists the place of every value below a node: a list and an index."""
    found = [] if found is None else found
    if isinstance(node, Pairs):
        for pair in node:
            found.append((pair, 1))
            places(pair[1], found)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            found.append((node, index))
            places(value, found)
    return found


def _containers(node: Any) -> list[list]:
    found = [node] if isinstance(node, list) else []
    for holder, index in places(node):
        if isinstance(holder[index], list):
            found.append(holder[index])
    return found


def put_leaf(tape: Tape, node: Any, leaves: Sequence[Any]) -> None:
    """Puts one of the leaves in some place below a node, every second time."""
    slots = places(node)
    if slots and tape.chance(2):
        holder, index = tape.one_of(slots)
        holder[index] = tape.one_of(leaves)


def damaged(tape: Tape, value: Any, *, most: int = 3, fragments: Sequence[str] = FRAGMENTS) -> Any:
    """Damages a value in up to `most` places: wrong types, names missing, unknown or doubled, and so on."""
    node: Any = [tree(value)]
    for _ in range(most):
        kind = tape.below(9)
        slots = places(node)
        holder, index = tape.one_of(slots)
        if kind == 1:
            holder[index] = Fragment(tape.one_of(fragments))
        elif kind == 2:
            other, place = tape.one_of(slots)
            holder[index] = tree_copy(other[place])
        elif kind == 3:
            containers = [each for each in _containers(node[0]) if each]
            if containers:
                inside = tape.one_of(containers)
                del inside[tape.below(len(inside))]
        elif kind == 4:
            containers = [each for each in _containers(node[0]) if isinstance(each, Pairs)]
            if containers:
                inside = tape.one_of(containers)
                name = tape.one_of(inside)[0] if inside and tape.chance(2) else tape.text()
                inside.append([name, Fragment(tape.one_of(fragments))])
        elif kind == 5:
            pairs = [pair for each in _containers(node[0]) if isinstance(each, Pairs) for pair in each]
            if pairs:
                pair = tape.one_of(pairs)
                pair[0] = tape.text() if tape.chance(2) else pair[0][:-1]
        elif kind == 6:
            holder[index] = [holder[index]] if tape.chance(2) else Pairs([[tape.text(), holder[index]]])
        elif kind == 7:
            if isinstance(holder[index], str) and not isinstance(holder[index], Fragment):
                cut = tape.below(len(holder[index]) + 1)
                holder[index] = holder[index][:cut] + tape.text() + holder[index][cut:]
            else:
                holder[index] = tape.text()
        elif kind == 8 and isinstance(holder[index], int | float):
            holder[index] = tape.one_of((0, -1, 1, 2, holder[index] + 1, 1.0, True, 2**31, 2**60, 10**30, -0.5))
    return node[0]


def tree_copy(node: Any) -> Any:
    if isinstance(node, list):
        return type(node)(tree_copy(each) for each in node)
    return node


def encoded(text: str) -> bytes:
    """Encodes as UTF-8, unpaired surrogates included: a file can hold them, valid UTF-8 cannot."""
    return text.encode("utf-8", "surrogatepass")


def scratched(tape: Tape, data: bytes, *, most: int = 2) -> bytes:
    """Damages bytes in up to `most` places: cut short, pieces lost, doubled, inserted, a byte or bit changed."""
    for _ in range(most):
        kind = tape.below(12)
        if kind not in range(1, 8):
            continue
        at = tape.below(len(data) + 1)
        if kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + 1 + tape.below(16) :]
        elif kind == 3:
            data = data[:at] + tape.one_of(_BYTES) + data[at:]
        elif kind == 4:
            data = data[:at] + bytes([tape.below(256)]) + data[at + 1 :]
        elif kind == 5:
            piece = data[at : at + 1 + tape.below(256)]
            data = data[:at] + piece * (1 + tape.below(3)) + data[at:]
        elif kind == 6:
            data = data[:at] + bytes(b ^ (1 << tape.below(8)) for b in data[at : at + 1]) + data[at + 1 :]
        elif kind == 7:
            data = tape.one_of((b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data[at:], b"\n" + data, b""))
    return data


def lines(tape: Tape, rows: Sequence[Any], *, most: int = 3) -> bytes:
    """Writes rows as damaged JSON lines."""
    parts = []
    for _ in range(1 + tape.below(most)):
        row = tape.one_of(rows)
        parts.append(written(damaged(tape, row, most=2) if tape.chance(2) else tree(row)))
    between = tape.one_of(("\n",) * 8 + ("\r\n", "\n\n", "\n \n", "\r", "\u2028", "", ","))
    return scratched(tape, encoded(between.join(parts) + ("" if tape.chance(4) else "\n")))


# ----------------------------------------------------------------------------------------- files

OTHERS = ("pipe", "zeros", "null", "folder", "line")


def put(tape: Tape, path: Path, data: bytes, *, any_size: bool = False) -> None:
    """Writes the file of a case; in one of a hundred, something else stands there (`OTHERS`).

    A file of weights may have `any_size`: it is mapped or read by slices, and one larger than memory is no fault.
    """
    replace(path, data)
    if not tape.chance(100):
        return
    stand(path, tape.one_of([other for other in OTHERS if not (any_size and other == "line")]))


def stand(path: Path, other: str) -> None:
    """Puts one of `OTHERS` in the place of a file."""
    path.unlink(missing_ok=True)
    if other == "pipe":
        os.mkfifo(path)
    elif other in ("zeros", "null"):
        path.symlink_to(f"/dev/{other.removesuffix('s')}")
    elif other == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, _LINE)


def replace(path: Path, data: bytes) -> None:
    """Writes a file in the place of whatever `put` left there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.is_symlink() or (path.exists() and not path.is_file()):
        path.unlink()
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------- guards


class HangError(BaseException):
    """Reports a case that took too long. Not an Exception, so no reader can catch it as its own."""


class ExecutedError(BaseException):
    """Reports an input that did something that reading never does."""


_FORBIDDEN = frozenset(
    {
        *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
        "pty.spawn",
        *("pickle.find_class", "socket.connect", "socket.bind", "os.remove", "os.rmdir", "os.rename", "shutil.rmtree"),
        *("os.truncate", "os.chmod", "os.symlink", "os.link", "os.putenv", "code.__new__", "ctypes.dlsym"),
    }
)
# These generate functions from text when they first meet a class or a signature.
_WRITERS_OF_CODE = frozenset({"beartype", "collections", "dataclasses", "jaxtyping", "typing"})
_watching = False
_may_write: tuple[str, ...] = ()  # beginnings of paths
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Watches Python's audit events (PEP 578) while a case is read."""
    if not _watching:
        return
    # A descriptor is of a file that was opened here.
    if _may_write and arguments and (isinstance(arguments[0], int) or str(arguments[0]).startswith(_may_write)):
        return
    if event in _FORBIDDEN:
        raise ExecutedError(f"reading an input did {event}{arguments!r:.300}")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        raise ExecutedError(f"reading an input opened {arguments[0]!r} to write")
    # eval and exec of a text compile it under this name; other code has the name of its file.
    if event == "exec" and getattr(arguments[0], "co_filename", "") == "<string>":
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in _WRITERS_OF_CODE:
            return
        raise ExecutedError(f"reading an input ran the code {arguments[0]!r}")


def _out_of_patience(*_: object) -> None:
    raise HangError(f"not read within {PATIENCE:g} s of processor time, or {_WAITING:g} s of waiting")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Limits memory during a test, and checks that nothing touched the canary file."""
    if not getattr(sys, "_sbs_audited", False):
        sys.addaudithook(_audit)
        sys._sbs_audited = True  # type: ignore[attr-defined]  # a hook cannot be taken away, nor added twice
    CANARY.unlink(missing_ok=True)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # only Linux reports and enforces it
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    handlers = {each: signal.signal(each, _out_of_patience) for each in (signal.SIGVTALRM, signal.SIGALRM)}
    try:
        yield
        assert not CANARY.exists(), "an input was run"
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
        CANARY.unlink(missing_ok=True)


def read(
    reader: Callable[[], Any],
    *,
    raises: type[Exception] | tuple[type[Exception], ...],
    names: Any,
    writes: Path | None = None,
) -> Any:
    """Returns the reader's result or its declared error, whose message has one of `names` and is not too long.

    Everything else (another error, a hang, an input that runs) is a failure. Files below `writes` may be changed.
    """
    global _watching, _may_write
    # hypothesis raises the recursion limit above a command's.
    levels, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    sys.setrecursionlimit(depth + 960)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    signal.setitimer(signal.ITIMER_REAL, _WAITING)
    _may_write = () if writes is None else (f"{writes}/",)
    _watching = True
    try:
        return reader()
    except raises as error:
        told = str(error)
        _watching = False
        wanted = [str(name) for name in names]
        if not any(name in told for name in wanted):
            raise AssertionError(f"{type(error).__name__} {told[:500]!r} names none of {wanted}") from error
        if len(told) > LONGEST_MESSAGE:
            raise AssertionError(f"a message of {len(told)} characters: {told[:500]!r}") from error
        return error
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.setrecursionlimit(levels)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Makes a folder, in memory if possible, since the file of each case is written and read anew."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None, prefix="sbs-fuzz-") as name:
        yield Path(name)


def run(case: Callable[[Tape], Any], *, name: str, cases: int, start: int) -> None:
    """Runs `case` on so many tapes, the same ones for the same `start`; hypothesis shrinks a failure."""
    count, length = 0, _CASES_PER_DRAWING * _BYTES_PER_CASE

    @seed(zlib.crc32(name.encode()) + start)
    @settings(
        max_examples=-(-cases // _CASES_PER_DRAWING),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # type: ignore[reportArgumentType]  # its iterator is not typed
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @given(st.binary(min_size=length, max_size=length))
    def each(data: bytes) -> None:
        nonlocal count
        for start in range(0, length, _BYTES_PER_CASE):
            count += 1
            case(Tape(data[start:] + data[:start]))

    with guarded():
        each()
    assert count >= cases, f"{count} cases instead of {cases}"
