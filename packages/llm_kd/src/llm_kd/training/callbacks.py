"""Show where the teacher accepts the student's tokens."""

from collections.abc import Mapping
from typing import cast

from matplotlib.figure import Figure

from kd_common.run.tensorboard_figures import TensorBoardFigures
from llm_kd.models import Backbone
from llm_kd.teacher import OnlineTeacher
from llm_kd.training.distillation import DistillationModule
from llm_kd.viz.figures import plot_entropy, plot_positions, plot_tokens
from llm_kd.viz.token_table import token_table


class TokenFigures(TensorBoardFigures):
    """Accepted and rejected tokens, KL and acceptance by position and by the teacher's entropy, in TensorBoard.

    On the first held-out answers; nothing is drawn where the teacher is a cache, or the models are sharded.

    Args:
        examples: Answers that the models are run on; the first is shown token by token.
        k: Most likely tokens of the teacher that count as accepted.
    """

    def __init__(self, examples: int = 4, k: int = 5) -> None:
        self.examples = examples
        self.k = k

    def figures(self, module: DistillationModule) -> Mapping[str, Figure]:
        """Run student and teacher on the answers."""
        teacher = module.teacher
        if module.sharded or not isinstance(teacher, OnlineTeacher):
            return {}
        data = module.trainer.datamodule.splits["val"]  # type: ignore[attr-defined]
        examples = [example for example in data.examples if example.num_supervised][: self.examples]
        student = module.student_with_head.student
        table = token_table(student, cast(Backbone, teacher.backbone), examples, vocab_size=module.vocab_size, k=self.k)
        return {
            "tokens": plot_tokens(table, module.tokenizer, 0),
            "position": plot_positions({"student": table}),
            "entropy": plot_entropy({"student": table}),
        }
