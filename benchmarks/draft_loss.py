"""The loss of one level of a drafter: ``uv run python benchmarks/draft_loss.py``, a minute on two cores.

Forward and backward of `spec_decode.training.losses.head_loss` through a head of C draft tokens that is trained
(EAGLE-3's) or frozen (FastEagle's), in bfloat16 under autocast as in training, beside the same loss left to autograd:
whole, which keeps all logits, and with every chunk recomputed in the backward pass, which keeps none. In turns;
medians. The floor is the matrix products alone: logits, the states' gradient and, where the head is trained, its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kd_common.run.errors import run_command
from spec_decode.training.losses import head_loss


def products(states: Tensor, weight: Tensor, target: Tensor) -> None:
    """The floor; no loss."""
    slope = torch.zeros_like(target)
    F.linear(states.bfloat16(), weight.bfloat16())
    slope @ weight.bfloat16()
    if weight.requires_grad:
        slope.T @ states.bfloat16()


def by_autograd(states: Tensor, weight: Tensor, target: Tensor, chunk: int | None) -> None:
    """The loss in plain PyTorch."""

    def part(x: Tensor, theirs: Tensor) -> Tensor:
        return -(theirs.float().softmax(-1) * F.linear(x, weight).float().log_softmax(-1)).sum()

    if chunk is None:
        part(states, target).backward()
        return
    parts = [
        checkpoint(part, x, theirs, use_reentrant=False)
        for x, theirs in zip(states.split(chunk), target.split(chunk), strict=True)
    ]
    torch.stack(parts).sum().backward()


def ours(states: Tensor, weight: Tensor, target: Tensor, chunk: int) -> None:
    """The loss of `spec_decode`, hits included."""
    tokens = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    head_loss(lambda x: F.linear(x, weight), states, target, tokens, chunk, (weight,))[0].backward()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1760, help="supervised positions: 16 answers of 110 tokens")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    target = (3 * torch.randn(args.rows, args.vocabulary)).bfloat16()
    table = Table(title=f"{args.rows} x {args.hidden} -> {args.vocabulary}, {torch.get_num_threads()} threads")
    for column in ("head", "loss", "ms", "x products alone"):
        table.add_column(column, justify="left" if column in ("head", "loss") else "right")
    for kind in ("frozen", "trained"):
        states = torch.randn(args.rows, args.hidden, requires_grad=True)
        weight = (3 / args.hidden**0.5 * torch.randn(args.vocabulary, args.hidden)).requires_grad_(kind == "trained")
        variants: dict[str, Callable[[], None]] = {
            "products alone": lambda s=states, w=weight: products(s, w, target),  # type: ignore[misc]
            "autograd, whole": lambda s=states, w=weight: by_autograd(s, w, target, None),  # type: ignore[misc]
            "autograd, chunks recomputed": lambda s=states, w=weight: by_autograd(s, w, target, args.chunk),  # type: ignore[misc]
            "head_loss": lambda s=states, w=weight: ours(s, w, target, args.chunk),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(args.rounds + 1):
            for name, run in variants.items():
                states.grad = weight.grad = None
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16):
                    run()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        for name, median in medians.items():
            table.add_row(kind, name, f"{1e3 * median:.0f}", f"{median / medians['products alone']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
