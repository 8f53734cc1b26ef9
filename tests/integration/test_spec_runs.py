"""Drafter training: killed and resumed equals uninterrupted; two processes equal one with the doubled batch."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_common.distributed import is_dtensor
from spec_decode.fit import build, run

pytestmark = pytest.mark.slow


def arguments(folder, standin, batch=2, *extra):
    return [
        f"--run_dir={folder}",
        "--seed_everything=5",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=4",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--model.target.name={standin}",
        "--model.target.dtype=float32",
        "--model.drafter=FastEagle",
        "--model.drafter.depth=3",
        "--model.drafter.draft_vocab=90",
        "--model.learning_rate=0.003",
        "--data.limit=11",
        "--data.val_prompts=3",
        "--data.sampling.max_new_tokens=12",
        "--data.max_length=200",
        "--data.epoch_rows=4",
        f"--data.batch_size={batch}",
        "--measure_prompts=0",
        *extra,
    ]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_killed_and_resumed_equals_uninterrupted(tmp_path, target, kill_inside_epoch, assert_equal):
    torch.set_num_threads(1)
    whole = build(arguments(tmp_path / "whole", target))
    expected = run(whole)  # also leaves text and features in the cache
    folder = tmp_path / "killed"
    kill_inside_epoch("spec_decode", arguments(folder, target), tmp_path, epoch=2, batch=0)
    resumed = build([*arguments(folder, target), f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"])
    result = run(resumed)
    assert resumed.trainer.global_step == whole.trainer.global_step == 8
    assert_equal(result.history, expected.history)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    for state, expected_state in zip(
        resumed.trainer.optimizers[0].state.values(), whole.trainer.optimizers[0].state.values(), strict=True
    ):
        assert torch.equal(state["exp_avg"], expected_state["exp_avg"])


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 4), (2, 2), (3, 2)])
def test_accumulation_does_not_change_the_update(tmp_path, target, batch, accumulate):
    """In float64; answers of different lengths, so that the micro-batches supervise different numbers of tokens."""
    torch.set_num_threads(1)
    rows = batch * accumulate
    extra = ("--trainer.precision=64-true", "--model.target.dtype=float64", "--data.features=online")
    extra += (f"--data.epoch_rows={rows}", "--trainer.max_epochs=2", "--trainer.gradient_clip_val=0.5")
    whole = build(arguments(tmp_path / "whole", target, rows, *extra))
    run(whole)
    split = build(
        arguments(tmp_path / "split", target, batch, *extra, f"--trainer.accumulate_grad_batches={accumulate}")
    )
    run(split)
    assert whole.trainer.global_step == split.trainer.global_step == 2
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[key], value, rtol=0, atol=1e-9)


def distributed_run(folder, standin, shard):
    """What each of the two processes does."""
    torch.set_num_threads(1)
    extra = ("--trainer.precision=64-true", "--model.target.dtype=float64", "--trainer.devices=2")
    extra += ("--trainer.strategy=ddp", "--data.features=online", f"--model.shard_target={shard}")
    extra += ("--trainer.callbacks+=spec_decode.training.callbacks.DraftFigures", "--trainer.callbacks.tree=[2,1]")
    cli = build(arguments(f"{folder}/both", standin, 1, *extra))
    result = run(cli)
    sharded = {is_dtensor(p) for layer in cli.model.target.layers for p in layer.parameters()}
    assert sharded == {shard == "true"}
    found = {"state": cli.model.state_dict(), "history": result.history}
    torch.save(found, f"{folder}/rank{cli.trainer.global_rank}.pt")


@pytest.mark.ddp
@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, target, run_ranks, shard):
    """In float64, the target whole in each or spread over both; the ranks supervise different numbers of tokens."""
    torch.set_num_threads(1)
    extra = ("--trainer.precision=64-true", "--model.target.dtype=float64", "--data.features=online")
    single = build(arguments(tmp_path / "one", target, 2, *extra))
    expected = run(single)
    run_ranks(distributed_run, tmp_path, str(tmp_path), str(target), shard)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for key, value in single.model.state_dict().items():
            torch.testing.assert_close(found["state"][key], value, rtol=0, atol=1e-10)
        for epoch, other in zip(found["history"], expected.history, strict=True):
            assert epoch["loss"] == pytest.approx(other["loss"], rel=1e-8)
            assert epoch["acceptance"] == other["acceptance"]
    board = EventAccumulator(str(tmp_path / "both")).Reload()  # a sharded target draws nothing, and does not hang
    assert bool(board.Tags()["images"]) == (shard == "false")
    assert not (tmp_path / "both/drafter_last/drafter.json.part").exists()
    assert (tmp_path / "both/drafter_last/drafter.json").is_file()
