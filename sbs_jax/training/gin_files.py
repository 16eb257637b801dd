"""Configurations from gin files and bindings. No other module uses gin.

gin's dynamic registration lets a gin file import the modules it configures, so no function here is decorated, and
third-party callables (`@optax.adamw`) are bound directly.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import os
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sbs_jax import checks, hosts
from sbs_jax.checks import nearest
from sbs_jax.storage import json_files, user_files
from sbs_jax.training import declared

# First parts of gin selectors, and their modules.
MODULES = {
    "adapters": "sbs_jax.student.adapters",
    "datasets": "sbs_jax.data.registry",
    "decoder_only": "sbs_jax.student.decoder_only",
    "evaluate": "sbs_jax.training.evaluate",
    "partitioning": "sbs_jax.student.partitioning",
    "selection": "sbs_jax.data.selection",
    "t5": "sbs_jax.student.t5",
    "t5gemma": "sbs_jax.student.t5gemma",
    "t5x_model": "sbs_jax.training.t5x_model",
    "train": "sbs_jax.training.config",
}
# Imported for the command line, because bindings cannot contain imports.
_PRELUDE = ("adapters", "datasets", "decoder_only", "evaluate", "partitioning", "t5", "t5gemma", "train")
# Configuration classes. Each field is bound to the macro of its upper-case name, except for these.
CLASSES: dict[str, dict[str, str]] = {
    "train.TrainConfig": {
        "learning_rate": "%SCHEDULE",
        "data": "@datasets.DataOptions()",
        "execution": "@t5.Execution()",
        "layout": "@partitioning.Layout()",
    },
    "evaluate.EvaluateConfig": {
        "output_dir": "%EVAL_OUTPUT_DIR",
        "base": "%BASE_PATH",
        "layout": "@partitioning.Layout()",
    },
    "datasets.DataOptions": {},
    "t5.Execution": {},
}
_LONGEST = 3_000  # characters of an error; some of gin's quote the whole configuration
_NAME = re.compile(r"[\w.]+(/[\w.]+)*", re.ASCII)
_MISSING = re.compile(r"No module named 'sbs_jax\.(\w+)'")
_OLD_IMPORT = re.compile(r"^from sbs_jax import (\w+)$", re.MULTILINE)
# How gin begins its errors of a word without quotes, and of a missing file.
_TOKEN = re.compile(r"^malformed node .*\n\s*Failed to parse token (.*)")
_NO_FILE = "Unable to open file"
_REFERENCE = re.compile(r"[@%](?:[\w.]+/)*([\w.]+)")
_RECORDS = re.compile(r"^RECORDS_DIR = (\\\n)?.*$", re.MULTILINE)  # gin gives a long path a line of its own
_REQUIRED = re.compile(r"^([\w.]+) = %gin.REQUIRED$", re.MULTILINE)
_LEFT_SIDE = re.compile(r"^([\w./]+) =", re.MULTILINE)


class UsageError(Exception):
    """A mistake that the user can correct; printed without a traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..")


