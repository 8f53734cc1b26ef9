"""A run killed in the middle of an epoch and resumed equals one that was never interrupted, bit for bit."""

from pathlib import Path

import pytest
import torch

from vision_kd.fit import build, run

pytestmark = pytest.mark.slow
PLAIN = ["--model.gsnr_every=2"]
FULL = ["--model.ema_decay=0.9", "--model.accumulate=3", "--model.clip_norm=1", "--config=methods/dkd_beta2"]


def arguments(run_dir, extra):
    return [
        f"--run_dir={run_dir}",
        "--seed_everything=5",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=4",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--data.batch_size=32",
        "--data.train_subset=256",
        "--model.teacher.name=resnet8",
        "--model.teacher.epochs=1",
        *extra,
    ]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("extra", [PLAIN, FULL], ids=["plain", "ema, accumulation, DKD"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, extra, kill_inside_epoch, assert_equal):
    torch.set_num_threads(1)
    whole = build(arguments(tmp_path / "whole", extra))
    expected = run(whole)  # also leaves the teacher in the cache

    folder = tmp_path / "killed"
    kill_inside_epoch("vision_kd", arguments(folder, extra), tmp_path, epoch=2, batch=4)
    last = folder / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    resumed = build([*arguments(folder, extra), f"--ckpt_path={last}"])
    result = run(resumed)

    assert resumed.trainer.current_epoch == whole.trainer.current_epoch == 4
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert_equal(resumed.trainer.optimizers[0].state_dict(), whole.trainer.optimizers[0].state_dict(), "optimizer")
    assert_equal(result.history, expected.history, "history")
    assert [epoch["epoch"] for epoch in result.history] == [0, 1, 2, 3]
    files = [
        {name: torch.load(Path(r.run_dir) / f"student_{name}.pt", weights_only=True) for name in ("last", "best")}
        for r in (result, expected)
    ]
    assert_equal(*files, "student")
