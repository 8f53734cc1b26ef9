"""Memory and time of the distillation head against what one could use instead: ``uv run python benchmarks/kd_head.py``.

All compute the same loss and the gradients of hidden states and student head, in turns, in one process:

- ``head``: KDHead; ``stored``: KDHead with a teacher stored as its --stored first tokens (another, smaller loss);
- ``dense``: the loss from all logits by autograd;
- ``liger`` (and ``liger compiled`` with --compile): chunked JSD of liger-kernel; ``trl``: the loss of TRL's GKDTrainer
  on all logits; ``trl chunked``: that of its DistillationTrainer. They know no selection, so they run with selector
  none. ``uv sync --group peers`` installs them.

Extra memory is the peak of live tensors above the inputs, less the two gradients all must return. The GEMM floor is the
time of the matrix products that no exact implementation avoids: two projections and the two products of the student's
backward, timed alone on blocks of rows. ``select`` is the time of the selector's scores alone. Medians over the rounds.
Small by default; the published sizes are --vocab 49152 151936 --tokens 1024 2048 4096 8192 --hidden 576
--teacher-hidden 576. With --out every finished case is appended to a file, and a second start skips what is in it.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_common.registry import subclasses
from kd_common.run.errors import run_command
from kd_common.run.memory import peak_bytes
from llm_kd.head import HeadOutput, KDHead, LMHead, TeacherHiddenStates, TeacherOutput, truncate
from llm_kd.objectives import Objective
from llm_kd.selection import Selector

OBJECTIVES = subclasses(Objective)
SELECTORS = subclasses(Selector)

FLOOR_ROWS = 512
BETA = {"ForwardKL": 0.0, "JensenShannon": 0.5, "ReverseKL": 1.0}
"""The peers' name of an objective."""

