"""The report of real runs: every section is there, students and teacher are compared, wrong folders are refused."""

import numpy as np
import pytest

from vision_kd.fit import main as fit
from vision_kd.report import main
from vision_kd.viz.runs import plot_class_changes, plot_correlations

ARGUMENTS = [
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--data.train_subset=160",
    "--model.gsnr_every=1",
    "--model.teacher.name=resnet8",
    "--model.teacher.epochs=1",
]


@pytest.mark.slow
def test_report_of_two_runs(tmp_path, capsys, assert_live):
    alone, deepkd = tmp_path / "alone", tmp_path / "deepkd"
    fit([*ARGUMENTS, "--config=methods/vanilla", "--model.policy=SGD", "--model.topk=null", f"--run_dir={alone}"])
    fit([*ARGUMENTS, f"--run_dir={deepkd}", "--trainer.callbacks+=vision_kd.training.callbacks.StudentFigures"])
    assert_live(alone, [])
    assert_live(deepkd, ["calibration", "correlation"])
    capsys.readouterr()
    page = main([str(alone), str(deepkd), f"--output={tmp_path / 'report'}", "--resolution=3", "--samples=64"])
    assert f"written to {page}" in capsys.readouterr().out
    html = page.read_text()
    titles = [
        "Runs",
        "Accuracy",
        "Gradient signal-to-noise",
        "Gradient components",
        "Correlation of logits",
        "Calibration",
        "Change per class",
        "Loss landscapes",
    ]
    assert [line.partition("</h2>")[0] for line in html.split("<h2>")[1:]] == titles
    assert "<td>teacher</td>" in html  # its weights were in the cache
    assert "dynamic, k_opt" in html
    svg = (tmp_path / "report/figures/gradient-signal-to-noise.svg").read_text()
    assert all(text in svg for text in ("<!-- task, momentum 0.975 -->", "<!-- target, momentum 0.825 -->"))
    assert not (tmp_path / "report/student_last.pt").exists()
    assert sorted(p.name for p in deepkd.glob("config*")) == ["config.yaml"]  # the run's folder is left alone


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="is no run"):
        main([str(tmp_path)])
    (tmp_path / "config.yaml").write_text(
        "model: {class_path: llm_kd.training.distillation.DistillationModule, init_args: {}}"
    )
    (tmp_path / "metrics.csv").write_text("epoch,step,val/tar\n0,1,0.5\n")
    with pytest.raises(ValueError, match=r"no run of vision_kd\.fit"):
        main([str(tmp_path)])


def test_names_of_classes_are_no_formulas(tmp_path):
    """matplotlib would refuse this one while it saves a figure."""
    names = ["$\\frac$", "US$5"]
    plot_correlations({"student": np.eye(2)}, names).savefig(tmp_path / "a.png")
    plot_class_changes({"student": np.zeros(2)}, names, "reference").savefig(tmp_path / "b.png")
