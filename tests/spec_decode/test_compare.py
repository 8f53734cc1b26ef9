"""The comparison's table, its packaged files, and real runs of it."""

import json

import pytest
import yaml

from spec_decode.compare import DrafterRun, main
from spec_decode.fit import CONFIG_DIR, build


def row(seed, taus):
    history = [{"tau": tau, "acceptance": [[0.5, 0.1], [0.25, 0.0]], "seconds": 30.0} for tau in taus]
    costs = {"draft_seconds": 0.006, "pass_seconds": 0.03}
    return DrafterRun(variant="A", seed=seed, args=[], history=history, parameters={"drafter": 2_500_000}, **costs)


def test_last_and_best_apart():
    assert DrafterRun.cells([row(0, [1.0, 3.0, 2.0]), row(1, [1.0, 4.0, 2.0])]) == (
        {
            "parameters, M": "2.5",
            "acceptance by level, %": "50.0 ± 0.0 25.0 ± 0.0",
            "tau, last": "2.000 ± 0.000",
            "tau, best": "3.500 ± 0.707",
            "draft, x T(1)": "0.20 ± 0.00",
            "training, s": "90",
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((CONFIG_DIR / "compare").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_variant_of_a_packaged_comparison_is_built(file, standin, tmp_path):
    def small(text):  # the stand-in has fewer tokens
        return text.replace("draft_vocab: 8192", "draft_vocab: 64")

    comparison = yaml.safe_load(small(file.read_text()))
    for name in comparison["base"]:
        (tmp_path / f"{name}.yaml").write_text(small((CONFIG_DIR / f"{name}.yaml").read_text()))
    base = [f"--config={tmp_path / name}.yaml" for name in comparison["base"]]
    where = [f"--model.target.name={standin}", "--model.target.dtype=float32", "--trainer.accelerator=cpu"]
    found = set()
    for configs in comparison["variants"].values():
        names = [name if name.startswith("--") else f"--config={name}" for name in configs]
        model = build([*base, *names, *where, f"--run_dir={tmp_path}/run"]).model
        loss = [model.hparams[name] for name in ("level_decay", "acceptance_weight", "feature_weight")]
        found.add((str(model.drafter), *loss, str(model.drafter.settings)))
    assert len(found) == len(comparison["variants"])  # no variant is another one again


def test_real_runs(fit_args, tmp_path):
    variants = {
        "stem": ["--model.drafter.depth=2", "--model.drafter.stem=1"],
        "none": [],
    }
    arguments = [
        '--base=["default"]',
        f"--variants={json.dumps(variants)}",
        f"--output={tmp_path / 'out'}",
        "--seeds=[0]",
        f"--overrides={json.dumps([a for a in fit_args if not a.startswith(('--run_dir', '--model.drafter.depth'))])}",
    ]
    found = main(arguments)
    assert [len(run.last["acceptance"]) for run in found] == [2, 3]
    assert found[0].draft_seconds > 0
    assert "| stem | 1 |" in (tmp_path / "out/results.md").read_text()
    assert main(arguments) == found  # finished runs are not run again
