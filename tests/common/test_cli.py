"""FitCLI on a toy model: what is packaged, what merges, what is refused, where a run writes, what it resumes from."""

import inspect
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from kd_common.run.checkpoints import check_resumable
from kd_common.run.cli import (
    FitCLI,
    find_config,
    keep_earlier_metrics,
    reserve_run_dir,
    resolve_config_names,
)
from kd_common.run.messages import CommandParser, check_device, check_file, check_groups, null_settings, readable
from kd_common.run.summary import files_of_run
from kd_common.run.training import TrainingModule


class Rule:
    """A replaceable part."""


class Mild(Rule):
    """A rule with settings whose names Strong shares.

    Args:
        rate: Its rate.
        decay: Its decay.
    """

    def __init__(self, rate: float = 0.5, decay: float = 0.25) -> None:
        self.rate, self.decay = rate, decay


class Strong(Rule):
    """Another rule.

    Args:
        rate: Its rate.
        decay: Its decay.
        power: Its power.
    """

    def __init__(self, rate: float = 5.0, decay: float = 2.5, power: int = 2) -> None:
        self.rate, self.decay, self.power = rate, decay, power


@dataclass
class Narrow:
    """Settings that belong together."""

    width: int = 1


class Toy(TrainingModule):
    """A linear model.

    Args:
        width: Number of inputs.
        rule: A rule; None means ``Mild()``.
        tags: Some names.
        narrow: Settings of something else.
        plain: Settings of something else again.
    """

    metric = "loss"
    mode = "min"
    export_name = "toy_{}.pt"
    seed = 0

    def __init__(
        self,
        width: int = 2,
        rule: Rule | None = None,
        tags: tuple[str, ...] = (),
        narrow: Narrow | None = None,
        plain: Narrow = Narrow(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width, self.rule, self.tags = width, rule or Mild(), tags
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).square().mean())

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.remember({"loss": 0.0})

    def export(self, path):
        torch.save(self.history[-1], path)

    def exported_epoch(self, path):
        return torch.load(path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Numbers(pl.LightningDataModule):
    """Random rows.

    Args:
        batch_size: Rows of a batch.
    """

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(torch.randn(8, 2), self.batch_size)

    def val_dataloader(self):
        return DataLoader(torch.randn(8, 2), self.batch_size)


DEFAULT = """
name: toy
trainer:
  {max_epochs: 3, accelerator: cpu, devices: 1, log_every_n_steps: 1, enable_progress_bar: false,
   enable_model_summary: false}
model:
  class_path: MODULE.Toy
  init_args: {width: 2, rule: Mild}
data:
  class_path: MODULE.Numbers
"""
RULES = "model: {class_path: MODULE.Toy, init_args: {rule: {class_path: MODULE.RULE, init_args: ARGS}}}"


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Packaged configurations, with an empty working directory beside them."""
    folder = tmp_path / "configs"
    files = {
        "default": DEFAULT,
        "wide": "name: wide\nmodel: {class_path: MODULE.Toy, init_args: {width: 7}}",
        "long": "trainer: {max_epochs: 30}",
        "rules/strong": RULES.replace("RULE", "Strong").replace("ARGS", "{rate: 6.0, decay: 3.0, power: 4}"),
    }
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("MODULE", __name__))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture
def build(configs):
    def run(*args, **kwargs):
        return FitCLI(Toy, pl.LightningDataModule, config_dir=configs, args=args, **kwargs)

    return run


# ---------------------------------------------------------------- merging


def test_the_packaged_default_applies(build):
    cli = build()
    assert isinstance(cli.model, Toy)
    assert isinstance(cli.datamodule, Numbers)
    assert (cli.model.width, cli.datamodule.batch_size, cli.trainer.max_epochs) == (2, 4, 3)
    assert (cli.config["seed_everything"], cli.config["ckpt_path"]) == (0, None)


def test_a_partial_config_merges_over_the_default(build, tmp_path):
    partial = tmp_path / "mine.yaml"
    partial.write_text("trainer: {max_epochs: 9}")
    cli = build("--config", str(partial))
    assert (cli.trainer.max_epochs, cli.model.width, cli.trainer.accelerator.name()) == (9, 2, "cpu")


def test_later_configs_and_flags_win(build):
    assert build("--config", "wide", "--model.width", "8").model.width == 8
    assert build("--model.width", "8", "--config", "wide").model.width == 7
    cli = build("--config", "long", "--config", "wide", "--trainer.max_epochs", "4")
    assert (cli.trainer.max_epochs, cli.model.width, cli.config["name"]) == (4, 7, "wide")


def test_nested_overrides(build):
    cli = build("--model.rule", "Strong", "--model.rule.power", "3", "--data.batch_size=2", "--model.tags", "[a, b]")
    assert (type(cli.model.rule), cli.model.rule.power, cli.model.rule.rate) == (Strong, 3, 5.0)
    assert (cli.datamodule.batch_size, cli.model.tags) == (2, ("a", "b"))


def test_args_none_reads_the_command_line(configs, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit", "--config", "wide"])
    assert FitCLI(Toy, Numbers, config_dir=configs).model.width == 7


# ---------------------------------------------------------------- names of packaged configurations


@pytest.mark.parametrize("name", ["rules/strong", "rules/strong.yaml"])
@pytest.mark.parametrize("flag", ["--config {}", "--config={}", "-c {}"])
def test_packaged_names_with_and_without_suffix(build, name, flag):
    args = flag.format(name).split()
    assert vars(build(*args).model.rule) == {"rate": 6.0, "decay": 3.0, "power": 4}


def test_a_path_goes_before_a_packaged_name(build):
    Path("long.yaml").write_text("trainer: {max_epochs: 77}")
    assert build("--config", "long.yaml").trainer.max_epochs == 77
    assert build("--config", "long").trainer.max_epochs == 30


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("nothing", " (packaged: default, long, rules/strong, wide)"),
        ("widee.yaml", "; did you mean wide? (packaged: default, long, rules/strong, wide)"),
        ("rules/weak", " (packaged: rules/strong)"),
        ("strong", "; did you mean rules/strong? (packaged: default, long, rules/strong, wide)"),
    ],
)
def test_an_unknown_name_suggests_packaged_ones_and_lists_those_of_its_folder(build, capsys, name, advice):
    with pytest.raises(SystemExit, match="2"):
        build("--config", name)
    message = f"error: --config {name}: no such file, and no packaged configuration{advice}"
    assert message in capsys.readouterr().err.splitlines()


def test_names_are_resolved_without_touching_other_arguments(configs):
    args = ["--name", "wide", "--config", "wide", "--trainer.max_epochs", "1"]
    assert resolve_config_names(args, configs) == [*args[:3], str(configs / "wide.yaml"), *args[4:]]
    assert resolve_config_names(["--config"], configs) == ["--config"]
    with pytest.raises(ValueError, match=r"--config no: .*rules/strong"):
        find_config("no", configs)


# ---------------------------------------------------------------- what is refused, what is printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.pluginss", "2"], "Unrecognized arguments: --trainer.pluginss 2; did you mean plugins?"),
        (["--modell.width", "2"], "Unrecognized arguments: --modell.width 2; did you mean --model?"),
        (["--nonsense", "2"], "Unrecognized arguments: --nonsense 2"),
        (["--model.widht", "2"], f"--model.widht: {__name__}.Toy has no setting 'widht'; did you mean width?"),
        (
            ["--model.narrow.witdh", "2"],
            f"--model.narrow.witdh: {__name__}.Narrow has no setting 'witdh'; did you mean width?",
        ),
        (["--ckpt", "x"], "Unrecognized arguments: --ckpt x; did you mean --ckpt_path?"),
        (["--model.width", "two"], "--model.width: Expected a int. Got value: two"),
        (["--trainer.max_epochs", "two"], "--trainer.max_epochs: Expected a int. Got value: two"),
        (
            ["--model.rule", "Stronk"],
            "--model.rule: no such Rule; did you mean Strong? (known: Mild, Rule, Strong)",
        ),
        (
            ["--model.rule", "Mild", "--model.rule.power", "2"],
            f"--model.rule.power: {__name__}.Mild has no setting 'power'",
        ),
    ],
)
def test_unknown_keys_abbreviations_and_wrong_types_are_refused_in_one_line(build, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        build(*args)
    tip, error = capsys.readouterr().err.strip().splitlines()
    assert tip.startswith("tip: ")
    assert error == f"error: {message}"


def test_missing_options_are_named_by_their_flags(capsys):
    parser = CommandParser(prog="python -m x")
    parser.add_argument("--ckpt", type=str, required=True)
    parser.add_argument("runs", type=str)
    for args, message in (["a"], "--ckpt is required"), (["--ckpt=x"], "runs is required"):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(args)
        assert (
            capsys.readouterr().err
            == f"tip: For details of accepted options run: python -m x --help\nerror: {message}\n"
        )
    parser.example = "--ckpt FILE RUN"
    parser.add_argument("--other", type=str)
    parser.link_arguments("ckpt", "other")  # which asks for a string where there is none
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["a"])
    assert "error: --ckpt is required, as in: python -m x --ckpt FILE RUN\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (list[int], "0", "Expected a list, as in '[0]'. Got value: 0"),
        (Sequence[int], "0,1", "Expected a list, as in '[0,1]'. Got value: 0,1"),
        (tuple[int, ...], "{a: 1}", "Expected a list, as in '[a, b]'. Got value: {'a': 1}"),
        (dict[str, str], "file.jsonl", "Expected a dict, as in '{name: file.jsonl}'. Got value: file.jsonl"),
        (Mapping[str, str] | None, "file.jsonl", "Expected a dict, as in '{name: file.jsonl}'. Got value: file.jsonl"),
        (dict[str, str] | None, "[a]", "Expected a dict, as in '{name: value}'. Got value: ['a']"),
        (list[str] | None, "3", "Expected a list, as in '[3]'. Got value: 3"),
    ],
)
def test_how_lists_and_mappings_are_written_is_shown(capsys, kind, given, message):
    parser = CommandParser(prog="python -m x")
    parser.add_argument("--setting", type=kind)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--setting", given])
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.fullmatch(rf"error: --setting[^:]*: {re.escape(message)}", error)


def test_a_setting_of_a_class_that_only_a_later_file_chooses_is_told_about_the_order(build, capsys):
    args = ["--model.rule.power", "3", "--config", "rules/strong"]
    with pytest.raises(SystemExit, match="2"):
        build("--model.rule", "Mild", *args)
    shown = capsys.readouterr().err
    assert "Mild has no setting 'power'; what stands before --config is read without that file: put --config" in shown
    assert build("--config", "rules/strong", *args[:2]).model.rule.power == 3


def test_a_required_setting_of_a_class_is_named_in_full():
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Errors:
    - Expected a <class 'NoneType'>
    - Problem with given class_path 'vision_kd.training.classification.DistillationModule':
        --student.name is required
  Given value type: <class 'jsonargparse._namespace.Namespace'>"""
    assert readable(message) == "--model.student.name is required"


def test_a_setting_that_must_not_be_null_is_named(build, tmp_path, capsys):
    (tmp_path / "null.yaml").write_text("model: {init_args: {width: null}}")
    with pytest.raises(
        ValueError, match=r"^model\.width must not be null; give a value, or leave it out for the default$"
    ):
        build("--config", str(tmp_path / "null.yaml"))
    with pytest.raises(SystemExit, match="2"):
        build("--model.width", "null")
    assert "error: --model.width: must not be null; give a value" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none_is_refused_before_a_run_dir_is_made(build):
    with pytest.raises(
        ValueError, match=r"--trainer\.accelerator gpu: PyTorch .* finds no GPU here; set it to auto or cpu"
    ):
        build("--trainer.accelerator", "gpu")
    assert not Path("runs").exists()


def test_the_folder_of_a_refused_run_goes_at_the_end_if_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = []
    monkeypatch.setattr("atexit.register", lambda call, *args: left.append((call, args)))
    refused, trained = reserve_run_dir(None, "exp"), reserve_run_dir(None, "exp")
    (trained / "metrics.csv").touch()
    for call, args in left:
        call(*args)
    assert not refused.exists()
    assert (trained / "metrics.csv").exists()


@pytest.mark.parametrize(("given", "kept"), [(None, "64"), ("7", "7")])
def test_the_cache_of_kernels_is_limited_unless_chosen_otherwise(build, monkeypatch, given, kept):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    if given is not None:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
    build()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == kept


def test_a_mistyped_strategy_is_refused_with_what_was_meant(build):
    with pytest.raises(
        ValueError, match=r"--trainer\.strategy ddpp: no such strategy; did you mean ddp, ddp_spawn\? \(known: auto, "
    ):
        build("--trainer.strategy", "ddpp")


def test_torchrun_with_more_processes_than_devices_is_refused(build, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert build().trainer.world_size == 1  # other things than torchrun set it, too
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"torchrun started 2 processes, and trainer\.devices .* is 1: set --trainer\.dev"
    ):
        build()


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"--device {device} cannot be used here; set it to cpu, or check the driver"):
        check_device(device)
    check_device("cpu")


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_run_dir_that_is_a_file_is_refused_before_anything_is_built(build, monkeypatch, where):
    Path("file").touch()
    monkeypatch.setattr("kd_common.run.cli.LightningCLI.instantiate_classes", lambda cli: pytest.fail("built"))
    with pytest.raises(ValueError, match=rf"^--run_dir {where}: file is a file; name a folder$"):
        build("--run_dir", where)


