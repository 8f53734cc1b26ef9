"""`python -m spec_decode.fit`: train a drafter for a target and report what it brings.

`build` parses and makes everything, `run` trains, `main` does both and prints the table. Notebooks
and tests call `build([...])` with the same arguments as the command line.
"""

from kd_common.run.early import answer_early

if __name__ == "__main__":
    answer_early("spec_decode.fit")  # before the imports below, which take seconds

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

import spec_decode.training.callbacks  # noqa: F401  (makes its class names known to the command line)
from kd_common.errors import UserError
from kd_common.run.cli import FitCLI, fixed_seed
from kd_common.run.errors import run_command
from kd_common.run.rehearsal import alone
from kd_common.run.result import count_parameters
from kd_common.run.run_lock import holding_folder
from spec_decode.data.datamodule import TargetText
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.measure import Measurement, measure
from spec_decode.drafters.files import for_inference
from spec_decode.training.drafter_module import DrafterModule
from spec_decode.training.rehearsal import rehearse
from spec_decode.training.result import Result
from spec_decode.training.summary import print_summary

CONFIG_DIR = Path(str(files("spec_decode") / "configs"))


class DrafterCLI(FitCLI):
    """The command line of `spec_decode.fit`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Pass the seed on, and ask how the result is measured."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--measure_prompts",
            type=int,
            default=4,
            help="Held-out prompts decoded plainly and with the trained drafter at the end; 0 for none.",
        )
        for target in ("data.init_args.seed", "model.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=fixed_seed)

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail, or silently do something else, once the target is loaded.

        Raises:
            UserError: For a sharded target with stored features.
        """
        if (
            self.config["model"]["init_args"]["shard_target"]
            and self.config["data"]["init_args"].get("features") != "online"
        ):
            raise UserError("model.shard_target spreads the target for passes in the loop; set data.features online")


def build(args: Sequence[str] | None = None) -> DrafterCLI:
    """Parse the configuration and instantiate model, data and trainer; runs nothing.

    Args:
        args: Command line as a list, or None for `sys.argv`.
    """
    return DrafterCLI(DrafterModule, TargetText, config_dir=CONFIG_DIR, args=args)


@holding_folder
def run(cli: DrafterCLI) -> Result:
    """Let the target write its text, train, measure, and collect the result."""
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    model.obtain(data, trainer)
    parameters = {  # before the target is packed: packed weights are no parameters
        "target": count_parameters(model.target),
        "drafter": count_parameters(model.drafter),
    }
    if trainer.is_global_zero and alone():
        rehearse(model, data, trainer, cli.run_dir)
    trainer.fit(model, datamodule=data, ckpt_path=cli.config["ckpt_path"], weights_only=True)
    tree: tuple[int, ...] | None = None
    measured: dict[str, Measurement] = {}
    if cli.config["measure_prompts"] and trainer.is_global_zero and trainer.world_size == 1:
        tree, measured = measure_held_out(model, data, cli.config["measure_prompts"])
    return Result(
        history=model.history,
        metric=model.metric,
        mode=model.mode,
        parameters=parameters,
        run_dir=cli.run_dir,
        tree=tree,
        measured=measured,
    )


def measure_held_out(
    model: DrafterModule, data: TargetText, count: int
) -> tuple[tuple[int, ...], dict[str, Measurement]]:
    """Decode held-out prompts greedily: plainly, with a chain of all levels, and with this machine's best tree."""
    target = model.target
    drafter = for_inference(model.drafter)
    auto = SpeculativeDecoder.tuned(target, drafter)
    decoders = {
        "plain": SpeculativeDecoder(target),
        "chain": SpeculativeDecoder(target, drafter, tree=(1,) * drafter.depth),
    }
    if auto.tree:
        decoders["tree"] = auto
    assert isinstance(auto.tree, tuple)
    measured = measure(
        decoders, data.held_out[:count], max_new_tokens=data.sampling.max_new_tokens, stop_tokens=data.stops
    )
    return auto.tree, measured


def main(args: Sequence[str] | None = None) -> Result:
    """Build, run and print the table."""
    cli = build(args)
    result = run(cli)
    if cli.trainer.is_global_zero:
        print_summary(result, cli.model)
    return result


if __name__ == "__main__":
    run_command(main)
