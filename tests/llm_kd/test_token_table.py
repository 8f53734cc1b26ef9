"""The table of tokens against the models' own logits, and the report of real runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kd_common.hub import load_causal_lm
from llm_kd.data.example import Example
from llm_kd.fit import main as fit
from llm_kd.models import Backbone
from llm_kd.report import Run, main
from llm_kd.viz.token_table import token_table


def test_every_column_by_hand(make_model):
    """Two turns in one example: positions are counted from the start of each answer."""
    student, teacher = (Backbone(make_model(seed=seed)).eval() for seed in (0, 1))
    mask = [False, False, True, True, False, True, True, True]
    examples = [Example(torch.randint(250, (8,)).tolist(), mask, 5), Example([1, 2, 3], [False, False, True], 2)]
    table = token_table(student, teacher, examples, vocab_size=256, k=3)
    assert table["example"].tolist() == [0] * 5 + [1]
    assert table["position"].tolist() == [0, 1, 0, 1, 2, 0]
    row = 0
    for example in examples:
        z, p = (
            backbone.causal_lm(torch.tensor([example.input_ids])).logits[0, :, :256].double().detach()
            for backbone in (student, teacher)
        )
        for place, answered in enumerate(example.loss_mask):
            if not answered:
                continue
            student_logits, teacher_logits, token = z[place - 1], p[place - 1], example.input_ids[place]
            p_teacher, p_student = teacher_logits.softmax(-1), student_logits.softmax(-1)
            expected = {
                "token": token,
                "student_top": int(student_logits.argmax()),
                "teacher_top": int(teacher_logits.argmax()),
                "accepted": int(student_logits.argmax()) in teacher_logits.topk(3).indices.tolist(),
                "speck": 1 - (1 - float(torch.minimum(p_teacher, p_student).sum())) ** 3,
                "kl": float((p_teacher * (p_teacher.log() - p_student.log())).sum()),
                "nll": float(F.cross_entropy(student_logits, torch.tensor(token))),
                "teacher_nll": float(F.cross_entropy(teacher_logits, torch.tensor(token))),
                "teacher_entropy": float(-(p_teacher * p_teacher.log()).sum()),
            }
            for name, value in expected.items():
                assert float(table[name][row]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
            row += 1
    assert row == len(table["token"])


@pytest.mark.slow
def test_report_of_two_runs(tmp_path, save_model, assert_live, monkeypatch):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say <{n}>.", "output": f"<b>{n}</b> & so on."} for n in range(8)]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    runs = [str(tmp_path / name) for name in ("uniform", "topk")]
    for run, selector in zip(runs, ("none", "topk"), strict=True):
        fit(
            [
                f"--run_dir={run}",
                f"--config=selectors/{selector}",
                f"--model.teacher.name={save_model()}",
                "--model.student.layers=2",
                f"--data.train={file}",
                f"--data.val={file}",
                "--data.responses=dataset",
                "--data.batch_size=4",
                "--trainer.max_epochs=1",
                "--trainer.accelerator=cpu",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_progress_bar=false",
                "--answers=0",
                "--trainer.callbacks+=llm_kd.training.callbacks.TokenFigures",
            ]
        )
        assert_live(Path(run), ["entropy", "position", "tokens"])
    html = main([*runs, f"--output={tmp_path / 'report'}", "--limit=4", "--texts=2"]).read_text()
    titles = [line.partition("</h2>")[0] for line in html.split("<h2>")[1:]]
    assert titles == [
        "Runs",
        "Progress",
        "Acceptance and the teacher&#39;s entropy",
        "Loss and acceptance by position",
        "Tokens of text 1",
        "Tokens of text 2",
    ]
    assert "<td>Uniform</td>" in html
    assert "<td>TopK</td>" in html
    assert "Say &lt;0&gt;." in html
    for method, name in {"Uniform": "uniform", "TopK": "topk"}.items():
        called = f"ForwardKL, {method}, OffPolicy on rows.jsonl ({name})"
        assert f"The data set&#39;s answer, coloured by the student of {called}</b>" in html.replace("'s", "&#39;s")
    assert html.count('<span style="background:') > 20
    with pytest.raises(ValueError, match="is no run"):
        main([str(tmp_path)])
    config = Path(runs[1]) / "config.yaml"
    before = config.read_text()
    used = []

    def load(name, dtype, *, attention):
        used.append(attention)
        return load_causal_lm(name, dtype, attention=attention)

    monkeypatch.setattr("llm_kd.report.load_causal_lm", load)
    config.write_text(before.replace("attention: sdpa", "attention: eager"))
    main([runs[1], f"--output={tmp_path / 'report'}", "--limit=1", "--texts=0"])
    assert used == ["eager", "eager"], "teacher and student as in the run"
    config.write_text(before.replace("max_length: ", "max_length: 1"))
    with pytest.raises(ValueError, match=r"held-out texts \(data\.max_length differ\)"):
        main(runs)
    config.write_text(before)
    config.write_text(config.read_text().replace("teacher:\n      name:", "teacher:\n      name: p_student"))
    with pytest.raises(ValueError, match="different teachers"):
        main(runs)
    shutil.rmtree(Path(runs[0]) / "student_last")
    with pytest.raises(ValueError, match="student_last is missing"):
        main(runs[:1])
    (Path(runs[0]) / "metrics.csv").write_text("epoch,step,val/top1\n0,1,0.5\n")
    with pytest.raises(ValueError, match=r"no run of llm_kd\.fit"):
        main(runs[:1])


def test_runs_are_called_after_method_and_data():
    def label(name, train, **parts):
        model = dict.fromkeys(("objective", "selector", "rollout"))
        settings = {"model": {"init_args": model | parts}, "data": {"init_args": {"train": train}}}
        return Run(Path(), name, settings, {}).label

    jsd = {"class_path": "llm_kd.objectives.JSD", "init_args": {}}
    assert label("run_0", "prompts/train") == "ForwardKL, TopK, OffPolicy on train (run_0)"
    assert label("b", ["x/a.jsonl", "c.parquet"], objective=jsd) == ("JSD, TopK, OffPolicy on a.jsonl + c.parquet (b)")


def test_the_kl_of_a_truncated_teacher_is_marked_in_the_report():
    config = {"model": {"init_args": {"objective": None, "selector": None, "rollout": None}}}
    metrics = dict.fromkeys(("val/kl", "val/nll", "val/tar"), (np.array([0, 4]), np.array([3.0, 1.0])))
    whole = metrics | {"val/teacher_nll": metrics["val/nll"]}
    assert Run(Path(), "a", config, metrics).summary()["KL, start → last"] == "≥ 3.000 → 1.000"
    assert Run(Path(), "a", config, whole).summary()["KL, start → last"] == "3.000 → 1.000"
