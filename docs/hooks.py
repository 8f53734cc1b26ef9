"""Hooks of mkdocs.yml: pages that live outside ``docs/`` join the site, and links are made to fit it.

Every page is written for reading in the repository, where links are relative to its own file. On the site, links to
other pages lead to their places there; links to folders and source files, which the site does not hold, become text.
Formulas become MathML, which browsers draw without a script: pages need nothing from a network.
"""

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks.md"}
OUTSIDE |= {f"notebooks/{file.name}": f"notebooks/{file.stem}.md" for file in sorted(ROOT.glob("notebooks/*.py"))}
FORMULA = re.compile(r'(<(?:span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](</(?:span|div)>)', re.S)
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside ``docs/``."""
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def notebook(percent: str) -> str:
    """Markdown of a notebook in jupytext's percent format, without outputs."""
    cells = re.split(r"^# %%(.*)\n", percent, flags=re.M)[1:]
    return "\n\n".join(
        re.sub(r"^# ?", "", text, flags=re.M) if "[markdown]" in kind else f"```python\n{text.strip()}\n```"
        for kind, text in zip(cells[::2], cells[1::2], strict=True)
    )


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every link at its place on the site.

    Raises:
        FileNotFoundError: If a link leads to a file that does not exist in the repository.
    """
    assert page.file.abs_src_path is not None
    if page.file.abs_src_path.endswith(".py"):
        markdown = notebook(markdown)
    source, here = Path(page.file.abs_src_path), Path(page.file.src_uri).parent

    def fit(link: re.Match[str]) -> str:
        path = link["path"]
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        target = (source.parent / path).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{source}: {link[0]} leads to no file")
        inside = str(target.relative_to(ROOT))
        place = OUTSIDE.get(inside) or inside.removeprefix("docs/")
        if inside not in OUTSIDE and (files.get_file_from_path(place) is None or not inside.startswith("docs/")):
            return link["text"].strip("![]")
        return f"{link['text']}({os.path.relpath(place, here)}{link['anchor'] or ''})"

    return LINK.sub(fit, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Set the formulas of a page that arithmatex has marked."""

    def draw(found: re.Match[str]) -> str:
        start, bracket, formula, end = found.groups()
        return start + convert(html.unescape(formula), display="inline" if bracket == "(" else "block") + end

    return FORMULA.sub(draw, content)
