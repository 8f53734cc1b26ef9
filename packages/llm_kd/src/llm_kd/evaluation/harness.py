"""Tasks of EleutherAI's `lm-eval` on a saved model; this needs `pip install lm-eval`."""

from collections.abc import Sequence
from types import ModuleType

from kd_common.errors import UserError
from kd_common.hub.language_models import EMBEDDED, embedded_folder


def load_harness() -> ModuleType:
    """Return the installed `lm_eval`.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":  # the library is installed, but one of its dependencies is not
            raise
        raise UserError("--harness needs the evaluation harness: `pip install lm-eval`") from error
    return lm_eval


def run_harness(
    model: str, tasks: Sequence[str], *, dtype: str, device: str, batch_size: int
) -> dict[str, dict[str, float]]:
    """Evaluate a saved model on tasks of the harness, with the harness's own settings for each task.

    Args:
        model: Folder or Hub name; see `kd_common.hub.language_models.load_causal_lm`.
        tasks: Names of tasks or groups that the installed harness knows.
        dtype: Precision of the weights.
        device: Where to run.
        batch_size: Requests at once.

    Returns:
        Numbers of every task under the harness's names, such as `acc,none` and `acc_stderr,none`.

    Raises:
        UserError: If the harness is not installed.
    """
    pretrained = str(embedded_folder()) if model == EMBEDDED else model
    found = load_harness().simple_evaluate(
        model="hf",
        model_args={"pretrained": pretrained, "dtype": dtype},
        tasks=list(tasks),
        device=device,
        batch_size=batch_size,
    )
    return {
        task: {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
