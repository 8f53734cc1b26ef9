"""The comparison's table and plots, its packaged files, and real runs of it."""

import json
from dataclasses import replace

import pytest

from kd_common.run.cli import find_config
from kd_common.run.compare import run_matrix
from vision_kd.compare import VisionRun, main
from vision_kd.fit import CONFIG_DIR

PNG = b"\x89PNG"


def fake_row(variant, seed, tops, **extra):
    history = [{"epoch": i, "top1": t, "top5": 1.0, "loss": 1 - t, "seconds": 2.0, **extra} for i, t in enumerate(tops)]
    metrics = {"top1": "top-1"}
    return VisionRun(variant=variant, seed=seed, args=[], history=history, parameters={}, metrics=metrics)


def test_summary_separates_last_from_best():
    line = VisionRun.cells([fake_row("KD", 0, [0.2, 0.6, 0.4]), fake_row("KD", 1, [0.2, 0.3, 0.4])])
    assert line["last top-1"] == "40.00 ± 0.00"
    assert line["best top-1"] == "50.00 ± 14.14"
    assert line["s/epoch"] == "2.0"


def test_the_command_writes_a_table_and_the_plots(tmp_path, monkeypatch):
    def train(args, variant, seed):
        return replace(fake_row(variant, seed, [0.1, 0.2], **{"gsnr/task": 0.5}), args=args)

    monkeypatch.setattr(VisionRun, "train", train)
    variants = {"A": ["methods/kd", "--model.accumulate=2"], "B": ["methods/vanilla"]}
    runs = main(['--base=["default"]', f"--variants={json.dumps(variants)}", f"--output={tmp_path}", "--seeds=[0,1]"])
    assert [(run.variant, run.seed) for run in runs] == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    assert (tmp_path / "results.md").read_text().count("\n") == 4
    for figure in ("accuracy.png", "gsnr.png"):
        assert (tmp_path / figure).read_bytes().startswith(PNG)


@pytest.mark.slow
def test_real_runs_from_the_command_line(tmp_path):
    overrides = ["--trainer.max_epochs=1", "--model.teacher.epochs=1", "--data.train_subset=128"]
    overrides += ["--model.teacher.name=resnet8", "--model.gsnr_every=1", "--trainer.accelerator=cpu"]
    overrides += ["--trainer.log_every_n_steps=1"]
    arguments = ["--config=compare/digits", f"--output={tmp_path}", "--seeds=[0]", f"--overrides={overrides}"]
    rows = main(arguments)
    assert [run.variant for run in rows] == ["vanilla", "KD", "KD + DeepKD"]
    assert {key for key in rows[2].last if key.startswith("gsnr/")} == {
        "gsnr/task",
        "gsnr/target",
        "gsnr/nontarget",
    }
    assert (tmp_path / "runs/KD_+_DeepKD-0/student_best.pt").is_file()
    assert main(arguments) == rows  # everything is finished: nothing runs again


@pytest.mark.parametrize("name", ["compare/digits", "compare/fashion_mnist"])
def test_packaged_comparisons_name_packaged_configurations(name):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_function_arguments(run_matrix, as_positional=False, skip={"record"})
    settings = parser.parse_path(find_config(name, CONFIG_DIR))
    for entry in [*settings.base, *(e for configs in settings.variants.values() for e in configs)]:
        assert entry.startswith("--") or find_config(entry, CONFIG_DIR)
