"""Variants times seeds: order, interruption, changed settings, tables."""

import json
from dataclasses import dataclass

import pytest

from kd_common.run.compare import ComparedRun, by_variant, compare_command, mean_and_spread, run_matrix, write_table

MATRIX = {
    "base": ["default"],
    "variants": {"B": ["b", "--x=1"], "A": ["a"]},
    "seeds": [0, 1],
    "overrides": [],
    "jobs": 1,
}


@dataclass(frozen=True, kw_only=True)
class Run(ComparedRun):
    title = "runs"
    headline = "done"

    @classmethod
    def train(cls, args, **place):
        return cls(args=args, history=[], parameters={}, **place)

    @classmethod
    def cells(cls, runs):
        return {"seed": str([run.seed for run in runs])}


def test_every_variant_with_every_seed_in_order(tmp_path):
    found = run_matrix(Run, output=tmp_path, **MATRIX)
    assert [(run.variant, run.seed) for run in found] == [("B", 0), ("B", 1), ("A", 0), ("A", 1)]
    given = ["--config=default", "--config=b", "--x=1", f"--run_dir={tmp_path / 'runs/B-0'}", "--seed_everything=0"]
    assert found[0].args == [*given, "--trainer.enable_progress_bar=false"]
    assert [len(runs) for runs in by_variant(found).values()] == [2, 2]


def test_finished_runs_are_kept_and_not_repeated(tmp_path):
    calls = []

    class Interrupted(Run):
        @classmethod
        def train(cls, args, **place):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(tuple(place.values()))
            return super().train(args, **place)

    with pytest.raises(KeyboardInterrupt):
        run_matrix(Interrupted, output=tmp_path, **MATRIX)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["runs"]) == 3
    assert saved["environment"]["cores"] >= 1
    calls.clear()
    assert len(run_matrix(Interrupted, output=tmp_path, **MATRIX)) == 4
    assert calls == [("A", 1)]
    with pytest.raises(ValueError, match=r"holds B, seed 0, run with other settings"):
        run_matrix(Run, output=tmp_path, **(MATRIX | {"overrides": ["--y=3"]}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": 0}, r"^--jobs 0: give the number of runs at a time, 1 or more$"),
        ({"jobs": -1}, r"^--jobs -1: "),
        ({"seeds": []}, r"^--seeds \[\]: give at least one, as in '\[0\]'"),
        ({"variants": {}}, r"^--variants \{\}: give at least one"),
        ({"file": True}, r"^--output .*/file: .*/file is a file; name a folder$"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path, settings, message):
    (tmp_path / "file").touch()
    output = tmp_path / ("file" if settings.pop("file", False) else "new")
    with pytest.raises(ValueError, match=message):
        run_matrix(Run, output=output, **(MATRIX | settings))
    assert not (tmp_path / "new").exists()


def test_the_command_without_a_comparison_names_the_packaged_ones(tmp_path, capsys):
    (tmp_path / "compare").mkdir()
    for name in ("small", "large"):
        (tmp_path / "compare" / f"{name}.yaml").touch()
    with pytest.raises(SystemExit, match="2"):
        compare_command(Run, package="x", description=None, config_dir=tmp_path, args=["--jobs=2"])
    advice = "--config FILE of base, variants and output, packaged: compare/large, compare/small\n"
    assert f" is required, as in: python -m x.compare {advice}" in capsys.readouterr().err


@pytest.mark.parametrize(("values", "expected"), [([], "–"), ([0.5], "0.50"), ([0.5, 0.7], "0.60 ± 0.14")])
def test_mean_and_sample_deviation(values, expected):
    assert mean_and_spread(values) == expected


def test_the_table_is_markdown_too(tmp_path, capsys):
    write_table([{"variant": "A [x]", "KL": "1.0"}], tmp_path / "table.md", "title")
    assert (tmp_path / "table.md").read_text() == "| variant | KL |\n| --- | --- |\n| A [x] | 1.0 |\n"
    assert "A [x]" in capsys.readouterr().out
