"""The comparison's table and plot, and real runs of it."""

import json

import pytest

from llm_kd.compare import LanguageRun, main


def row(variant, seed, kls):
    history = [
        {
            "step": 5 * i + 5,
            "kl": kl,
            "nll": 2 * kl,
            "agreement": 0.5,
            "tar": 0.4,
            "train_tar": 0.1 * i,
            "seconds": 3.0,
            "teacher_nll": 1.0,
        }
        for i, kl in enumerate(kls)
    ]
    measured = {"before": {"tar": 0.1}, "history": history, "rouge_l": {"after": 20.0}}
    return LanguageRun(variant=variant, seed=seed, args=[], parameters={}, **measured)


def test_last_and_best_apart():
    line = LanguageRun.cells([row("A", 0, [3.0, 1.0, 2.0]), row("A", 1, [3.0, 1.5, 2.0])])
    assert line["KL, last"] == "2.000 ± 0.000"
    assert line["KL, best"] == "1.250 ± 0.354"
    assert line["NLL, last"] == "4.000 ± 0.000"
    assert line["accepted in training %, first → last"] == "0.0 → 20.0"
    assert line["TAR %, last"] == "40.0 ± 0.0"
    assert line["s"] == "9"


def test_the_kl_of_a_truncated_teacher_is_marked_as_a_lower_bound():
    stored = row("A", 0, [3.0, 1.0])
    for epoch in stored.history:
        del epoch["teacher_nll"]
    line = LanguageRun.cells([stored])
    assert (line["KL, last"], line["KL, best"], line["NLL, last"]) == ("≥ 1.000", "≥ 1.000", "2.000")


def test_plot(tmp_path):
    LanguageRun.plot({"A": [row("A", 0, [1.0])], "B": [row("B", 0, [1.0])]}, tmp_path)
    assert (tmp_path / "tar.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_real_runs(tmp_path, save_model):
    rows = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    settings = [
        f"--model.teacher.name={save_model()}",
        "--model.student.layers=2",
        f"--data.train={file}",
        f"--data.val={file}",
        "--data.responses=dataset",
        "--data.sampling.max_new_tokens=4",
        "--data.batch_size=4",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
    ]
    variants = {"uniform": ["selectors/none"], "Top-1": ["selectors/topk", "--model.selector.k=1"]}
    arguments = [
        '--base=["default"]',
        f"--variants={json.dumps(variants)}",
        f"--output={tmp_path / 'out'}",
        "--seeds=[0]",
        f"--overrides={json.dumps(settings)}",
    ]
    found = main(arguments)
    assert [run.variant for run in found] == ["uniform", "Top-1"]
    assert found[0].before != found[1].before  # acceptance is that of the selector
    assert found[0].before["kl"] == found[1].before["kl"]
    assert (tmp_path / "out/results.md").read_text().count("\n") == 4
    assert main(arguments) == found  # everything is finished: nothing runs again
