"""What README and docs promise exists: links, packaged configurations, commands and code blocks."""

import itertools
import re
import runpy
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path) -> list[list[str]]:
    """Every `python -m package.module ...` command of a page, continuation lines joined."""
    text = page.read_text().replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(r"python -m (\S+_\S+\.\w+.*?)(?:`|$)", text, re.M)]


@PAGE
def test_relative_links_exist(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


@PAGE
def test_commands_name_modules_and_packaged_configurations(page):
    for module, *arguments in commands(page):
        assert find_spec(module), module
        configs = ROOT / "packages" / module.split(".")[0] / "src" / module.split(".")[0] / "configs"
        for flag, value in itertools.pairwise(arguments):
            if flag == "--config" and value.isidentifier() | ("/" in value):
                assert (configs / f"{value}.yaml").is_file(), f"{page.name}: --config {value}"


def test_readme_has_commands():
    assert len(commands(ROOT / "README.md")) >= 4


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}", marks=[pytest.mark.slow] if "build(" in block else [])
    for page in PAGES
    for i, block in enumerate(python_blocks(page))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "block.py"
    script.write_text(block)
    runpy.run_path(str(script))