def test_a_run_dir_that_cannot_be_made_is_named(build, monkeypatch):
    def refuse(self, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"--run_dir cannot be made .*'here'"):
        build("--run_dir", "here")


def test_files_and_folders_to_be_written_are_told_apart(tmp_path):
    (tmp_path / "file").touch()
    check_file("--output", tmp_path / "new" / "name")
    with pytest.raises(ValueError, match=rf"^--output {tmp_path} is a folder; name a file$"):
        check_file("--output", tmp_path)
    with pytest.raises(ValueError, match=r"^--output .*/file: .*/file is a file; name a folder$"):
        check_file("--output", tmp_path / "file" / "name")


SETTINGS = "model: {class_path: MODULE.Toy, init_args: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainr: {max_epochs: 2}", "Unrecognized arguments: --trainr"),
        ("trainer: {max_epoch: 2}", "Unrecognized arguments: --trainer.max_epoch; did you mean max_epochs, "),
        (SETTINGS + "{widht: 3}}", "--model: MODULE.Toy has no setting 'widht'; did you mean width?"),
        (SETTINGS + "{plain: {witdh: 3}}}", "--model: plain has no setting 'witdh'"),
        (SETTINGS + "{plain: 3}}", "--model.plain 3: expected settings by name (width)"),
        (SETTINGS + "{plain: text}}", "--model.plain: expected settings by name"),
        (SETTINGS + "{narrow: 3}}", "--model.narrow: expected settings by name"),
        (SETTINGS + "{rule: 3}}", "--model.rule: expected settings by name"),
        (SETTINGS + "{rule: ''}}", "--model.rule: no such Rule (known: Mild, Rule, Strong)"),
        (SETTINGS + "{rule: {class_path: 3.5}}}", "--model.rule: expected settings by name"),
        (SETTINGS + "{rule: {class_path: MODULE.Mild, init_args: 3}}}", "--model.rule: expected settings by name"),
        (SETTINGS + "null}", "--model: expected settings by name"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(build, tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace("MODULE", __name__))
    with pytest.raises(SystemExit, match="2"):
        build("--config", str(path))
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert error.removeprefix("error: ").startswith(message.replace("MODULE", __name__))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)),
        b"\xff\xfe\x00",
        b"a\x00b",
        b"",
        b"null",
        b"hello",
        b"- a\n",
        b"a:\n\t- b",
        b"a: &a [*a]",
        b"a: !!python/name:os.system",
    ],
)
def test_a_file_that_holds_no_settings_is_refused_by_name(build, tmp_path, capsys, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        build(f"--config={path}")
    assert re.search(rf"error: --config {path}: (not a readable YAML file|must hold settings)", capsys.readouterr().err)
    assert not Path("runs").exists()


def test_numbers_are_read_in_files_as_on_the_command_line(build, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {init_args: {width: 010}}")
    for args in (["--config", str(tmp_path / "c.yaml")], ["--model.width=010"]):
        assert build(*args).model.width == 10
    (tmp_path / "c.yaml").write_text("model: {init_args: {width: 1:30}}")
    for args in (["--config", str(tmp_path / "c.yaml")], ["--model.width=1:30"]):
        with pytest.raises(SystemExit, match="2"):
            build(*args)
        assert "Got value: 1:30" in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["3", "null"])
def test_a_trainer_without_settings_is_refused(build, tmp_path, capsys, trainer):
    (tmp_path / "bad.yaml").write_text(f"trainer: {trainer}")
    with pytest.raises(SystemExit, match="2"):
        build("--config", str(tmp_path / "bad.yaml"))
    assert "trainer: expected its settings" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [None, "plugin"])
