"""MkDocs hooks: adds generated pages (pages.py), and notebooks as pages."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import pages  # noqa: E402


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages of the modules to the navigation."""
    for section in config.nav or []:
        for entries in section.values():
            if isinstance(entries, list):
                for number, entry in enumerate(entries):
                    if entry == {"Python modules": "reference/api/index.md"}:
                        each = [{name: f"reference/api/{name}.md"} for name in pages.modules()]
                        entries[number] = {"Python modules": ["reference/api/index.md", *each]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and replaces each notebook by a page."""
    for path, text in pages.made().items():
        files.append(File.generated(config, path, content=text))
    for name in ("site.css", "iframe-worker.js"):
        files.append(File.generated(config, name, abs_src_path=str(HERE / name)))
    for notebook in [file for file in files if file.src_path.endswith(".ipynb")]:
        files.remove(notebook)
        text, pictures = notebook_page(Path(notebook.abs_src_path or ""))
        files.append(File.generated(config, str(Path(notebook.src_path).with_suffix(".md")), content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, name, content=data))
    return files


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Turns links to notebooks into links to their pages."""
    return re.sub(r"(\]\([^)\s]+)\.ipynb\b", r"\1.md", markdown)


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Converts a notebook to Markdown, and its pictures to files by path."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path))
    names = {name: f"{path.stem}_{name}" for name in resources["outputs"]}
    for name, new in names.items():
        text = text.replace(f"]({name})", f"]({new})")
    return text, {new: resources["outputs"][name] for name, new in names.items()}
