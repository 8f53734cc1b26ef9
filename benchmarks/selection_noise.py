"""Does selection help when the teacher is wrong? ``uv run python benchmarks/selection_noise.py``, half a minute.

A synthetic next-token problem whose truth is known: contexts are random vectors x, the truth is softmax(W x). The
teacher tells the truth, but in a share of the training contexts it gives the distribution of some other context: a
confident mistake. The student is linear like the truth (``--rank`` narrows it: a gap in capacity), starts at random
and minimises the forward KL to the teacher over all training contexts at once, weighted as `llm_kd` weights tokens:
beta + (1 - beta) * accepted.

Printed are the KL from the truth to the student and the agreement of their likeliest tokens on fresh contexts, and the
share of right and wrong training contexts that is accepted at the end; mean and standard deviation over seeds.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kd_common.functional import forward_kl
from kd_common.run.compare import mean_and_spread
from kd_common.run.errors import run_command
from llm_kd.selection.acceptance import speck_accept_probability, topk_accept

SELECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda student, teacher: student.new_ones(len(student)),
    "Top-5": lambda student, teacher: topk_accept(student, teacher, 5).to(student.dtype),
    "Spec-5, expected": lambda student, teacher: speck_accept_probability(student, teacher, 5),
    "Spec-1, expected": lambda student, teacher: speck_accept_probability(student, teacher, 1),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings: of the command line, or of the arguments given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help="shares of wrong contexts")
    parser.add_argument("--rank", type=int, default=24, help="width of the student's bottleneck, at most --dim")
    parser.add_argument("--dim", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=64)
    parser.add_argument("--contexts", type=int, default=512, help="to train on; four times as many to test")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--beta", type=float, default=0.01, help="weight of a rejected context")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args(arguments)


def train(select: Callable[[Tensor, Tensor], Tensor], noise: float, seed: int, args: argparse.Namespace) -> list[float]:
    """KL and agreement on fresh contexts, and accepted shares of right and wrong training contexts."""
    torch.manual_seed(seed)
    truth = 3 * torch.randn(args.vocab, args.dim) / args.dim**0.5
    x, fresh = torch.randn(args.contexts, args.dim), torch.randn(4 * args.contexts, args.dim)
    wrong = torch.rand(args.contexts) < noise
    other = torch.randn(args.contexts, args.dim)
    teacher = torch.where(wrong.unsqueeze(1), other, x) @ truth.T
    student = nn.Sequential(nn.Linear(args.dim, args.rank, bias=False), nn.Linear(args.rank, args.vocab, bias=False))
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate)
    for _ in range(args.steps):
        logits = student(x)
        weight = args.beta + (1 - args.beta) * select(logits.detach(), teacher)
        loss = (weight * forward_kl(logits, teacher)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        truth_logits, logits = fresh @ truth.T, student(fresh)
        accepted = select(student(x), teacher)
        return [
            float(forward_kl(logits, truth_logits).mean()),
            100 * float((logits.argmax(-1) == truth_logits.argmax(-1)).float().mean()),
            100 * float(accepted[~wrong].mean()),
            100 * float(accepted[wrong].mean()),  # NaN where none is wrong
        ]


def main() -> None:
    """Train every selector at every noise and print the table."""
    args = parse()
    table = Table(title=f"rank {args.rank} of {args.dim}, beta {args.beta:g}, seeds {args.seeds}")
    for column in ("wrong", "selection", "KL to truth", "agree %", "right kept %", "wrong kept %"):
        table.add_column(column, justify="left" if column == "selection" else "right")
    for noise in args.noise:
        for name, select in SELECTORS.items():
            columns = zip(*(train(select, noise, seed, args) for seed in args.seeds), strict=True)
            cells = [
                mean_and_spread([value for value in values if not math.isnan(value)], digits)
                for values, digits in zip(columns, (3, 1, 1, 1), strict=True)
            ]
            table.add_row(f"{noise:.0%}", name, *cells)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
