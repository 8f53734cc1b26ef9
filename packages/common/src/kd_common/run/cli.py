"""Command-line base of every `python -m <package>.fit`: a LightningCLI that parses and builds, and runs nothing.

On top of LightningCLI it adds

* a default configuration packaged with the library, over which `--config` files and flags merge from left to right;
* packaged configurations by their short name: `--config pairs/a_b.yaml` is looked up as a path first, then inside
  the package;
* `--ckpt_path` to resume and `--run_dir` for everything the run writes: checkpoints, TensorBoard and CSV logs and
  the resolved configuration.
"""

import atexit
import contextlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kd_common.errors import UserError
from kd_common.files import free_name
from kd_common.registry import suggest
from kd_common.run.checkpoints import (
    AtomicCheckpointIO,
    SaveSettings,
    check_resumable,
    check_same_settings,
    resumed_config,
    run_checkpoints,
)
from kd_common.run.exit_message import ExitMessage
from kd_common.run.export import Export
from kd_common.run.memory import limit_primitive_cache
from kd_common.run.messages import (
    CommandParser,
    check_accelerator,
    check_folder,
    check_groups,
    check_world_size,
    null_settings,
)
from kd_common.run.run_lock import NAME, hold
from kd_common.run.trainer_settings import check_precision_and_length, check_trainer
from kd_common.run.training import FitTrainer, TrainingModule

DEFAULTS = "default.yaml"


