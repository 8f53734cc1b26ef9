"""Reports: logged values are read back, also those of resumed runs; the page needs no other file and escapes text."""

import io
import re

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from kd_common.run.report import (
    LoggedRun,
    Section,
    curve_style,
    log_scale,
    read_config,
    read_metrics,
    run_names,
    write_report,
)


def test_metrics_of_a_resumed_run(tmp_path):
    """What was repeated after resuming replaces what the killed run had logged; empty cells are no values."""
    (tmp_path / "metrics_1.csv").write_text("epoch,step,loss,val/top1\n0,1,3.0,\n0,2,2.0,0.5\n1,4,9.0,\n")
    (tmp_path / "metrics_2.csv").write_text("epoch,step,loss\n1,4,8.0\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,loss,val/top1\n1,4,1.0,\n1,5,0.5,0.75\n")
    metrics = read_metrics(tmp_path)
    assert set(metrics) == {"loss", "val/top1"}
    np.testing.assert_array_equal(metrics["loss"], [[1, 2, 4, 5], [3.0, 2.0, 1.0, 0.5]])
    np.testing.assert_array_equal(metrics["val/top1"], [[2, 5], [0.5, 0.75]])


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"is no run: it holds no config\.yaml"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"holds no metrics\.csv"):
        read_metrics(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="no configuration of a run"):
        read_config(tmp_path)


class Run(LoggedRun):
    command = "a.fit"
    validated = ("val/top1", "val/AP")


def test_runs_of_another_command_or_without_validation_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {init_args: {a: 1}}")
    (tmp_path / "metrics.csv").write_text("epoch,step,val/top1\n0,1,3.0\n")
    run = Run.open(tmp_path, "name")
    assert (run.name, run.model, list(run.metrics)) == ("name", {"a": 1}, ["val/top1"])
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,1,3.0\n")
    with pytest.raises(ValueError, match=r"a\.fit .* no val/top1 or val/AP"):
        Run.open(tmp_path, "name")


def test_run_names(tmp_path):
    a, b, c = tmp_path / "one/run", tmp_path / "two/run", tmp_path / "other"
    assert run_names([a, c]) == {a: "run", c: "other"}
    assert run_names([a, b]) == {a: "one/run", b: "two/run"}
    assert run_names([a, a]) == {a: "run"}


def test_page(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    sections = [
        Section("A <b> & C", "text & <i>", figure),
        Section("Numbers", table=[{"run": "x<y", "value": "1"}]),
        Section("Words", markup=Markup("<span>ok</span>")),
    ]
    page = write_report(tmp_path / "new/folder", "Title <", sections)
    html = page.read_text()
    assert "<i>" not in html
    assert "text &amp; &lt;i&gt;" in html
    assert "x&lt;y" in html
    assert "<span>ok</span>" in html
    assert html.count("<section") == 3
    assert not re.search(r'(src|href)="(?!data:|#)', html)  # nothing is loaded from elsewhere
    assert (page.parent / "figures/a-b-c.svg").read_bytes().startswith(b"<?xml")
    assert (page.parent / "figures/a-b-c.png").read_bytes().startswith(b"\x89PNG")
    first = html
    assert write_report(tmp_path / "new/folder", "Title <", sections).read_text() == first  # the same bytes again


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan, 0.0], [0.0, 2.0]])
@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_a_curve_of_zeros_on_a_logarithmic_axis_is_left_out(values, beside):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], values, **curve_style(0))
    axes.plot([0, 1], [beside, beside], **curve_style(1))
    log_scale(axes)
    figure.savefig(io.BytesIO())
    assert axes.get_yscale() == ("log" if max(beside, values[1]) > 0 else "linear")
