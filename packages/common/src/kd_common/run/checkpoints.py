"""Checkpoints of a run: written in one step, and checked before anything is built on them."""

import io
import itertools
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from kd_common.errors import UserError
from kd_common.files import damaged_entry, write_atomically
from kd_common.run.result import Mode

CHECKPOINT_DIR = "checkpoints"
CONFIG = "config.yaml"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are complete or absent, whatever interrupts the writing.

    Lightning's own are written to the system's temporary folder and moved, which copies if that is another disk: a
    kill then leaves half a checkpoint in the place of the last one, and a full disk no name to look for.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, down to the disk, and rename; addresses such as `s3://...` are left to Lightning.

        Raises:
            OSError: Naming the file, whose earlier content is unchanged.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), content.getbuffer())


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint that every run writes. Lightning refuses two callbacks of one class with the same settings.

    A user's ModelCheckpoint may have those of ours.
    """


def run_checkpoints(run_dir: Path, monitor: str, mode: Mode) -> list[RunCheckpoint]:
    """Return the callbacks that write `checkpoints/best.ckpt` and `last.ckpt` of a run.

    Args:
        run_dir: Folder of the run.
        monitor: Metric by which the best one is chosen.
        mode: Whether a larger or a smaller value of it is better.
    """
    # Not `save_last`: Lightning 2.6 then writes last.ckpt only when the best one changes. The last comes second, so
    # that it knows this epoch's best.
    files: dict[str, Mapping[str, Any]] = {"best": {"monitor": monitor, "mode": mode}, "last": {}}
    return [
        RunCheckpoint(
            run_dir / CHECKPOINT_DIR,
            name,
            # No version counter: a second run in this folder must not leave the first one's last.ckpt.
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # right after the validation, whenever that is
            **settings,
        )
        for name, settings in files.items()
    ]


class SaveSettings(SaveConfigCallback):
    """Write the settings into the folder of the run, where a resumed one looks for them, wherever its logs go.

    Args:
        parser: Parser of the settings.
        config: The settings.
        folder: Folder of the run; None for one that writes nothing.
    """

    def __init__(self, parser: Any, config: Any, folder: Path | None = None) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write them."""
        if self.folder is not None:
            self.parser.save(self.config, self.folder / CONFIG, skip_none=False, overwrite=True, multifile=False)


def resumed_config(args: Sequence[str]) -> list[str]:
    """Return `--config` with the configuration that was saved with the checkpoint of `--ckpt_path`, if there is one.

    A resumed run thus continues with its own settings; what else is on the command line still wins.

    Raises:
        UserError: If the flag is given twice, or empty.
    """
    given = [
        following if arg == "--ckpt_path" else arg.removeprefix("--ckpt_path=")
        for arg, following in itertools.pairwise([*args, ""])
        if arg == "--ckpt_path" or arg.startswith("--ckpt_path=")
    ]
    if len(given) > 1:
        raise UserError(f"--ckpt_path is given {len(given)} times ({', '.join(given)}); a run resumes from one file")
    if "" in given:
        raise UserError("--ckpt_path is empty; give a file, or null to start anew")
    config = Path(given[0]).parent.parent / CONFIG if given else None
    if config is None or not config.is_file():
        return []
    rank_zero_info(f"Settings of the run that is resumed: {config}; what the command line gives goes before them.")
    return [f"--config={config}"]


def check_same_settings(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to resume with other model settings: the optimizer's state would go on with the old ones.

    Raises:
        UserError: Naming the settings that differ.
    """

    def plain(value: Any) -> Any:
        return json.loads(json.dumps(value, default=vars, sort_keys=True))

    differing = [
        key for key in saved if not key.startswith("_") and key in asked and plain(saved[key]) != plain(asked[key])
    ]
    if differing:
        changes = "; ".join(f"model.{key} was {plain(saved[key])}, now {plain(asked[key])}" for key in differing)
        raise UserError(
            f"--ckpt_path {path} was trained with other settings: {changes}. Resume with its own configuration "
            "(leave those flags out), or start a new run"
        )


def check_resumable(path: Path) -> dict[str, Any]:
    """Refuse a missing, damaged or foreign checkpoint before anything is built; return its content.

    Raises:
        UserError: If there is no such file, or if it is not a complete Lightning checkpoint of plain tensors (it is
            read with `weights_only=True`, so a pickle with code in it is refused, not run).
    """
    if not path.is_file():
        raise UserError(f"--ckpt_path {path}: no such file")
    # Every checkpoint of Lightning is a zip archive; its directory, at the end, is what a killed writer leaves out.
    if not zipfile.is_zipfile(path):
        raise UserError(f"--ckpt_path {path}: not a readable checkpoint (truncated, or not written by torch.save)")
    if damaged := damaged_entry(path):
        raise UserError(
            f"--ckpt_path {path}: not a readable checkpoint (damaged: {damaged}). Resume from another one in its folder"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # What torch's unpickler raises: besides its own error whatever the opcodes run into.
    except Exception as error:
        raise UserError(f"--ckpt_path {path}: not a readable checkpoint ({error})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "optimizer_states", "loops"} <= checkpoint.keys():
        raise UserError(
            f"--ckpt_path {path}: holds no training state; give a file written during training "
            f"(<run_dir>/{CHECKPOINT_DIR}/last.ckpt), not exported weights"
        )
    return checkpoint