def test_checkpoints_are_written_in_one_step_unless_another_way_was_chosen(build, kept):
    plugin = "lightning.pytorch.plugins.AsyncCheckpointIO"
    cli = build(*([] if kept is None else [f"--trainer.plugins={plugin}"]))
    found = type(cli.trainer.strategy.checkpoint_io).__name__
    assert found == ("AtomicCheckpointIO" if kept is None else "AsyncCheckpointIO")


def test_print_config_prints_what_replays(build, tmp_path, capsys):
    args = ["--config", "wide", "--model.rule", "Strong", "--model.rule.power", "9", "--trainer.max_epochs", "5"]
    with pytest.raises(SystemExit, match="0"):
        build(*args, "--print_config")
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["init_args"]["width"] == 7
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    replayed, original = build("--config", str(path)), build(*args)
    left, right = (cli.config.as_dict() for cli in (replayed, original))
    left.pop("config"), right.pop("config")
    assert left == right
    assert vars(replayed.model.rule) == {"rate": 5.0, "decay": 2.5, "power": 9}


@pytest.mark.parametrize(
    ("flag", "cls"),
    [
        ("--model.help", Toy),
        ("--data.help", Numbers),
        ("--model.rule.help", Mild),
        ("--model.rule.help", Strong),
    ],
)
def test_help_lists_every_setting(build, capsys, flag, cls):
    with pytest.raises(SystemExit, match="0"):
        build(f"{flag}={__name__}.{cls.__name__}")
    shown = capsys.readouterr().out
    for name in inspect.signature(cls).parameters:
        assert f"{flag.removesuffix('.help').rpartition('.')[2].lstrip('-')}.{name}" in shown


