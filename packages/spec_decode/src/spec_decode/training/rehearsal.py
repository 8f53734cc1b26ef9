"""One dry step of a run, before its target writes text."""

from pathlib import Path

import lightning.pytorch as pl
import torch

from kd_common.run.rehearsal import check_monitors, rehearsing
from kd_common.run.trainer_settings import check_batches
from spec_decode.data.datamodule import DraftBatch, TargetText
from spec_decode.drafters import load_drafter, save_drafter
from spec_decode.training.drafter_module import DrafterModule

PROMPT, ANSWER = 32, 8


def rehearse(model: DrafterModule, data: TargetText, trainer: pl.Trainer, run_dir: Path | None) -> None:
    """Pass one short sequence through target, drafter and loss, forth and back, and write and read the drafter.

    What fails here would fail later, after the target has written its text or at the first export. The run itself is
    left as it was, bit for bit. A target that is shared out over processes is not run.

    Args:
        model: The training module.
        data: The data, with a target attached.
        trainer: The trainer of the run.
        run_dir: Folder of the run; None for one that writes nothing.

    Raises:
        ValueError: From the settings.
    """
    ranks, device = trainer.world_size, trainer.strategy.root_device
    per_batch = data.batch_size * ranks
    check_batches(trainer, data.epoch_length(ranks) // per_batch, -(-data.val_prompts // per_batch))
    if model.shard_target and ranks > 1:
        return
    drafter, target = model.drafter, model.target
    with rehearsing(run_dir) as folder, trainer.precision_plugin.forward_context():
        model.to(device), target.to(device)
        twin = drafter.untrained()
        if twin.vocabulary is not None:  # chosen by the text, which is not there yet
            twin.use_vocabulary(torch.arange(len(twin.vocabulary)))
        model.drafter = twin
        try:
            prompt = data.encoded[0][-PROMPT:]
            tokens = torch.tensor([[*prompt, *prompt[-1:] * ANSWER]], device=device)
            batch = DraftBatch(tokens, torch.arange(tokens.shape[1], device=device)[None] >= len(prompt))
            torch.stack(model.level_losses(batch, *model.outputs(batch))[0]).sum().backward()
            model.on_validation_start()
            with torch.no_grad():
                model.validation_step(batch, 0)
        finally:
            model.drafter = drafter
        save_drafter(twin, folder, {"target": model.target_spec.name})
        load_drafter(folder, target)
    levels = [f"{name}{level}" for name in ("val/acceptance_", "a") for level in range(1, twin.depth + 1)]
    check_monitors(trainer, ["val/tau", "val/loss", "loss", *levels])
