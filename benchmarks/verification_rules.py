"""How often one level of a draft is accepted by rule: ``uv run python benchmarks/verification_rules.py``, seconds.

The two rules of `spec_decode.decoding.verify` are applied to given distributions at temperature 1: sample-and-match
with the drafter's k likeliest tokens, sample-and-match with the k best under the noise of the target's own draw, and
recursive rejection of k draws without replacement. First comes the distribution of the tests, then random
distributions over 200 tokens whose drafter is the target plus Gaussian noise of several sizes. The numbers are means
over rows, a fifth of them for the random distributions; standard errors are below 0.004.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kd_common.run.errors import run_command
from spec_decode.decoding.proposals import matching_tree, sampled_tree
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.verify import verify_matching, verify_sampled

P, Q = (0.40, 0.25, 0.20, 0.10, 0.05), (0.55, 0.10, 0.05, 0.25, 0.05)
SAMPLING = Sampling(1.0)


def accepted(target: Tensor, draft: Tensor, candidates: int, seed: int) -> dict[str, float]:
    """Share of rows whose draw is in the draft, by rule.

    Args:
        target: Logits of shape (B, V).
        draft: The drafter's logits, shape (B, V).
        candidates: k.
        seed: Seed of the draws.
    """
    rows, vocabulary = target.shape
    root, seeds = torch.zeros(rows, dtype=torch.int64), row_seeds(seed, rows)
    places = {"seeds": seeds, "root_positions": root}
    logits = target.unsqueeze(1).expand(-1, candidates + 1, -1)
    found = {}
    for name, temperature in (("matching, top-k", 0.0), ("matching, shared noise", 1.0)):
        tree = matching_tree(root, draft.unsqueeze(1), (candidates,), temperature=temperature, **places)
        found[name] = float(verify_matching(tree, logits, SAMPLING, **places).accepted.double().mean())
    drawn = sampled_tree(root, draft.unsqueeze(1), (candidates,), sampling=SAMPLING, vocab_size=vocabulary, **places)
    found["rejection"] = float(verify_sampled(drawn, logits, SAMPLING, **places).accepted.double().mean())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    generator = torch.Generator().manual_seed(0)
    table = Table()
    distributions = {
        "p, q of the page": (torch.tensor(P).log().expand(rows, -1), torch.tensor(Q).log().expand(rows, -1))
    }
    for size in (0.5, 1.0, 1.5, 2.0):
        target = 2 * torch.randn(rows // 5, 200, generator=generator)
        distributions[f"200 tokens, noise {size:g}"] = (
            target,
            target + size * torch.randn(target.shape, generator=generator),
        )
    for number, (name, (target, draft)) in enumerate(distributions.items()):
        for candidates in (1, 2, 3) if name.startswith("p,") else (1, 4, 8):
            found = accepted(target, draft, candidates, seed=number)
            if not table.columns:
                for column in ("distributions", "candidates", *found):
                    table.add_column(column)
            table.add_row(name, str(candidates), *(f"{share:.3f}" for share in found.values()))
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