def test_help_lists_the_options_of_a_run(build, capsys):
    with pytest.raises(SystemExit, match="0"):
        build("--help")
    shown = capsys.readouterr().out
    for option in ("--config", "--print_config", "--ckpt_path", "--run_dir", "--name", "--seed_everything"):
        assert option in shown


# ---------------------------------------------------------------- jsonargparse issue 460


def test_a_class_that_the_default_only_names_takes_settings_and_leaves_none_to_another(build):
    assert vars(build("--model.rule.rate", "0.7").model.rule) == {"rate": 0.7, "decay": 0.25}
    assert vars(build("--model.rule", "Strong").model.rule) == vars(Strong())


def test_settings_leak_when_a_named_class_is_switched(build):
    """Why default.yaml names classes without settings; complete blocks are needed until jsonargparse is repaired."""
    rule = build("--config", "rules/strong", "--model.rule", "Mild").model.rule
    assert vars(rule) == {"rate": 6.0, "decay": 3.0}


def test_a_complete_block_inherits_nothing(build, tmp_path):
    path = tmp_path / "mild.yaml"
    block = RULES.replace("RULE", "Mild").replace("ARGS", "{rate: 0.1, decay: 0.2}").replace("MODULE", __name__)
    path.write_text(block)
    rule = build("--config", "rules/strong", "--config", str(path)).model.rule
    assert vars(rule) == {"rate": 0.1, "decay": 0.2}


