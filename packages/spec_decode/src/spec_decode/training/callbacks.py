"""Show what a drafter drafts while it is trained."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from kd_common.run.tensorboard_figures import TensorBoardFigures
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.measure import Measurement
from spec_decode.drafters.files import for_inference
from spec_decode.training.drafter_module import DrafterModule
from spec_decode.viz.figures import Passes, plot_acceptance, plot_time, plot_trees


class DraftFigures(TensorBoardFigures):
    """Draft trees, acceptance per level and time per phase on the first held-out prompt, in TensorBoard.

    Args:
        tree: Candidates per level.
        max_new_tokens: Tokens that are decoded, greedily.
        passes: Draft trees that are shown.
    """

    def __init__(self, tree: tuple[int, ...] = (3, 2), max_new_tokens: int = 16, passes: int = 4) -> None:
        self.tree = tree
        self.max_new_tokens = max_new_tokens
        self.passes = passes

    def figures(self, module: DrafterModule) -> Mapping[str, Figure]:
        """Decode with the drafter as it is; a sharded target, whose passes all processes must run, is left alone."""
        if module.shard_target and module.trainer.world_size > 1:
            return {}
        prompt = module.trainer.datamodule.held_out[:1]  # type: ignore[attr-defined]
        decoder = SpeculativeDecoder(module.target, for_inference(module.drafter), tree=self.tree)
        seen, measured = Passes(self.passes), Measurement()
        measured.add(decoder.generate(prompt, max_new_tokens=self.max_new_tokens, on_pass=seen))
        found = {"drafter": measured}
        drawn = {"acceptance": plot_acceptance(found), "time": plot_time(found)}
        return drawn | ({"draft trees": plot_trees(seen.kept, module.target_spec.tokenizer())} if seen.kept else {})
