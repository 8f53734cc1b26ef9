"""The table at the end of a run: its title names the setting, and its numbers are whole in a narrow terminal."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from vision_kd.fit import Result
from vision_kd.methods.dkd import DKD
from vision_kd.methods.vanilla import Vanilla
from vision_kd.policies import SGD
from vision_kd.training.specs import DynamicTopK
from vision_kd.training.summary import print_summary, title


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": DKD(), "policy": SGD(), "topk": DynamicTopK(0.5, 0.9)}, "DKD with SGD, top-k mask"),
        ({"method": DKD(standardize=True), "policy": SGD()}, "DKD with SGD, standardised logits"),
        ({"method": Vanilla(), "policy": SGD(), "ema_decay": 0.9}, "Vanilla with SGD, moving average"),
    ],
)
def test_the_title_names_what_was_trained(toy, settings, expected):
    assert title(toy.module(**settings)) == expected


def test_numbers_are_whole_beside_long_names(toy):
    module = toy.module(method=Vanilla(), policy=SGD())
    name = "timm/vit_large_patch14_clip_quickgelu_336.datacompxl_ft_in12k_in1k_and_something"
    module.student_spec = SimpleNamespace(name=name)
    epoch = {"epoch": 9, "top1": 0.9876, "top5": 0.9912, "loss": 1.0, "seconds": 1.0}
    counts = {"student": 304_326_632}
    result = Result(metric="top1", mode="max", teacher={}, history=[epoch], k=None, parameters=counts, run_dir=None)
    out = io.StringIO()
    print_summary(result, module, Console(file=out, width=80))
    table = out.getvalue()
    assert table.count("98.76%") == table.count("99.12%") == 2  # the last epoch and the best
    assert "304,326,632" in table
    assert max(map(len, table.splitlines())) <= 80