# ---------------------------------------------------------------- what a run writes


def test_run_dirs_are_numbered(build):
    runs = [build("--name", "exp").run_dir for _ in range(3)]
    assert runs == [Path("runs/exp") / f"run_{i}" for i in range(3)]
    assert build("--name", "other").run_dir == Path("runs/other/run_0")
    assert all(path.is_dir() for path in runs)
    shutil.rmtree(runs[1])
    assert reserve_run_dir(None, "exp") == runs[1], "the first free number"


def test_run_dir_can_be_chosen_and_holds_everything(build, tmp_path):
    args = ["--run_dir", str(tmp_path / "here"), "--trainer.max_epochs", "1"]
    cli = build(*args)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    written = {str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= written
    assert any(name.startswith("events.out.tfevents") for name in written)
    assert not list(Path.cwd().iterdir()), "nothing elsewhere"
    assert build("--config", str(tmp_path / "here/config.yaml")).config["run_dir"] == str(tmp_path / "here")


def test_other_ranks_create_nothing(monkeypatch):
    monkeypatch.setattr("kd_common.run.cli.rank_zero_only.rank", 1)
    assert not reserve_run_dir("somewhere", "exp").exists()
    assert not reserve_run_dir(None, "exp").exists()


def test_a_given_logger_and_no_checkpoints_are_respected(build, tmp_path):
    quiet = build("--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    assert quiet.trainer.loggers == []
    assert quiet.trainer.checkpoint_callback is None
    assert [type(logger) for logger in build().trainer.loggers] == [TensorBoardLogger, CSVLogger]


@pytest.mark.parametrize(
    "logger", [["--trainer.logger=false"], ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"]]
)
def test_settings_lie_in_the_run_dir_wherever_the_logs_go(build, tmp_path, logger):
    args = ["--run_dir", str(tmp_path / "here"), "--trainer.max_epochs=1", "--trainer.default_root_dir=y", *logger]
    cli = build(*args, "--data.batch_size=2")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    resumed = build("--ckpt_path", str(tmp_path / "here/checkpoints/last.ckpt"), "--run_dir", "elsewhere")
    assert resumed.config["data"]["init_args"]["batch_size"] == 2


def test_a_checkpoint_of_the_user_may_have_the_settings_of_ours(build, tmp_path):
    ours = {"monitor": "val/loss", "mode": "min"}
    flags = [f"--trainer.callbacks.{name}={value}" for name, value in {**ours, "save_top_k": -1}.items()]
    args = ["--run_dir", str(tmp_path), "--trainer.max_epochs=2", "--trainer.callbacks+=ModelCheckpoint", *flags]
    cli = build(*args)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    written = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert written == {"best.ckpt", "last.ckpt", "epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"}


def test_a_run_ends_with_the_files_that_it_wrote(tmp_path):
    assert list(files_of_run(tmp_path, "student_{}")) == ["student weights", "configuration"]
    for name in ("checkpoints/last.ckpt", "metrics.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(files_of_run(tmp_path, "student_{}")) == ["student weights", "to resume", "logs", "configuration"]
    assert str(tmp_path / "checkpoints" / "last.ckpt") in files_of_run(tmp_path, "student_{}")["to resume"]


def test_the_checkpoint_monitors_what_the_model_says(build):
    best, last = build().trainer.checkpoint_callbacks
    assert (best.filename, best.monitor, best.mode) == ("best", "val/loss", "min")
    assert (last.filename, last.monitor) == ("last", None)
    for callback in (best, last):
        assert Path(callback.dirpath).parts[-4:] == ("runs", "toy", "run_0", "checkpoints")


def test_fast_dev_run_reserves_no_folder(build):
    assert build("--trainer.fast_dev_run", "true").run_dir is None
    assert not Path("runs").exists()


# ---------------------------------------------------------------- stopping


class Raise(pl.Callback):
    def __init__(self, error, epoch):
        self.error, self.epoch = error, epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise self.error


FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "Interrupted in"),
        (SIGTERMException(), "Interrupted in"),
        (FULL, "Too little memory (lower data.batch_size, "),
        (MemoryError(), "Too little memory (lower data.batch_size, "),
        (torch.OutOfMemoryError("CUDA out of memory"), "Too little memory (lower data.batch_size, "),
        (RuntimeError("something else"), None),
    ],
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_stops_says_what_is_kept(build, caplog, error, reason, epoch):
    cli = build()
    cli.trainer.callbacks.append(Raise(error, epoch))
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"), pytest.raises((SystemExit, type(error))):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    said = [message for message in caplog.messages if "Last checkpoint" in message]
    if reason is None:
        assert not said
        return
    [message] = said
    last = cli.run_dir.resolve() / "checkpoints/last.ckpt"
    kept = (
        f"{last}; go on from there with --ckpt_path {last}."
        if epoch
        else "none written yet; start again, caches are kept."
    )
    assert message.startswith(reason)
    assert message.endswith(f" in epoch {epoch}. Last checkpoint: {kept}")
    assert last.is_file() == bool(epoch)


def test_a_run_dir_of_an_earlier_run_is_announced(build, last_checkpoint, caplog):
    run_dir = ["--run_dir", str(last_checkpoint.parents[1])]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        build(*run_dir, "--ckpt_path", str(last_checkpoint))
        assert "earlier run" not in caplog.text
        build(*run_dir)
    assert "holds an earlier run, whose checkpoints and models this one replaces" in caplog.text


# ---------------------------------------------------------------- resuming


@pytest.fixture
def last_checkpoint(build, tmp_path):
    cli = build("--run_dir", str(tmp_path / "first"), "--trainer.max_epochs", "1")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return tmp_path / "first/checkpoints/last.ckpt"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_resumes(build, last_checkpoint):
    check_resumable(last_checkpoint)
    run_dir = str(last_checkpoint.parents[1])
    cli = build("--ckpt_path", str(last_checkpoint), "--run_dir", run_dir, "--trainer.max_epochs", "2")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config["ckpt_path"], weights_only=True)
    assert (cli.trainer.current_epoch, cli.trainer.global_step) == (2, 4)


def test_a_missing_checkpoint_is_refused_before_a_run_dir_is_made(build):
    with pytest.raises(ValueError, match=r"--ckpt_path nowhere\.ckpt: no such file"):
        build("--ckpt_path", "nowhere.ckpt")
    assert not Path("runs").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(last_checkpoint, share):
    content = last_checkpoint.read_bytes()
    last_checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"last\.ckpt: not a readable checkpoint"):
        check_resumable(last_checkpoint)