Loss = Callable[[], Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--hidden", type=int, default=64, help="student")
    parser.add_argument("--teacher-hidden", type=int, default=96)
    parser.add_argument(
        "--objectives", nargs="+", default=["ForwardKL", "ReverseKL", "JensenShannon"], choices=OBJECTIVES
    )
    parser.add_argument("--selectors", nargs="+", default=["Uniform", "TopK", "AdaKD"], choices=SELECTORS)
    parser.add_argument("--peers", nargs="*", default=["liger", "trl"], choices=["liger", "trl"])
    parser.add_argument("--compile", action="store_true", help="also run Liger's loss with torch.compile, its default")
    parser.add_argument("--stored", type=int, default=64, help="K of the stored teacher")
    parser.add_argument("--chunk-size", type=int, help="rows per chunk of KDHead; by default what it chooses")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-dense", action="store_true", help="where losses on all logits do not fit")
    parser.add_argument("--out", type=Path, help="file of finished cases, one JSON object a line")
    return parser.parse_args()


def clock(device: torch.device) -> float:
    """Time after all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def dense_loss(head: KDHead, z: Tensor, z_teacher: Tensor) -> Tensor:
    """The head's loss from all logits at once, for autograd."""
    with torch.no_grad():
        chosen = head.selector.select(head.selector.score(z, z_teacher), head.selector.draw(len(z), z.device))
    tau = torch.as_tensor(chosen.temperature, device=z.device).expand(len(z))
    return (chosen.weights * tau**2 * head.objective(z / tau[:, None], z_teacher / tau[:, None])).sum() / len(z)


@dataclass
class Case:
    """One shape: inputs of both heads, in the order hidden, weight, teacher hidden, teacher weight."""

    inputs: list[Tensor]
    device: torch.device

    @classmethod
    def random(cls, vocab: int, tokens: int, args: argparse.Namespace) -> "Case":
        """Inputs that depend on the shape alone."""
        torch.manual_seed(0)
        device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        shapes = [(n, h) for h in (args.hidden, args.teacher_hidden) for n in (tokens, vocab)]
        inputs = [torch.randn(shape, dtype=dtype, device=device) / shape[1] ** 0.25 for shape in shapes]
        return cls([inputs[0].requires_grad_(), inputs[1].requires_grad_(), *inputs[2:]], device)

    @property
    def online(self) -> TeacherHiddenStates:
        """The teacher's hidden states and head."""
        return TeacherHiddenStates(self.inputs[2], LMHead(self.inputs[3]))

    def run(self, head: KDHead, teacher: TeacherOutput) -> HeadOutput:
        """KDHead on this shape."""
        return head(self.inputs[0], LMHead(self.inputs[1]), teacher)

    def logits(self) -> tuple[Tensor, Tensor]:
        """All logits of student and teacher in float32."""
        hidden, weight, teacher_hidden, teacher_weight = self.inputs
        with torch.no_grad():
            z_teacher = (teacher_hidden @ teacher_weight.T).float()
        return (hidden @ weight.T).float(), z_teacher

    def floor_ms(self, rounds: int) -> float:
        """Time of the four unavoidable matrix products over all tokens."""
        hidden, weight, teacher_hidden, teacher_weight = (tensor.detach() for tensor in self.inputs)
        rows = min(FLOOR_ROWS, len(hidden))
        gradient = torch.randn(rows, len(weight), dtype=weight.dtype, device=self.device)
        times = []
        for round_ in range(rounds + 1):
            start = clock(self.device)
            hidden[:rows] @ weight.T
            teacher_hidden[:rows] @ teacher_weight.T
            gradient @ weight
            gradient.T @ hidden[:rows]
            if round_:  # the first warms up
                times.append(clock(self.device) - start)
        return 1e3 * statistics.median(times) * len(hidden) / rows

    @torch.no_grad()
    def select_ms(self, head: KDHead, rounds: int) -> float:
        """Time of the selector's scores of all tokens, given their logits."""
        rows = min(FLOOR_ROWS, len(self.inputs[0]))
        part = Case([self.inputs[0][:rows], self.inputs[1], self.inputs[2][:rows], self.inputs[3]], self.device)
        z, z_teacher = part.logits()
        times = []
        for round_ in range(rounds + 1):
            start = clock(self.device)
            head._score(z, z_teacher)
            if round_:
                times.append(clock(self.device) - start)
        return 1e3 * statistics.median(times) * len(self.inputs[0]) / rows


def liger_loss(case: Case, beta: float, compiled: bool) -> Loss:
    """Liger's chunked JSD with its default chunk of 1,024 rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    labels = torch.zeros(len(case.inputs[0]), dtype=torch.int64, device=case.device)
    return lambda: loss(*case.inputs, labels)


def trl_loss(case: Case, beta: float) -> Loss:
    """The loss of TRL's GKDTrainer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    return lambda: GKDTrainer.generalized_jsd_loss(*case.logits(), beta=beta)


def trl_chunked_loss(case: Case, beta: float) -> Loss:
    """The loss of TRL's DistillationTrainer; it is private there, and has no other entry."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, weight, teacher_hidden, teacher_weight = case.inputs
    mask = torch.ones(1, len(hidden), device=case.device)
    return lambda: _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, mask, beta)[0]


def losses(case: Case, head: KDHead, objective: str, selector: str, args: argparse.Namespace) -> dict[str, Loss]:
    """What is to be measured, by name."""
    calls: dict[str, Loss] = {"head": lambda: case.run(head, case.online).loss}
    vocab = len(case.inputs[1])
    size = min(args.stored, vocab)
    if head.objective.data_processing and not head.selector.whole_teacher:
        stored = truncate(case.online, size, vocab)
        calls["stored"] = lambda: case.run(head, stored).loss
    if not args.skip_dense:
        calls["dense"] = lambda: dense_loss(head, *case.logits())
    if selector != "Uniform" or objective not in BETA:
        return calls
    candidates: dict[str, Callable[[Case, float], Loss]] = {}
    if "liger" in args.peers:
        candidates["liger"] = partial(liger_loss, compiled=False)
        if args.compile:
            candidates["liger compiled"] = partial(liger_loss, compiled=True)
    if "trl" in args.peers:
        candidates |= {"trl chunked": trl_chunked_loss} | ({} if args.skip_dense else {"trl": trl_loss})
    return calls | {name: make(case, BETA[objective]) for name, make in candidates.items()}


def measure(case: Case, head: KDHead, calls: dict[str, Loss], rounds: int) -> dict[str, dict[str, float]]:
    """Loss (mean over the tokens), extra megabytes and median milliseconds of each."""

    def step(call: Loss) -> float:
        loss = call()
        torch.autograd.grad(loss, case.inputs[:2])
        return loss.item()

    returned = sum(tensor.numel() * tensor.element_size() for tensor in case.inputs[:2])
    results: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        # What torch.compile allocates inside its kernels cannot be seen on a CPU.
        visible = case.device.type == "cuda" or "compiled" not in name
        value = step(call)  # also warms up
        peak = peak_bytes(partial(step, call), case.inputs, case.device) - returned if visible else float("nan")
        results[name] = {"loss": value, "megabytes": peak / 2**20}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock(case.device)
            step(call)
            times[name].append(1e3 * (clock(case.device) - start))
    for name, result in results.items():
        result["ms"] = statistics.median(times[name])
        if name != "stored" and abs(result["loss"] / results["head"]["loss"] - 1) > 0.02:
            raise RuntimeError(f"{name} gives {result['loss']}, KDHead {results['head']['loss']}: not the same loss")
    return results


def report(row: dict[str, Any]) -> None:
    """Print a case, one line for each implementation."""
    share = row["select_ms"] / row["results"]["head"]["ms"]
    for name, result in row["results"].items():
        selection = f"{row['select_ms']:>11.1f}{100 * share:>8.2f}%" if name == "head" else ""
        print(
            f"{row['vocab']:>7}{row['tokens']:>6} {row['objective']:<11}{row['selector']:<15}{name:<15}"
            f"{result['loss']:>9.4f}{result['megabytes']:>10.1f}{result['ms']:>10.1f}"
            f"{result['ms'] / row['floor_ms']:>9.2f}{selection}"
        )


def available(peers: list[str]) -> list[str]:
    """Those of the peers that can be imported; says which cannot."""
    found = []
    for peer in peers:
        try:
            __import__({"liger": "liger_kernel.chunked_loss", "trl": "trl"}[peer])
            found.append(peer)
        except ImportError as error:
            print(f"{peer} is left out: {error} (`uv sync --group peers` installs it)")
    return found


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.peers = available(args.peers)
    ignored = ("vocab", "tokens", "objectives", "selectors", "out")
    settings = {name: value for name, value in vars(args).items() if name not in ignored}
    settings |= {"torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(
        f"{'V':>7}{'N':>6} {'objective':<11}{'selector':<15}{'':<15}"
        f"{'loss':>9}{'extra MB':>10}{'ms':>10}{'x floor':>9}{'select ms':>11}{'of head':>9}"
    )
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    done = [row for row in map(json.loads, lines) if row["settings"] == json.loads(json.dumps(settings))]
    for vocab, tokens in itertools.product(args.vocab, args.tokens):
        for objective, selector in itertools.product(args.objectives, args.selectors):
            named = {"vocab": vocab, "tokens": tokens, "objective": objective, "selector": selector}
            row = next((row for row in done if named.items() <= row.items()), None)
            if row is None:
                case = Case.random(vocab, tokens, args)
                head = KDHead(OBJECTIVES[objective](), SELECTORS[selector](), chunk_size=args.chunk_size)
                calls = losses(case, head, objective, selector, args)
                row = named | {
                    "settings": settings,
                    "floor_ms": case.floor_ms(args.rounds),
                    "select_ms": case.select_ms(head, args.rounds),
                    "results": measure(case, head, calls, args.rounds),
                }
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            report(row)


if __name__ == "__main__":
    run_command(main)