class FitParser(CommandParser, LightningArgumentParser):
    """Lightning's parser with short errors.

    Args:
        defaults: File of the settings that `--help` shows.
        settings: Those of Lightning's parser.
    """

    def __init__(self, *, defaults: Path | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.defaults = defaults

    def format_help(self) -> str:
        """Return the help, with the packaged defaults."""
        self.default_config_files = [str(self.defaults)] if self.defaults else []
        return super().format_help()


class FitCLI(LightningCLI):
    """Parse a configuration and instantiate model, data and trainer from it.

    Args:
        model_class: Base class of the models the configuration may name.
        datamodule_class: Base class of the data modules the configuration may name.
        config_dir: Folder of packaged YAML files; its `default.yaml` is always applied first.
        args: Command line; None reads `sys.argv`. Notebooks and tests pass a list.

    Raises:
        SystemExit: With code 2 and a message when the configuration does not parse (unknown key, wrong type, no file).
    """

    command: ClassVar[str] = "fit"

    def __init__(
        self,
        model_class: type[TrainingModule],
        datamodule_class: type[LightningDataModule],
        *,
        config_dir: Path,
        args: Sequence[str] | None = None,
    ) -> None:
        self.config_dir = config_dir
        silence_known_noise()
        limit_primitive_cache()
        self.run_dir: Path | None = None
        super().__init__(
            model_class,
            datamodule_class,
            trainer_class=FitTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            run=False,
            args=None if args is None else list(args),
            parser_class=FitParser,
            seed_everything_default=0,
            save_config_callback=SaveSettings,
            parser_kwargs={
                "prog": f"python -m {config_dir.parent.name}.{self.command}",
                "allow_abbrev": False,  # a mistyped flag must not be taken for a longer one
                "defaults": config_dir / DEFAULTS,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--ckpt_path` and `--run_dir`."""
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to resume from.")
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder for checkpoints, logs and the resolved configuration (default: the next runs/NAME/run_N).",
        )
        parser.add_argument("--name", type=str, default="default", help="Experiment name, a folder under runs/.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str] | None) -> None:  # type: ignore[override]
        """Parse the command line behind the packaged defaults, with the names of packaged configurations resolved."""
        command_line = sys.argv[1:] if args is None else list(args)
        try:
            command_line = resumed_config(command_line) + command_line
            command_line = resolve_config_names(command_line, self.config_dir)
        except UserError as error:
            parser.error(str(error))
        configs = [place for place, arg in enumerate(command_line) if arg.startswith("--config")]
        if any(arg.startswith(("--data.", "--model.")) for arg in command_line[: max(configs, default=0)]):
            assert isinstance(parser, FitParser)
            parser.note = "; what stands before --config is read without that file: put --config first"
        # As a default_config_file it would come with all settings of its classes, which other classes then inherit.
        self.config = parser.parse_args([f"--config={self.config_dir / DEFAULTS}", *command_line])
        if not isinstance(self.config["trainer"], Mapping | Namespace) or "max_epochs" not in self.config["trainer"]:
            parser.error(f"trainer: expected its settings, such as {{max_epochs: 3}}, got {self.config['trainer']!r}")
        try:
            check_environment()
            check_groups(self.config)
            check_effect(self.config, command_line)
        except UserError as error:
            parser.error(str(error))

    def instantiate_classes(self) -> None:
        """Build data, model and trainer.

        Raises:
            UserError: What a constructor objects to, without jsonargparse's wrapping.
        """
        path = Path(self.config["ckpt_path"]) if self.config["ckpt_path"] else None
        saved = check_resumable(path) if path else {}
        check_accelerator(self.config["trainer"]["accelerator"])
        check_strategy(self.config["trainer"]["strategy"])
        check_precision_and_length(*(self.config["trainer"][name] for name in ("precision", "max_epochs", "max_steps")))
        check_folder("--run_dir", self.config["run_dir"] or "runs")
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            message = str(error)
            if "NoneType" in message and (nulls := null_settings(self.config)):
                message = f"{', '.join(nulls)} must not be null; give a value, or leave it out for the default"
            raise UserError(message) from error
        check_trainer(self.trainer, self.model)
        if path:
            check_same_settings(path, saved.get("hyper_parameters", {}), self.model.hparams)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, which writes to `run_dir`; a logger in the configuration writes where it says."""
        trainer_config = self.config_init["trainer"]
        if trainer_config.get("fast_dev_run") or trainer_config.get("barebones"):
            return super().instantiate_trainer(**kwargs)
        self.run_dir = reserve_run_dir(self.config_init["run_dir"], self.config_init["name"])
        if getattr(rank_zero_only, "rank", 0) == 0:
            hold(self.run_dir)
        if not self.config_init["ckpt_path"] and (self.run_dir / "config.yaml").is_file():
            rank_zero_info(f"{self.run_dir} holds an earlier run, whose checkpoints and models this one replaces.")
        if trainer_config.get("default_root_dir") is None:
            kwargs["default_root_dir"] = str(self.run_dir)
        if trainer_config.get("logger") in (None, True):
            where: dict[str, Any] = {"save_dir": str(self.run_dir), "name": "", "version": ""}
            keep_earlier_metrics(self.run_dir)
            kwargs["logger"] = [TensorBoardLogger(**where), CSVLogger(**where)]
        if trainer_config.get("enable_checkpointing") is not False:
            checkpoints = run_checkpoints(self.run_dir, f"val/{self.model.metric}", self.model.mode)
            self.trainer_defaults["callbacks"] = [ExitMessage(), *checkpoints]
        self.save_config_kwargs["folder"] = self.run_dir
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        # First: a run that is killed between export and checkpoint exports again.
        callbacks.insert(0, Export(self.run_dir))
        check_world_size(trainer.world_size)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody chose another one
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def check_environment() -> None:
    """Refuse Lightning's variables for trainer settings: the configuration gives every setting, so they do nothing.

    Raises:
        UserError: Naming a variable and the flag to use.
    """
    prefix = "PL_TRAINER_"
    if found := next((name for name in os.environ if name.startswith(prefix)), None):
        flag = f"--trainer.{found.removeprefix(prefix).lower()}"
        raise UserError(f"the environment variable {found} has no effect here; unset it, and give {flag}")


def check_effect(config: Namespace, command_line: Sequence[str]) -> None:
    """Refuse a setting inside a class that something behind it replaced; jsonargparse drops it.

    Args:
        config: The parsed configuration.
        command_line: What it was parsed from.

    Raises:
        UserError: Naming the flag.
    """
    for word in command_line:
        flag = word.partition("=")[0]
        parts = flag.removeprefix("--").removesuffix("+").split(".")
        if flag.startswith("--") and len(parts) > 2 and parts[0] in config and not _is_set(config, parts):
            raise UserError(f"{flag} has no effect: what stands behind it replaces the class that it sets; put it last")


def _is_set(settings: Any, parts: Sequence[str]) -> bool:
    """Return whether a configuration holds a setting, given by the parts of its name with or without `init_args`."""
    for part in parts:
        if not isinstance(settings, Namespace):
            return settings is not None  # inside a list or a mapping
        if "class_path" in settings and part not in ("class_path", "init_args", "dict_kwargs"):
            settings = settings.get("init_args") or Namespace()
        if part not in settings:
            return False
        settings = settings[part]
    return True


def check_strategy(name: Any) -> None:
    """Refuse a strategy that Lightning does not know; its own error lists a few of them and an address.

    Raises:
        UserError: Naming what there is.
    """
    if isinstance(name, str) and name not in (known := ["auto", *StrategyRegistry.available_strategies()]):
        raise UserError(
            f"--trainer.strategy {name}: no such strategy{suggest(name, known)} (known: {', '.join(known)}; others as "
            "a class_path)"
        )


def fixed_seed(seed: bool | int) -> int:
    """Return the seed as a number.

    Raises:
        UserError: For `true`, which would draw a new seed on resuming.
    """
    if seed is True:
        raise UserError("seed_everything must be a number (or false for 0): a run is resumed from its seed")
    return int(seed)


def silence_known_noise() -> None:
    """Drop messages of Lightning that say nothing about the user's run."""
    # They find the folder reserved for this run a moment ago, or the run that is resumed; nothing is lost there.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning 2.6 calls what torch 2.15 deprecates.
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
    # Batches of data that is already on the device need no worker processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # It advises against what is wanted: the state after the update.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    # Advertisements for a hosted logger and hosted models, printed for every trainer.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not any(name in record.getMessage() for name in ("litlogger", "litmodels"))


def resolve_config_names(args: Sequence[str], config_dir: Path) -> list[str]:
    """Replace `--config NAME` (or `-c NAME`) by the packaged file NAME when no such path exists.

    Args:
        args: Command line.
        config_dir: Folder of the packaged YAML files.

    Raises:
        UserError: If NAME is neither a path nor a packaged configuration; the message lists its folder's.
    """
    resolved = list(args)
    for i, arg in enumerate(args):
        if arg in ("--config", "-c") and i + 1 < len(args):
            resolved[i + 1] = find_config(args[i + 1], config_dir)
        elif arg.startswith("--config="):
            resolved[i] = "--config=" + find_config(arg.removeprefix("--config="), config_dir)
    return resolved


def find_config(name: str, config_dir: Path) -> str:
    """Find a configuration by its path, or by the name of a packaged file with or without `.yaml`."""
    candidates = [Path(name), config_dir / name, config_dir / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    packaged = sorted(p.relative_to(config_dir).with_suffix("").as_posix() for p in config_dir.rglob("*.yaml"))
    stem = name.removesuffix(".yaml")
    folder, _, last = stem.rpartition("/")
    listed = [other for other in packaged if folder and other.startswith(f"{folder}/")] or packaged
    # The name without its folder is close to none by its letters alone.
    elsewhere = [other for other in packaged if other.endswith(f"/{last}")]
    hint = f"; did you mean {', '.join(elsewhere)}?" if elsewhere else suggest(stem, listed)
    if Path(name).is_dir():
        raise UserError(f"--config {name}: is a folder; give a file of settings in it")
    raise UserError(
        f"--config {name}: no such file, and no packaged configuration{hint} (packaged: {', '.join(listed)})"
    )


def reserve_run_dir(run_dir: str | None, name: str) -> Path:
    """Create and return the folder of this run: the one asked for, else the first free `runs/NAME/run_N`.

    Only rank 0 creates it. The other ranks may settle on another number; they never write, and Lightning broadcasts
    the checkpoint folder of rank 0.
    """
    main = getattr(rank_zero_only, "rank", 0) == 0
    if run_dir is not None:
        path = Path(run_dir)
        if main:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(error.errno, f"--run_dir cannot be made ({error.strerror})", run_dir) from error
        return path
    for number in itertools.count():
        path = Path("runs") / name / f"run_{number}"
        if not main and not path.exists():
            return path
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        atexit.register(_remove_if_empty, path)  # a run that was refused leaves nothing
        return path
    raise AssertionError("unreachable")


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if [entry.name for entry in folder.iterdir()] == [NAME]:
            (folder / NAME).unlink()
        folder.rmdir()


def keep_earlier_metrics(run_dir: Path) -> None:
    """Rename the metrics of an earlier run in this folder, as when resuming there: CSVLogger would delete them."""
    metrics = run_dir / "metrics.csv"
    if getattr(rank_zero_only, "rank", 0) == 0 and metrics.is_file():
        metrics.rename(free_name(metrics))
