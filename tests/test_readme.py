"""Links of README and docs lead to files, and their code blocks run; commands: tests/test_docs.py."""

import re
import runpy
from pathlib import Path

import pytest
import timm
import torch

from vision_kd.detection import build_detector
from vision_kd.models import ModelSpec, save_student

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("packages/*/README.md"),
]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@PAGE
def test_relative_links_exist(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def trains(block: str) -> bool:
    return "build(" in block or "Trainer(" in block


BLOCKS = [
    pytest.param(
        block,
        id=f"{page.relative_to(ROOT)}-{i}",
        marks=[pytest.mark.slow] if re.search(r"build\(|Trainer\(", block) else [],
    )
    for page in PAGES
    if page.name != "extending.md"  # its blocks are files and need each other: tests/test_extending.py
    for i, block in enumerate(python_blocks(page))
]


def save_detector(file):
    """An untrained detector where a block expects that of a run."""
    spec = ModelSpec("fasterrcnn_resnet10_quarter_fpn", {"norm": "group", "fpn_channels": 16})
    detector = build_detector(spec, class_names=["a", "b"], mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    save_student(file, detector, spec)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "load_detector" in block:
        save_detector("RUN/student_best.pt")
    if "efficientnet-lite0" in block:
        state = timm.create_model("tf_efficientnet_lite0").state_dict()
        torch.save({f"theirs.{name}": tensor for name, tensor in state.items()}, "efficientnet-lite0-57934424.pth")
    script = tmp_path / "block.py"
    script.write_text(block)
    runpy.run_path(str(script))
