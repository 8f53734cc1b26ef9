"""docs/extending.md: its files are written into a copy of the sources, its blocks run, its commands parse there."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r'```python title="(.+?)"\n(.*?)```', PAGE, re.S))
USES = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [shlex.split(line) for line in re.findall(r"^    uv run python -m (.*)$", PAGE, re.M)]

# One process for all of it: every import of the packages costs seconds.
INSIDE = """
import importlib.util, json, sys
import pytest
job = json.load(sys.stdin)
for name, use in job["uses"].items():
    print("using", name)
    exec(compile(use, name, "exec"), {"__name__": "use"})
spec = importlib.util.spec_from_file_location("docs", job["parser"])
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
for module, *arguments in job["commands"]:
    print("parsing", module, *arguments)
    docs.parse(module, arguments, pytest.MonkeyPatch())
from spec_decode.decoding.session import find_drafter
find_drafter("Bigram", None)  # which the command line takes as any text
"""


def test_every_kind_is_a_file_a_use_and_a_command():
    sections = re.findall(r"^## An? (method|gradient policy|objective|selector|drafter)$", PAGE, re.M)
    assert len(sections) == len(FILES) == len(USES) == len(COMMANDS) == 5


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed: `uv sync --group lint`")
def test_files_have_the_projects_style(tmp_path):
    for name, text in FILES.items():
        (tmp_path / Path(name).name).write_text(text)
    for command in (["check", "--config", str(ROOT / "pyproject.toml")], ["format", "--check", "--line-length=120"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, str(tmp_path)], check=True)


@pytest.mark.slow
def test_files_work_where_the_page_puts_them(tmp_path):
    sources = [source.relative_to(ROOT) for source in sorted(ROOT.glob("packages/*/src"))]
    for source in sources:
        shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        assert not (tmp_path / name).exists(), f"{name} is no new file"
        (tmp_path / name).write_text(text)
    job = {
        "uses": dict(zip(FILES, USES, strict=True)),
        "parser": str(ROOT / "tests/test_docs.py"),
        "commands": COMMANDS,
    }
    path = os.pathsep.join(["", *(str(tmp_path / source) for source in sources)])
    found = subprocess.run(
        [sys.executable, "-c", INSIDE],
        input=json.dumps(job),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