def configure(
    name: str,
    *,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str] = (),
    unread: Sequence[str] = (),
) -> tuple[Any, str]:
    """Returns an instance of a configuration class (`"train.TrainConfig"`) and the operative configuration as text.

    `bindings` are `NAME=value`. Later files and bindings override earlier ones, and all override the defaults of the
    class (`class_bindings`). Values that are not gin expressions are text, so `MODEL_DIR=/tmp/run` needs no quotes;
    `true` and `false` are True and False. A binding that nothing uses, an unknown name, a value of another type than
    its parameter declares, and a macro left at REQUIRED are errors, except for `unread` macros, which the command does
    not read.
    """
    import gin

    gin.clear_config()
    config = importlib.import_module("gin.config")
    if (opened, os.path.isfile) not in config._FILE_READERS:
        config._FILE_READERS.insert(0, (opened, os.path.isfile))
    # gin finds gin_configs/.. from any folder, because gin_configs is a package.
    for path in search_paths:
        gin.add_config_file_search_path(path)
    prelude = "from __gin__ import dynamic_registration\nimport optax\nimport tasks\n"
    prelude += "".join(f"{import_line(name)}\n" for name in _PRELUDE)
    prelude += "".join(f"{left} = {right}\n" for left, right in class_bindings(name).items())
    prelude += "".join(f"include {file!r}\n" for file in gin_files)
    text = prelude + "\n".join(quoted(binding) for binding in bindings) + "\n"
    with usage_errors():
        # An import applies to its own file only: the prelude's serve the command line, not included files.
        includes, _ = gin.parse_config(text)
        _refuse_foreign(config)
        missing = _REQUIRED.findall(gin.config_str())
        gin.parse_config("".join(f"{macro} = 'none'\n" for macro in missing if macro in unread))
        refuse_missing(name, [macro for macro in missing if macro not in unread])
        _refuse_other_types(config)
        instance = gin.get_configurable(name)()
        _refuse_urls(name.rpartition(".")[2], instance)
    texts = [text, *(_read(file) for file in _file_names(includes))]
    unused = _unused(gin.config_str(), gin.operative_config_str(), texts)
    if unused:
        known = sorted({m[1] for m in _LEFT_SIDE.finditer(gin.config_str())} - set(unused))
        raise UsageError(unused_text(unused, known=known))
    return instance, gin.operative_config_str()


def refuse_missing(name: str, macros: Sequence[str]) -> None:
    """Raises UsageError if there are macros without a value, with the flags that give them one."""
    if flags := " ".join(f"--gin.{macro}=.." for macro in macros):
        raise UsageError(f"{name} needs values that no gin file gives: {flags}")


