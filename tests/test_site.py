"""The documentation as a site: it shows without a network, formulas included."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    for module in ("mkdocs", "material", "pymdownx", "latex2mathml"):
        pytest.importorskip(module, reason="needs the group docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*.html")}


def test_no_page_fetches_anything_from_another_host(pages):
    for name, text in pages.items():
        # What a browser loads by itself; links that a reader follows are none.
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?(\S+?)[\">]", text)
        loaded += re.findall(r"<link[^>]*\brel=\"?(?:stylesheet|preload|icon)[^>]*\bhref=\"?(\S+?)[\">]", text)
        loaded += re.findall(r"url\([\"']?(\S+?)[\"')]", text)
        assert loaded, name
        assert not [place for place in loaded if re.match(r"(https?:)?//", place)], name


def test_formulas_are_set_when_the_site_is_built(pages):
    formulas = [formula for text in pages.values() for formula in re.findall(r"<math.*?</math>", text, re.S)]
    sources = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert len(formulas) >= sources.count("$$") // 2 > 0
    assert not [formula for formula in formulas if "\\" in formula]
    assert not [name for name, text in pages.items() if re.search(r'class="arithmatex">\s*\\[(\[]', text)]
