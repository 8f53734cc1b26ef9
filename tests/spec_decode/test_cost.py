"""The cost model against closed forms, simulation of the tree's outcomes and brute force over all trees."""

from fractions import Fraction
from itertools import product

import pytest
import torch

from spec_decode.decoding.cost import TreeChoice, best_tree, expected_tokens, speedup
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.tree import backbone_tree
from spec_decode.decoding.verify import verify_matching


def outcomes(acceptance, branching):
    """Every outcome of one pass as (probability, tokens emitted)."""
    alive = Fraction(1)
    for level, width in enumerate(branching):
        row = acceptance[level][:width]
        yield alive * (1 - sum(row)), level + 1
        yield alive * sum(row[1:]), level + 2
        alive *= row[0]
    yield alive, len(branching) + 1


def random_table(generator, levels, ranks):
    """Rows that sum to at most 1, the first rank likely the largest but the ranks not sorted."""
    parts = torch.randint(0, 20, (levels, ranks), generator=generator)
    parts[:, 0] += torch.randint(0, 40, (levels,), generator=generator)
    return [[Fraction(int(x), 100) for x in row] for row in parts]


def test_expected_tokens_of_a_chain_with_constant_acceptance():
    for depth in range(6):
        expected = (1 - 0.7 ** (depth + 1)) / 0.3
        assert expected_tokens([[0.7]] * 6, (1,) * depth) == pytest.approx(expected)


def test_expected_tokens_equal_enumeration_of_outcomes():
    generator = torch.Generator().manual_seed(0)
    for branching in ((), (3,), (1, 1), (2, 3, 1), (1, 3, 3)):
        table = random_table(generator, 3, 3)
        assert sum(weight for weight, _ in outcomes(table, branching)) == 1
        expected = sum(weight * tokens for weight, tokens in outcomes(table, branching))
        assert expected_tokens(table, branching) == pytest.approx(float(expected), abs=1e-14)


def test_expected_tokens_equal_the_measured_mean_of_the_verifier():
    """Constant distributions: the acceptance of a rank is then its token's probability."""
    count, branching, distribution = 20_000, (2, 1, 2), torch.tensor([0.5, 0.3, 0.15, 0.05])
    zeros = torch.zeros(count, dtype=torch.int64)
    tree = backbone_tree(zeros, torch.tensor([[[0, 1], [1, 0], [0, 2]]]).expand(count, -1, -1), branching)
    logits = distribution.log().expand(count, tree.tokens.shape[1], -1)
    verified = verify_matching(tree, logits, Sampling(), seeds=row_seeds(0, count), root_positions=zeros)
    tau = expected_tokens([[0.5, 0.3], [0.3, 0.5], [0.5, 0.15]], branching)
    assert float(verified.accepted.double().mean()) + 1 == pytest.approx(tau, abs=0.03)
    rates = verified.matched.sum(0) / verified.tested.sum(0)
    assert rates.tolist() == pytest.approx([0.8, 0.3, 0.65], abs=0.02)


def test_speedup_is_one_at_break_even():
    assert speedup((2 + 6) / 4, plain_time=4, draft_time=2, verify_time=6) == 1
    assert speedup(3, plain_time=4, draft_time=0, verify_time=4) == 3


def brute_force(table, verify_times, draft_times, branches):
    """Best speed-up over every tree, at every measured size it fits in with its branches."""
    best = 1.0
    for depth in range(1, len(table) + 1):
        for branching in product(range(1, len(table[0]) + 1), repeat=depth):
            tokens = float(sum(weight * n for weight, n in outcomes(table, branching)))
            sizes = [size for size in verify_times if size > sum(branching) + branches * depth]
            for size in sizes:
                best = max(best, tokens * verify_times[1] / (draft_times[depth - 1] + verify_times[size]))
    return best


@pytest.mark.parametrize("branches", [0, 1, 2])
def test_best_tree_equals_brute_force(branches):
    generator = torch.Generator().manual_seed(1)
    chosen = set()
    for _ in range(150):
        table = random_table(generator, 4, 3)
        times = (1 + torch.rand(5, generator=generator)).tolist()  # not monotone, as measured tables are
        verify_times = dict(zip((1, 2, 4, 7, 10), times, strict=True))
        draft_times = (torch.rand(4, generator=generator) / 10).cumsum(0).tolist()
        best = best_tree([[float(a) for a in row] for row in table], verify_times, draft_times, branches=branches)
        assert best.speedup == pytest.approx(brute_force(table, verify_times, draft_times, branches), rel=1e-12)
        assert best.tokens_per_pass == pytest.approx(expected_tokens(table, best.branching))
        chosen.add(best.branching)
    assert () in chosen
    assert len(chosen) > 5


def test_plain_decoding_wins_ties_and_useless_drafts():
    assert best_tree([[0.0]], {1: 1.0, 8: 1.0}, [0.0]) == TreeChoice((), 1.0, 1.0)
    assert best_tree([[0.5]], {1: 1.0, 8: 1.5}, [0.0]).branching == ()
    assert best_tree([], {1: 1.0}, []).branching == ()
    assert best_tree([[1.0]], {1: 1.0}, [0.0]).branching == ()  # no measured size holds a draft


def test_equal_speed_takes_the_smaller_tree():
    assert best_tree([[0.5, 0.0], [0.0, 0.0]], {1: 1.0, 8: 1.0}, [0.1, 0.1]).branching == (1,)


def test_decreasing_acceptance_spends_nodes_where_they_pay():
    choice = best_tree([[0.5, 0.3, 0.1], [0.5, 0.3, 0.1]], {1: 1.0, 4: 1.0}, [0.0, 0.0])
    assert choice.branching == (2, 1)  # 0.5 + 0.3 and 0.5 * 0.5 against 0.9, or 0.5 and 0.5 * 0.8
    assert choice.tokens_per_pass == pytest.approx(2.05)


@pytest.mark.parametrize(
    ("acceptance", "verify_times", "draft_times", "message"),
    [
        ([[0.5, 0.6]], {1: 1.0}, [0.0], "acceptance of level 0"),
        ([[0.5], []], {1: 1.0}, [0.0, 0.0], "acceptance of level 1"),
        ([[-0.1]], {1: 1.0}, [0.0], "acceptance of level 0"),
        ([[float("nan")]], {1: 1.0}, [0.0], "acceptance of level 0"),
        ([[0.5]], {8: 1.0}, [0.0], "time of one node"),
        ([[0.5]], {1: 0.0}, [0.0], "positive and finite"),
        ([[0.5]], {1: float("nan")}, [0.0], "positive and finite"),
        ([[0.5]], {1: 1.0}, [], "draft_times"),
        ([[0.5]], {1: 1.0}, [-1.0], "draft_times"),
    ],
)
def test_malformed_tables_are_refused(acceptance, verify_times, draft_times, message):
    with pytest.raises(ValueError, match=message):
        best_tree(acceptance, verify_times, draft_times)


def test_what_is_never_accepted_is_never_drafted_however_the_times_waver():
    assert best_tree([[0.0], [0.0]], {1: 2.0, 8: 1.0}, [0.1, 0.2]).branching == ()