def unused_text(unused: Iterable[str], *, known: Iterable[str]) -> str:
    """Returns the error about bindings that nothing uses, with the nearest of the known ones."""
    known = sorted(known)
    lines = [f"{binding}{nearest(binding, known)}" for binding in unused]
    return "Nothing uses these bindings; correct or remove them:\n  " + "\n  ".join(lines)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns every error of reading a configuration into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except tokenize.TokenError as error:
        raise UsageError(f"The configuration ends inside a bracket or a string: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise UsageError(f"The configuration is nested too deeply to read ({type(error).__name__}).") from error
    except (ImportError, ArithmeticError, LookupError) as error:
        moved = _MISSING.search(str(error))  # gin's error has no name
        if moved and moved[1] in MODULES:
            raise UsageError(f"{error}\nsbs_jax.{moved[1]} has moved. Write: {import_line(moved[1])}") from error
        raise UsageError(f"The configuration cannot be read: {type(error).__name__}: {error}") from error
    except (ValueError, SyntaxError, OSError, NameError, AttributeError, TypeError, RuntimeError) as error:
        text = str(error)
        if token := _TOKEN.search(text):
            text = f"{token[1]} is no value; expected True, False, None, a number, or text in quotes."
        elif text.startswith(_NO_FILE):
            text = f"{text.partition(chr(10))[0]} The ready ones are in gin_configs/experiments/."
        raise UsageError(text or f"The configuration cannot be read: {type(error).__name__}.") from error


def import_line(name: str) -> str:
    """Returns the gin import of the module that selectors call `name`.

    >>> import_line("train")
    'from sbs_jax.training import config as train'
    """
    package, _, module = MODULES[name].rpartition(".")
    return f"from {package} import {module}" + (f" as {name}" if module != name else "")


def with_new_imports(text: str) -> str:
    """Replaces imports of modules that have moved, in a configuration that an earlier version saved.

    >>> with_new_imports("from sbs_jax import train\n")
    'from sbs_jax.training import config as train\n'
    """
    return _OLD_IMPORT.sub(lambda match: import_line(match[1]) if match[1] in MODULES else match[0], text)


def class_bindings(name: str) -> dict[str, str]:
    """Returns the bindings of a configuration class, and of the classes that its fields hold, before any gin file.

    {"KEEP_BEST": "1", "train.TrainConfig.keep_best": "%KEEP_BEST", ..}: a new field has a macro with its default,
    without a line in a gin file. Fields without a default leave their macro undefined.
    """
    if name not in CLASSES:
        return {}
    module, _, class_name = name.partition(".")
    found: dict[str, str] = {}
    for field in dataclasses.fields(getattr(importlib.import_module(MODULES[module]), class_name)):
        value = CLASSES[name].get(field.name, f"%{field.name.upper()}")
        found[f"{name}.{field.name}"] = value
        if value.startswith("@"):
            found |= class_bindings(value[1:-2])
        elif field.default is not dataclasses.MISSING:
            found[value[1:]] = repr(field.default)
    return found


def bindings(macros: Mapping[str, Any]) -> list[str]:
    """Returns the bindings of macros, without those whose value is None.

    >>> bindings({"MODEL_DIR": "runs/a", "SEED": 1, "SPLIT": None})
    ["MODEL_DIR='runs/a'", 'SEED=1']
    """
    return [f"{macro}={value!r}" for macro, value in macros.items() if value is not None]


def configured(
    name: str, arguments: argparse.Namespace, bindings: Sequence[str], *, unread: Sequence[str] = ()
) -> tuple[Any, str]:
    """Runs `configure` with the flags of a command, and checks that all processes have the same configuration."""
    if not arguments.gin_file:
        raise UsageError("no --gin_file given; the ready ones are under gin_configs/experiments/.")
    configured, text = configure(
        name,
        gin_files=arguments.gin_file,
        bindings=bindings,
        search_paths=[path for path in arguments.gin_search_paths.split(",") if path],
        unread=unread,
    )
    # Records may be in another folder on another host; their hashes are compared when they are read.
    lines = [line for line in _RECORDS.sub("", text).splitlines() if line and not line.startswith("#")]
    hosts.agree({"configuration": "\n".join(lines)})
    return configured, text


def quoted(binding: str) -> str:
    """Turns `NAME=value` into a line of gin; a value that is bare text is quoted."""
    name, equals, value = binding.partition("=")
    if not equals:
        raise UsageError(f"Got the binding {binding[:200]!r}; expected NAME=value.")
    if not _NAME.fullmatch(name.strip()):
        raise UsageError(f"Got the binding {binding[:200]!r}; {name[:200]!r} is not a name of a macro or parameter.")
    value = value.strip()
    if value.lower() in ("true", "false"):  # as other command lines write them
        value = value.capitalize()
    if not value.startswith(("@", "%", "[", "(", "{")):
        value = value if _is_literal(value) else repr(value)
    elif "\n" in value or "\r" in value:  # a second line could hold another statement
        raise UsageError(f"Got the binding {binding[:200]!r}; expected a value of one line.")
    elif not _REFERENCE.search(value) and not _is_literal(value):
        raise UsageError(
            f"Got the binding {binding[:200]!r}; expected brackets that close and texts in quotes, such as "
            "{'inputs': 32} or ['a', 'b']."
        )
    return f"{name.strip()} = {value}"


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _refuse_foreign(config: Any) -> None:
    """Refuses a configuration that refers to a function of Python's standard library, which could do anything.

    Dynamic registration lets a gin file name and call anything that can be imported, and reach the imports of a module
    (`@train.os.system()`). Configurations need only this project and other packages. `config` is gin's module; it has
    parsed the files and called nothing yet.
    """
    waiting, seen = list(config._CONFIG.values()), set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, config.ConfigurableReference) and id(value) not in seen:
            seen.add(id(value))
            function = value.configurable.wrapped
            home = getattr(function, "__module__", None) or type(function).__module__
            if home.partition(".")[0] in sys.stdlib_module_names:
                name = getattr(function, "__qualname__", type(function).__qualname__)
                raise UsageError(
                    f"The configuration refers to {value.scoped_selector}, which is {home}.{name} of Python's standard "
                    "library. It was not run; use functions of sbs_jax, tasks, optax or other packages."
                )


def _refuse_other_types(config: Any) -> None:
    """Refuses a bound value of another type than its parameter declares, which Python would take until it fails.

    'false' is true, and '1000' is no number of steps.
    """
    for (_, selector), bound in config._CONFIG.items():
        configurable = config._REGISTRY[selector]
        types = declared.parameters(configurable.wrapped)
        for parameter, value in bound.items():
            found = _known(value, config)
            expected = declared.expected(found, types[parameter]) if parameter in types else None
            if expected is not None:
                name, where = f"{configurable.name}.{parameter}", ""
                if isinstance(value, config.ConfigurableReference):  # a macro
                    name, where = "/".join(value.scopes), f" (as {name})"
                raise UsageError(f"{name} is {json_files.brief(found)}; expected {expected}{where}.")


