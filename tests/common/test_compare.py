"""Variants times seeds: order, interruption, changed settings, tables."""

import json

import pytest

from kd_common.compare import by_variant, mean_and_spread, run_matrix, write_table

MATRIX = {
    "base": ["default"],
    "variants": {"B": ["b", "--x=1"], "A": ["a"]},
    "seeds": [0, 1],
    "overrides": [],
    "jobs": 1,
}


def run_one(variant, seed, args, threads):
    return {"variant": variant, "seed": seed, "args": list(args), "value": seed}


def test_every_variant_with_every_seed_in_order(tmp_path):
    rows = run_matrix(run_one, str, output=tmp_path, **MATRIX)
    assert [(row["variant"], row["seed"]) for row in rows] == [("B", 0), ("B", 1), ("A", 0), ("A", 1)]
    assert rows[0]["args"] == ["--config=default", "--config=b", "--x=1", f"--run_dir={tmp_path / 'runs/B-0'}"]
    assert [len(runs) for runs in by_variant(rows).values()] == [2, 2]


def test_finished_runs_are_kept_and_not_repeated(tmp_path):
    calls = []

    def interrupted(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[:2])
        return run_one(*arguments)

    with pytest.raises(KeyboardInterrupt):
        run_matrix(interrupted, str, output=tmp_path, **MATRIX)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["runs"]) == 3
    assert saved["environment"]["cores"] >= 1
    calls.clear()
    assert len(run_matrix(interrupted, str, output=tmp_path, **MATRIX)) == 4
    assert calls == [("A", 1)]
    with pytest.raises(ValueError, match=r"holds B, seed 0, run with other settings"):
        run_matrix(run_one, str, output=tmp_path, **(MATRIX | {"overrides": ["--y=3"]}))


@pytest.mark.parametrize(("values", "expected"), [([], "–"), ([0.5], "0.50"), ([0.5, 0.7], "0.60 ± 0.14")])
def test_mean_and_sample_deviation(values, expected):
    assert mean_and_spread(values) == expected


def test_the_table_is_markdown_too(tmp_path, capsys):
    write_table([{"variant": "A [x]", "KL": "1.0"}], tmp_path / "table.md", "title")
    assert (tmp_path / "table.md").read_text() == "| variant | KL |\n| --- | --- |\n| A [x] | 1.0 |\n"
    assert "A [x]" in capsys.readouterr().out