@pytest.mark.parametrize("content", [b"", b"just some text", b"PK\x03\x04", pickle.dumps({"state_dict": {}})])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        check_resumable(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_checkpoint_is_refused_or_still_whole(last_checkpoint):
    """Damage to the pickle within the archive ends in one kind of error, whatever opcode it hits."""
    content = last_checkpoint.read_bytes()
    start = content.index(b"data.pkl") + len(b"data.pkl")
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in torch.randint(start, start + 1500, (3,), generator=generator).tolist():
            damaged[place] = int(torch.randint(256, (), generator=generator))
        last_checkpoint.write_bytes(damaged)
        try:
            check_resumable(last_checkpoint)
        except ValueError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(3), {"model": {"w": torch.zeros(2)}}])
def test_a_file_without_training_state_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "student.pt")
    with pytest.raises(ValueError, match=r"holds no training state.*checkpoints/last\.ckpt"):
        check_resumable(tmp_path / "student.pt")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, legacy):
    trace, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    content = {"state_dict": Touch(trace), "optimizer_states": [], "loops": {}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        check_resumable(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file would have run its code"


def test_metrics_of_an_earlier_run_in_the_folder_are_kept(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(content)
        keep_earlier_metrics(tmp_path)
    assert not (tmp_path / "metrics.csv").exists()
    assert [(tmp_path / f"metrics_{n}.csv").read_text() for n in (1, 2)] == ["first", "second"]


def test_settings_that_a_class_hands_on_as_keywords_are_none_of_its_own():
    settings = Namespace(save_dir="here", comment=None)
    logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=settings)
    config = Namespace(trainer=Namespace(logger=logger))
    check_groups(config)
    assert null_settings(config) == []


def test_nulls_are_named_inside_groups_of_settings(tmp_path):
    checks = Namespace(topk=Namespace(k_start=0.1, k_opt=None), learning_rate=None, clip_norm=None)
    model = Namespace(class_path="vision_kd.training.classification.DistillationModule", init_args=checks)
    assert null_settings(Namespace(model=model)) == ["model.learning_rate", "model.topk.k_opt"]


# ---------------------------------------------------------------- settings without effect


@pytest.mark.parametrize(
    "args",
    [
        ["--model.rule=Strong", "--model.rule.power=3", "--model.rule=Mild"],
        ["--model.rule=Strong", "--model.rule.power", "3", "--model.rule=null"],
        ["--model.rule=Strong", "--model.init_args.rule.init_args.power=3", "--model.rule=Mild"],
    ],
)
def test_a_setting_of_a_class_that_is_replaced_behind_it_is_refused(build, capsys, args):
    with pytest.raises(SystemExit, match="2"):
        build(*args)
    assert "power has no effect" in capsys.readouterr().err
    assert build("--model.rule=Mild", "--model.rule=Strong", "--model.rule.power=3").model.rule.power == 3


def test_lightnings_environment_variables_are_refused(build, monkeypatch, capsys):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    with pytest.raises(SystemExit, match="2"):
        build()
    assert (
        "PL_TRAINER_MAX_EPOCHS has no effect here; unset it, and give --trainer.max_epochs" in capsys.readouterr().err
    )


def test_a_checkpoint_given_twice_or_empty_is_refused(build, capsys):
    for args, said in ((["--ckpt_path", "a", "--ckpt_path=b"], "2 times (a, b)"), (["--ckpt_path="], "is empty")):
        with pytest.raises(SystemExit, match="2"):
            build(*args)
        assert f"--ckpt_path {said}" in capsys.readouterr().err.replace("is given ", "")


def test_a_resumed_run_says_which_settings_it_reads(build, last_checkpoint, caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        build("--ckpt_path", str(last_checkpoint), "--trainer.max_epochs", "2")
    assert str(last_checkpoint.parents[1] / "config.yaml") in caplog.text


def test_a_checkpoint_that_would_unpack_to_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))
    with pytest.raises(
        ValueError, match=r"bomb\.ckpt: not a readable checkpoint \(damaged: archive/data\.pkl, compressed"
    ):
        check_resumable(path)