def _known(value: Any, config: Any) -> Any:
    """Returns a bound value with macros replaced by theirs, `@function` by it, and results by `declared.ANYTHING`."""
    if isinstance(value, config.ConfigurableReference):
        if not value.evaluate:
            return value.configurable.wrapped
        bound = config._CONFIG.get(value.config_key, {}) if value.configurable.wrapped is config.macro else {}
        return _known(bound["value"], config) if "value" in bound else declared.ANYTHING
    if isinstance(value, dict):
        return {_known(name, config): _known(each, config) for name, each in value.items()}
    return type(value)(_known(each, config) for each in value) if isinstance(value, list | tuple) else value


def _refuse_urls(name: str, value: Any) -> None:
    """Refuses addresses of object storage in a configuration, as `cli.main` does in flags."""
    if isinstance(value, str):
        checks.local_path(name, value, or_bucket=name.lower().rpartition(".")[2] in checks.ON_BUCKETS)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _refuse_urls(f"{type(value).__name__}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _refuse_urls(f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for each in value:
            _refuse_urls(name, each)


class Reference(NamedTuple):
    """A value that refers to another: `%NAME`, or `@name` and `@name()`."""

    sign: str
    name: str


def statements(source: str | io.StringIO) -> Iterator[tuple[str, str, Any]]:
    """Parses gin text without importing what it names; values are literals with `Reference` in them.

    Yields ("include", file, None), ("import", module, None), ("macro", name, value) and ("parameter",
    "train.TrainConfig.seed", value). Errors are gin's; see `usage_errors`.
    """
    parser = importlib.import_module("gin.config_parser")

    class Delegate(parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
            del evaluate
            return Reference("@", scoped_configurable_name.rpartition("/")[2])

        def macro(self, macro_name: str) -> Reference:
            return Reference("%", macro_name)

    for statement in parser.ConfigParser(source, Delegate()):
        if isinstance(statement, parser.IncludeStatement):
            yield "include", statement.filename, None
        elif isinstance(statement, parser.ImportStatement):
            yield "import", statement.module, None
        elif isinstance(statement, parser.BindingStatement):
            if statement.arg_name:
                yield "parameter", f"{statement.selector}.{statement.arg_name}", statement.value
            else:
                yield "macro", statement.selector, statement.value


def opened(file: str) -> io.StringIO:
    """Opens a gin file as UTF-8 text, with or without a byte order mark. ValueError names the file."""
    text = io.StringIO(json_files.decoded(user_files.whole(file), file), newline=None)
    text.name = file  # for gin's messages
    return text


def _read(file: str) -> str:
    path = Path(file)
    if not path.exists():  # gin found it in the package gin_configs
        path = Path(__file__).parents[2] / file
    return user_files.whole(path).decode()


def _file_names(includes: Iterable[Any]) -> list[str]:
    found = []
    for include in includes:
        found += [include.filename, *_file_names(include.includes)]
    return found


def _unused(config: str, operative: str, texts: Sequence[str]) -> list[str]:
    """Lists bindings that had no effect and that no text refers to.

    A binding whose configurable or macro is referred to (`@optax.adamw`, `%WARMUP`) may be idle because another file
    chose an alternative. That is not a mistake.
    """
    referred = {match[1] for text in texts for match in _REFERENCE.finditer(text)}
    ends = {name.rpartition(".")[2] for name in referred}
    idle = {m[1] for m in _LEFT_SIDE.finditer(config)} - {m[1] for m in _LEFT_SIDE.finditer(operative)}
    unused = []
    for binding in sorted(idle):
        path = binding.rpartition("/")[2]
        owner = path.rpartition(".")[0] or path
        if owner not in referred and owner.rpartition(".")[2] not in ends:
            unused.append(binding)
    return unused
