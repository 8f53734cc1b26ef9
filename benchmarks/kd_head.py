"""Memory and time of the distillation head against the dense loss: ``uv run python benchmarks/kd_head.py``.

Both compute the same loss and the gradients of hidden states and student head. Extra memory is the peak of live tensors
above the inputs, less the gradients both must return. The GEMM floor is the time of the matrix products that no exact
implementation avoids: two projections and the two products of the student's backward, timed alone on blocks of rows.
Medians over interleaved rounds. Small by default; the issue's sizes are --vocab 49152 151936 --tokens 1024 8192.
"""

import argparse
import itertools
import json
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_kd.head import HeadOutput, HiddenSignal, KDHead, LMHead
from llm_kd.objectives import OBJECTIVES
from llm_kd.selectors import SELECTORS

FLOOR_ROWS = 512


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--hidden", type=int, default=64, help="student")
    parser.add_argument("--teacher-hidden", type=int, default=96)
    parser.add_argument("--objectives", nargs="+", default=["fkl", "rkl", "jsd"], choices=OBJECTIVES.names())
    parser.add_argument("--selectors", nargs="+", default=["none", "topk", "adakd"], choices=SELECTORS.names())
    parser.add_argument("--chunk-size", type=int, help="rows per chunk; by default what the head chooses")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-dense", action="store_true", help="where the dense loss does not fit")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors alive at once among those that operations return, workspaces inside kernels left out.

    Args:
        ignore: Tensors that were there before.
    """

    def __init__(self, ignore: list[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in ignore}
        self.live = self.peak = 0

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out


def clock(device: torch.device) -> float:
    """Time after all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(call: Callable[[], object], inputs: list[Tensor], device: torch.device) -> int:
    """Peak of live bytes above the inputs during a call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes(inputs) as record:
        call()
    return record.peak


def floor_ms(inputs: list[Tensor], rounds: int, device: torch.device) -> float:
    """Time of the four unavoidable matrix products over all tokens."""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach() for tensor in inputs)
    rows = min(FLOOR_ROWS, len(hidden))
    gradient = torch.randn(rows, len(weight), dtype=weight.dtype, device=device)
    times = []
    for round_ in range(rounds + 1):
        start = clock(device)
        hidden[:rows] @ weight.T
        teacher_hidden[:rows] @ teacher_weight.T
        gradient @ weight
        gradient.T @ hidden[:rows]
        if round_:  # the first warms up
            times.append(clock(device) - start)
    return 1e3 * statistics.median(times) * len(hidden) / rows


def dense_loss(head: KDHead, student: LMHead, teacher: LMHead, hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """The same loss from all logits at once, differentiated by autograd."""
    z, z_teacher = (hidden @ student.weight.T).float(), (teacher_hidden @ teacher.weight.T).float()
    with torch.no_grad():
        chosen = head.selector.select(head.selector.score(z, z_teacher), head.selector.draw(len(z), z.device))
    tau = torch.as_tensor(chosen.temperature, device=z.device).expand(len(z))
    return (chosen.weights * tau**2 * head.objective(z / tau[:, None], z_teacher / tau[:, None])).sum() / len(z)


@dataclass
class Case:
    """One shape: inputs of both heads, in the order hidden, weight, teacher hidden, teacher weight."""

    inputs: list[Tensor]

    @property
    def heads(self) -> tuple[LMHead, LMHead]:
        """Output layers of student and teacher."""
        return LMHead(self.inputs[1]), LMHead(self.inputs[3])

    def run(self, head: KDHead) -> HeadOutput:
        """Loss by the head."""
        hidden, weight, teacher_hidden, teacher_weight = self.inputs
        return head(hidden, LMHead(weight), HiddenSignal(teacher_hidden, LMHead(teacher_weight)))

    def ours(self, head: KDHead) -> None:
        """Loss and gradients by the head."""
        torch.autograd.grad(self.run(head).loss, self.inputs[:2])

    def dense(self, head: KDHead) -> None:
        """Loss and gradients by autograd over all logits."""
        hidden, weight, teacher_hidden, _ = self.inputs
        torch.autograd.grad(dense_loss(head, *self.heads, hidden, teacher_hidden), [hidden, weight])

    def measure(self, head: KDHead, args: argparse.Namespace) -> dict[str, Any]:
        """Acceptance rate, extra bytes and median milliseconds of the head and of the dense loss."""
        device = torch.device(args.device)
        variants = [self.ours] if args.skip_dense else [self.ours, self.dense]
        calls = {call.__name__: partial(call, head) for call in variants}
        returned = sum(4 * tensor.numel() for tensor in self.inputs[:2])
        peaks = {name: peak_bytes(call, self.inputs, device) - returned for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                start = clock(device)
                call()
                times[name].append(1e3 * (clock(device) - start))
        with torch.no_grad():
            tar = float(self.run(head).accepted.mean())
        return {"tar": tar, "extra_bytes": peaks, "ms": {name: statistics.median(ms) for name, ms in times.items()}}


def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = f"hidden {args.hidden} (student), {args.teacher_hidden} (teacher), {args.dtype}"
    print(f"{sizes}, {device}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds")
    print(
        f"{'V':>7}{'N':>6} {'objective':<11}{'selector':<15}{'TAR':>6}{'extra MB':>10}{'dense':>9}"
        f"{'ms':>10}{'dense':>10}{'floor':>10}{'x floor':>9}"
    )
    rows = []
    for vocab, tokens in itertools.product(args.vocab, args.tokens):
        shapes = [(n, h) for h in (args.hidden, args.teacher_hidden) for n in (tokens, vocab)]
        inputs = [torch.randn(shape, dtype=dtype, device=device) / shape[1] ** 0.25 for shape in shapes]
        case = Case([inputs[0].requires_grad_(), inputs[1].requires_grad_(), *inputs[2:]])
        floor = floor_ms(inputs, args.rounds, device)
        for objective, selector in itertools.product(args.objectives, args.selectors):
            head = KDHead(OBJECTIVES.get(objective)(), SELECTORS.get(selector)(), chunk_size=args.chunk_size)
            row = case.measure(head, args)
            rows.append({"vocab": vocab, "tokens": tokens, "objective": objective, "selector": selector} | row)
            rows[-1]["floor_ms"] = floor
            megabytes = {name: size / 2**20 for name, size in row["extra_bytes"].items()}
            nan = float("nan")  # printed where the dense loss is skipped
            print(
                f"{vocab:>7}{tokens:>6} {objective:<11}{selector:<15}{row['tar']:>6.2f}{megabytes['ours']:>10.1f}"
                f"{megabytes.get('dense', nan):>9.1f}{row['ms']['ours']:>10.1f}{row['ms'].get('dense', nan):>10.1f}"
                f"{floor:>10.1f}{row['ms']['ours'] / floor:>9.2f}"
            )
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args), "rows": rows}, default=str, indent=1))


if __name__ == "__main__":
    main()
