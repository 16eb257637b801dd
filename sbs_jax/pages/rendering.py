"""Pages rendered from `templates/`. Jinja escapes every value; a page contains its style, script, data and plots."""

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sbs_jax.storage import atomic, user_files

# Every page has it in its head.
_POLICY = b'http-equiv="Content-Security-Policy" content="default-src \'none\'; '
TEMPLATES = Path(__file__).with_name("templates")
# Characters that are invisible or change how others are shown; browser.js has the same.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot (SVG of `width` pixels), and links to its files. `narrow` is the same for a phone, if `plot` is wider."""

    name: str
    caption: str
    plot: str
    width: int
    narrow: str | None = None
    files: Sequence[tuple[str, str]] = ()


def render(template: str, **values: Any) -> str:
    """Renders one of the templates."""
    return _environment().get_template(template).render(values)


def check_place(path: Path) -> None:
    """Refuses a path for a page where anything but an earlier page lies. FileExistsError."""
    if not path.exists():
        return
    beginning = b""
    if path.is_file():
        with user_files.opened(path) as file:
            beginning = file.peek(1024)[:1024]
    if not path.is_file() or (beginning and _POLICY not in beginning):
        raise FileExistsError(f"{path} exists and is no page of ours; choose another name, or remove it.")


def write(path: Path, page: str) -> None:
    """Writes a page where nothing or an earlier page lies."""
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace(path, page.encode(), ours=False)


def slug(*parts: str | None) -> str:
    """Makes a file name (without its ending) or an HTML id: "accuracy", "e-SNLI" gives "accuracy-e-snli"."""
    cleaned = (re.sub(r"[^a-z0-9._]+", "-", part.lower()).strip("-.") for part in parts if part)
    return "-".join(part[:60] for part in cleaned if part)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"slug": slug, "sha256": _sha256}
    # ASCII only, so that every text can be encoded; Jinja's tojson escapes characters that could end a script element.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def _visible(value: Any) -> Any:
    """Replaces invisible characters by their code: a null character is ⟨U+0000⟩."""
    return value if isinstance(value, Markup) else _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(value))


def _sha256(script: str) -> str:
    """Hashes a script for the page's content security policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
