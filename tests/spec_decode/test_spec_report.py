"""The report of real runs: every section is there, the pictures hold the drafted tokens, targets are not mixed."""

import io
from types import SimpleNamespace

import pytest
import torch
import yaml

from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.measure import Measurement
from spec_decode.decoding.tree import DraftTree
from spec_decode.decoding.verify import Verified
from spec_decode.drafters import PromptLookup
from spec_decode.fit import build, run
from spec_decode.report import main
from spec_decode.viz.figures import Passes, milliseconds, plot_trees


def test_passes_are_kept_with_their_trees(tiny, byte_tokenizer):
    passes = Passes(2)
    decoder = SpeculativeDecoder(tiny.target, PromptLookup(), tree=(1, 1, 1))
    out = decoder.generate([[3, 7, 3, 7, 3, 7, 3]], max_new_tokens=20, on_pass=passes)
    assert len(passes.kept) == 2
    assert sum(out.pass_sizes.values()) > 2
    for tree, verified in passes.kept:
        assert tree.tokens.shape[1] == 8
        assert int(verified.accepted[0]) <= 3
    assert len(plot_trees(passes.kept, byte_tokenizer).axes) == 2


def test_tokens_in_a_tree_are_no_formulas():
    tree = DraftTree(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]]))
    path, tokens = torch.tensor([[0, 1]]), torch.tensor([[1, 2]])
    verified = Verified(path, tokens, accepted=torch.tensor([1]), tested=torch.tensor([[True]]))
    tokenizer = SimpleNamespace(decode=lambda ids: r"$\no$")
    plot_trees([(tree, verified)], tokenizer).savefig(io.BytesIO())


def test_time_per_token_adds_up():
    found = Measurement(tokens=10, seconds=2.0)
    found.phases |= {"prefill": 5.0, "draft": 0.5, "target": 1.0, "verify": 0.1, "commit": 0.1}
    assert milliseconds(found) == pytest.approx(
        {"draft": 50, "target": 100, "verify": 10, "commit": 10, "overhead": 30}
    )


@pytest.mark.slow
def test_report_of_a_run(tmp_path, fit_args, capsys, assert_live):
    run(
        build(
            [
                *fit_args,
                "--trainer.callbacks+=spec_decode.training.callbacks.DraftFigures",
                "--trainer.callbacks.tree=[2,1]",
            ]
        )
    )
    folder = tmp_path / "run"
    assert_live(folder, ["acceptance", "draft trees", "time"])
    page = main([str(folder), f"--output={tmp_path / 'report'}", "--count=2", "--max_new_tokens=12", "--tree=2,1"])
    assert f"written to {page}" in capsys.readouterr().out
    titles = [line.partition("</h2>")[0] for line in page.read_text().split("<h2>")[1:]]
    expected = ["Runs", "Training", "Acceptance while decoding", "Where the time goes", "Draft trees of run"]
    assert titles == expected
    other = tmp_path / "other"
    other.mkdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"]["target"]["name"] = "elsewhere"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    (other / "metrics.csv").write_text((folder / "metrics.csv").read_text())
    with pytest.raises(ValueError, match="for different targets"):
        main([str(folder), str(other)])
    (other / "metrics.csv").write_text("epoch,step,val/tar\n0,1,0.5\n")
    with pytest.raises(ValueError, match=r"no run of spec_decode\.fit"):
        main([str(folder), str(other)])
