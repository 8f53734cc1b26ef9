"""The hook for lm-eval, with a stand-in for the package: it records how it is called."""

import json
import sys
from types import ModuleType

import pytest

from kd_common.hub import language_models as hub
from llm_kd import evaluate
from llm_kd.evaluate import main
from llm_kd.evaluation import harness

RESULTS = {
    "arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.01, "sample_len": 8},
    "piqa": {"alias": "piqa", "acc,none": 1, "acc_stderr,none": "N/A"},
}


@pytest.fixture
def lm_eval(monkeypatch):
    """A package of that name whose ``simple_evaluate`` takes the parameters of lm-eval 0.4 used here, and no others."""
    module, calls = ModuleType("lm_eval"), []

    def simple_evaluate(model, model_args=None, tasks=None, batch_size=None, device=None):
        calls.append(
            {"model": model, "model_args": model_args, "tasks": tasks, "batch_size": batch_size, "device": device}
        )
        return {"results": RESULTS, "samples": {}}

    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return calls


@pytest.fixture
def arguments(save_model, tmp_path):
    val = tmp_path / "val.jsonl"
    val.write_text(json.dumps({"instruction": "Say hi", "output": "Hi"}))
    return ["--student", save_model(), "--data.val", str(val), "--seeds", "[]", "--device", "cpu"]


def test_tasks_run_on_the_saved_student(arguments, lm_eval, capsys):
    found = main([*arguments, "--harness", "arc_easy, piqa", "--data.val_batch_size", "3"])
    [call] = lm_eval
    assert call == {
        "model": "hf",
        "model_args": {"pretrained": arguments[1], "dtype": "float32"},
        "tasks": ["arc_easy", "piqa"],
        "batch_size": 3,
        "device": "cpu",
    }
    assert found["harness"] == {
        "arc_easy": {"acc,none": 0.25, "acc_stderr,none": 0.01, "sample_len": 8.0},
        "piqa": {"acc,none": 1.0},
    }
    assert "nll" in found["tokens"]
    assert "lm-eval arc_easy  acc,none 0.2500, acc_stderr,none 0.0100" in capsys.readouterr().out


def test_what_was_measured_before_a_failing_task_is_kept(arguments, lm_eval, monkeypatch, tmp_path, capsys):
    def unknown(**_):
        raise KeyError("no such task")

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", unknown)
    with pytest.raises(KeyError, match="no such task"):
        main([*arguments, "--harness", "nonsense", "--output", str(tmp_path / "result.json")])
    nll = json.loads((tmp_path / "result.json").read_text())["tokens"]["nll"]
    assert f"{nll:.3f}" in capsys.readouterr().out


def test_the_embedded_model_goes_by_its_folder(lm_eval, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "embedded_folder", lambda: tmp_path)
    harness.run_harness(hub.EMBEDDED, ["piqa"], dtype="float32", device="cpu", batch_size=1)
    assert lm_eval[0]["model_args"]["pretrained"] == str(tmp_path)


def test_not_installed(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="--harness needs the evaluation harness: `pip install lm-eval`"):
        main([*arguments, "--harness", "piqa"])


def test_a_broken_installation_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "lm_eval.py").write_text("import a_module_that_is_missing")
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        harness.load_harness()
