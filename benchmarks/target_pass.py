"""What a target pass costs by its number of nodes: ``uv run python benchmarks/target_pass.py``, half a minute.

T(n) is a pass over n new nodes behind 256 cached ones, head included, for the embedded SmolLM2-135M-Instruct: with
plain bfloat16 weights and with the packed ones that decoding uses, in turns, and how far their logits are apart. The
floor is the time that reading all weights once takes at the bandwidth of a plain copy. ``--compile`` adds the step
compiled by Inductor with frozen weights, which takes minutes.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from kd_common.run.errors import run_command
from spec_decode.decoding.autotune import measure_passes
from spec_decode.decoding.tree import DraftTree, backbone_parents
from spec_decode.models import CausalLM
from spec_decode.models.target import TargetSpec

SIZES = (1, 8, 16, 24, 32)


def logits(target: CausalLM, size: int) -> torch.Tensor:
    """Logits of a chain of `size` tokens behind 32 others."""
    tokens = torch.randint(target.vocab_size, (1, 32 + size), generator=torch.Generator().manual_seed(0))
    cache = target.new_cache(1, 32 + size)
    target.prefill(tokens[:, :32], torch.tensor([32]), cache)
    return target.tree_logits(DraftTree(tokens[:, 32:], backbone_parents((1,) * (size - 1)).expand(1, -1)), cache)[0]


def floor(target: CausalLM) -> float:
    """Seconds to read the layers and the head once, as fast as this machine copies."""
    used = sum(p.numel() * p.element_size() for p in (*target.layers.parameters(), target.lm_head.weight))
    source = torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
    destination, times = torch.empty_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        destination.copy_(source)
        times.append(time.perf_counter() - start)
    return used / (2 * source.numel() / min(times))  # a copy reads and writes every byte


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    plain, packed = (TargetSpec(dtype="bfloat16").load() for _ in range(2))
    least, expected = floor(plain), {size: logits(plain, size) for size in SIZES}
    packed.pack()
    targets = {"plain": plain, "packed": packed}
    if args.compile:
        targets["compiled"] = TargetSpec(dtype="bfloat16").load()
        targets["compiled"].compile_steps()
    rounds = [{name: measure_passes(t, SIZES) for name, t in targets.items()} for _ in range(args.rounds)]
    table = Table(
        title=f"ms per pass, {torch.get_num_threads()} threads; floor {1e3 * least:.1f} ms: all weights read once"
    )
    for column in ("nodes", *(f"{name}{ratio}" for name in targets for ratio in ("", ", x T(1)")), "plain / packed"):
        table.add_column(column, justify="right")
    for size in SIZES:
        found = {name: statistics.median(r[name][size] for r in rounds) for name in targets}
        first = {name: statistics.median(r[name][1] for r in rounds) for name in targets}
        cells = [cell for name in targets for cell in (f"{1e3 * found[name]:.1f}", f"{found[name] / first[name]:.2f}")]
        table.add_row(str(size), *cells, f"{found['plain'] / found['packed']:.2f}")
    Console().print(table)
    for name in [name for name in targets if name != "plain"]:
        gaps = {size: float((logits(targets[name], size) - expected[size]).abs().max()) for size in SIZES}
        print(f"largest difference of logits, {name}:", ", ".join(f"{gap:.3f} ({size})" for size, gap in gaps.items()))
    largest = max(float(value.abs().max()) for value in expected.values())
    print(f"largest logit {largest:.1f}")


if __name__ == "__main__":
    run_command(main)
