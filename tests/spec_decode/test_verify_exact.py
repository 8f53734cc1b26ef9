"""Verification is lossless: rational enumeration, token-for-token coupling with plain decoding, chi-square."""

from collections import Counter
from itertools import product

import pytest
import torch

from spec_decode.decoding.proposals import SampledTree, matching_tree, sampled_tree
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.tree import DraftTree, backbone_tree, merge_branches, pad_tree
from spec_decode.decoding.verify import count_kept, recursive_rejection, verify_matching, verify_sampled

GREEDY = Sampling(0.0)


def as_tensor(distribution):
    return torch.tensor([float(x) for x in distribution], dtype=torch.float64)


def p_value(observed, expected):
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


# --- exact distributions ---


@pytest.fixture
def package_rejection(exact):
    """`recursive_rejection` of the package as a rule: its acceptance and residual, weighted by exact draws."""

    def rule(p, q, k):
        for weight, draws in exact.without_replacement(q, k):
            acceptance, residual = recursive_rejection(
                as_tensor(p)[None], as_tensor(q)[None], torch.tensor([draws], dtype=torch.int64)
            )
            alive = float(weight)
            for x, accept in zip(draws, acceptance[0].tolist(), strict=True):
                yield alive * accept, draws, x, True
                alive *= 1 - accept
            for token, mass in enumerate(residual[0].tolist()):
                yield alive * mass, draws, token, False

    return rule


@pytest.mark.parametrize("k", [1, 2, 3])
def test_correct_rules_have_the_target_distribution_exactly(exact, k):
    proposals = (exact.best, exact.iid, exact.without_replacement)
    rules = [exact.match(p) for p in proposals]
    rules += [exact.reject(exact.without_replacement), exact.reject(exact.iid, shrink=False)]
    for rule in rules:
        assert exact.one_level(rule, exact.p, exact.q, k)[0] == exact.p


def test_acceptance_of_the_correct_rules(exact):
    accepted = {
        "top-k, matched": exact.match(exact.best),
        "without replacement, matched": exact.match(exact.without_replacement),
        "iid, matched": exact.match(exact.iid),
        "iid, rejection": exact.reject(exact.iid, shrink=False),
        "without replacement, rejection": exact.reject(exact.without_replacement),
    }
    rates = [round(float(exact.one_level(rule, exact.p, exact.q, 3)[1]), 3) for rule in accepted.values()]
    assert rates == [0.750, 0.690, 0.525, 0.783, 0.922]  # the project's independent enumeration


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_package_rejection_has_the_target_distribution(exact, package_rejection, k):
    cases = [(exact.p, exact.q), (exact.q, exact.p), (exact.p, exact.p), (exact.fractions(0, 0, 100, 0, 0), exact.q)]
    for p, q in cases:
        distribution, accepted = exact.one_level(package_rejection, p, q, k)
        assert exact.total_variation(distribution, p) < 1e-15
        reference = exact.one_level(exact.reject(exact.without_replacement), p, q, k)[1]
        assert accepted == pytest.approx(float(reference), abs=1e-14)
        assert accepted >= float(exact.one_level(exact.match(exact.without_replacement), p, q, k)[1]) - 1e-12


def test_package_rejection_over_two_levels(exact, package_rejection):
    p1, q1, q2 = exact.fractions(50, 30, 20), exact.fractions(20, 50, 30), exact.fractions(60, 30, 10)
    p2 = [exact.fractions(10, 20, 70), exact.fractions(40, 40, 20), exact.fractions(80, 15, 5)]
    expected = [p1[a] * p2[a][b] for a, b in product(range(3), repeat=2)]
    distribution = exact.two_levels(exact.reject(exact.without_replacement), p1, p2, q1, q2, 2)
    assert list(distribution.values()) == expected
    distribution = exact.two_levels(package_rejection, p1, p2, q1, q2, 2)
    assert exact.total_variation(distribution.values(), expected) < 1e-15


@pytest.mark.parametrize("parents", [[-1, 0], [-1, 0, 1], [-1, 0, 0, 1], [-1, 0, 1, 0], [-1, 0, 0, 2, -1]])
def test_package_matching_has_the_target_distribution_over_three_tokens(exact, parents):
    """Every assignment of draws to nodes goes through verify_matching; weights are products of rationals."""
    distributions = [exact.fractions(50, 30, 20), exact.fractions(10, 20, 70), exact.fractions(40, 40, 20)]
    start, size, vocab_size = 1, len(parents), 3
    tokens = [start, 0, 2, 2, -1][:size]  # a node's token is its distribution's context
    scripts = list(product(range(vocab_size), repeat=size))
    logits = torch.nn.functional.one_hot(torch.tensor(scripts), vocab_size).float()
    tree = DraftTree(torch.tensor([tokens] * len(scripts)), torch.tensor([parents] * len(scripts)))
    zeros = torch.zeros(len(scripts), dtype=torch.int64)
    verified = verify_matching(tree, logits, GREEDY, seeds=zeros, root_positions=zeros)

    joint = Counter()
    for script, emitted in zip(scripts, verified.tokens.tolist(), strict=True):
        weight = 1
        for context, token in zip(tokens, script, strict=True):
            weight *= distributions[context][token] if context >= 0 else exact.fractions(20, 30, 50)[token]
        runs = [(weight, tuple(token for token in emitted if token >= 0)[:3])]
        while len(runs[0][1]) < 3:  # what the next passes add is drawn from the target by the same rule
            runs = [(w * distributions[run[-1]][y], (*run, y)) for w, run in runs for y in range(vocab_size)]
        for w, run in runs:
            joint[run] += w
    for a, b, c in product(range(vocab_size), repeat=3):
        assert joint[a, b, c] == distributions[start][a] * distributions[a][b] * distributions[b][c]


def test_rejection_survives_extreme_distributions():
    p = torch.tensor([[0.5, 0.5, 0.0]] * 3).double()
    q = torch.tensor([[1.0, 0.0, 0.0], [1 - 2e-308, 1e-308, 1e-308], [0.5, 0.5, 0.0]]).double()
    draws = torch.tensor([[0, -1, -1], [0, 1, 2], [1, 0, -1]])
    acceptance, residual = recursive_rejection(p, q, draws)
    assert acceptance.tolist()[0] == [0.5, 0, 0]
    assert residual.tolist()[0] == [0, 1, 0]
    assert acceptance[2, 0] == 1
    assert acceptance.isfinite().all()
    torch.testing.assert_close(residual.sum(1), torch.ones(3).double())


# --- coupling with plain decoding ---


def drafters(model, toy, sampling, seeds, generator):
    """Proposals that know nothing, everything, the opposite, the noise, or a mixture of several kinds."""

    def last(contexts):
        return torch.tensor([context[-1] for context in contexts])

    def root_positions(contexts):
        return torch.tensor([len(context) - 1 for context in contexts])

    def chains(choose, depth=4):
        def propose(contexts):
            runs = [list(context) for context in contexts]
            for row, run in enumerate(runs):
                for _ in range(depth):
                    run.append(choose(row, run))
            tokens = torch.tensor([run[-depth:] for run in runs]).unsqueeze(-1)
            return backbone_tree(last(contexts), tokens, (1,) * depth)

        return propose

    def random(contexts):
        return toy.random_tree(len(contexts), 14, model.vocab_size, generator, last(contexts))

    def oracle(row, run):
        position = torch.tensor([len(run)])
        return int(sampling.draw(model.logits(run).unsqueeze(0), seeds[row : row + 1], position))

    def shared_noise(contexts):
        rough = torch.stack([model.logits(context) for context in contexts]).unsqueeze(1).expand(-1, 3, -1)
        return matching_tree(
            last(contexts),
            rough,
            (3, 2, 2),
            temperature=sampling.temperature,
            seeds=seeds[: len(contexts)],
            root_positions=root_positions(contexts),
        )

    def merged(contexts):
        grams = torch.randint(model.vocab_size, (len(contexts), 3, 4), generator=generator).tolist()
        return pad_tree(merge_branches(shared_noise(contexts), grams, max_nodes=16))

    return {
        "none": lambda contexts: backbone_tree(last(contexts), torch.zeros(len(contexts), 0, 1).long(), ()),
        "random": random,
        "oracle": chains(oracle),
        "adversarial": chains(lambda row, run: int(model.logits(run).argmin())),
        "shared noise": shared_noise,
        "merged": merged,
    }


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(), Sampling(0.6, top_k=5), Sampling(1.3, top_p=0.8)], ids=["0", "1", "top-k", "top-p"]
)
@pytest.mark.parametrize("name", ["none", "random", "oracle", "adversarial", "shared noise", "merged"])
def test_matching_reproduces_plain_decoding_token_for_token(toy, sampling, name):
    """Batches with prompts, limits and stop tokens that end every row at another step."""
    model, generator = toy.TableModel(9, seed=4), torch.Generator().manual_seed(5)
    prompts, limits, stop = [[0, 1], [3, 3, 8], [5, 2, 7, 1], [8, 8]], [25, 7, 40, 1], (6,)
    for seed in range(3):
        seeds = row_seeds(seed, 4)
        propose = drafters(model, toy, sampling, seeds, generator)[name]
        plain = [model.plain(*row, stop) for row in zip(prompts, [sampling] * 4, seeds, limits, strict=True)]
        texts, passes = model.speculate(prompts, propose, sampling, seeds, limits, stop)
        assert texts == plain
        expected_passes = {"none": [len(t) for t in plain], "oracle": [-(-len(t) // 5) for t in plain]}
        if name in expected_passes:
            assert passes == expected_passes[name]
        alone, _ = model.speculate(
            prompts[:1], drafters(model, toy, sampling, seeds, generator)[name], sampling, seeds[:1], limits[:1], stop
        )
        assert alone[0] == plain[0]  # a row does not depend on its batch


def test_stop_tokens_are_met_inside_accepted_runs(toy):
    """The coupling test above would not notice a stop token that only ever comes as a bonus."""
    model, seeds = toy.TableModel(9, seed=4), row_seeds(0, 1)
    propose = drafters(model, toy, GREEDY, seeds, torch.Generator())["oracle"]
    free, _ = model.speculate([[0, 1]], propose, GREEDY, seeds, [12])
    for length in range(1, 6):
        token = free[0][length - 1]
        stopped, passes = model.speculate([[0, 1]], propose, GREEDY, seeds, [12], (token,))
        assert stopped[0] == free[0][: free[0].index(token) + 1]
        assert passes == [1]


def test_shared_noise_raises_acceptance():
    """A drafter close to a broad target: ranking by its logits alone accepts what the two likeliest tokens hold."""
    count, vocab_size = 4000, 50
    target = torch.randn(vocab_size)
    draft = target + 0.3 * torch.randn(vocab_size)
    seeds, zeros = row_seeds(0, count), torch.zeros(count, dtype=torch.int64)
    arguments = {"seeds": seeds, "root_positions": zeros}
    accepted = []
    for temperature in (0.0, 1.0):
        tree = matching_tree(zeros, draft.expand(count, 1, -1), (2,), temperature=temperature, **arguments)
        logits = target.expand(count, 3, -1)
        accepted.append(float(verify_matching(tree, logits, Sampling(), **arguments).accepted.double().mean()))
    assert accepted[0] < 0.4
    assert accepted[1] > 0.85


# --- rejection, end to end ---


def two_level_counts(exact, order, count=100_000, **settings):
    """Joint counts of the first two tokens over `count` rows of one batch, under two drafted levels."""
    p1, q = exact.fractions(50, 30, 20), torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    p2 = [exact.fractions(10, 20, 70), exact.fractions(40, 40, 20), exact.fractions(80, 15, 5)]
    distributions = torch.stack([as_tensor(distribution) for distribution in (*p2, p1)]).log()
    sampling, seeds = Sampling(**settings), row_seeds(11, count)
    zeros = torch.zeros(count, dtype=torch.int64)
    arguments = {"sampling": sampling, "seeds": seeds, "root_positions": zeros}
    draft = sampled_tree(zeros, q.log().expand(count, -1, -1), (2, 2), vocab_size=3, **arguments)
    draft = SampledTree(draft.tree, order(draft), draft.log_probs)
    context = draft.tree.tokens.clone()
    context[:, 0] = 3
    verified = verify_sampled(draft, distributions[context], **arguments)
    first, second = verified.tokens[:, 0], verified.tokens[:, 1]
    following = sampling.draw(distributions[first], seeds, zeros + 2)  # plain decoding goes on where the pass ended
    second = torch.where(second >= 0, second, following)
    process = [sampling.log_probs(distribution).exp() for distribution in distributions]
    expected = torch.stack([process[3][a] * process[a] for a in range(3)]).flatten() * count
    return (3 * first + second).bincount(minlength=9), expected, verified


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 2}], ids=["plain", "top-k"])
def test_rejection_follows_the_target_distribution_end_to_end(exact, settings):
    observed, expected, verified = two_level_counts(exact, lambda draft: draft.draws, **settings)
    assert observed[expected == 0].sum() == 0
    assert p_value(observed[expected > 0], expected[expected > 0]) > 1e-3
    assert set(verified.accepted.tolist()) >= {0, 2}


def test_chi_square_rejects_draws_tested_in_the_wrong_order(exact):
    """Negative control: the backbone's candidate tested first."""

    def backbone_first(draft):
        by_probability = draft.log_probs.gather(-1, draft.draws).argsort(-1, descending=True)
        return draft.draws.gather(-1, by_probability)

    observed, expected, _ = two_level_counts(exact, backbone_first)
    assert p_value(observed, expected) < 1e-9


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rejection_of_one_level_end_to_end(exact, k):
    """Residuals with several tokens: their noise must not be that of the candidates."""
    count, distribution = 100_000, as_tensor(exact.p)
    zeros = torch.zeros(count, dtype=torch.int64)
    arguments = {"sampling": Sampling(), "seeds": row_seeds(6, count), "root_positions": zeros}
    draft = sampled_tree(zeros, as_tensor(exact.q).log().expand(count, 1, -1), (k,), vocab_size=5, **arguments)
    verified = verify_sampled(draft, distribution.log().expand(count, k + 1, -1), **arguments)
    assert p_value(verified.tokens[:, 0].bincount(minlength=5), count * distribution) > 1e-3
    rate = exact.one_level(exact.reject(exact.without_replacement), exact.p, exact.q, k)[1]
    assert float(verified.accepted.double().mean()) == pytest.approx(float(rate), abs=0.006)


def test_rejection_with_a_smaller_draft_vocabulary(exact):
    """Tokens outside it come from the residual; distributions with fewer tokens than candidates leave gaps."""
    count, vocabulary = 50_000, torch.tensor([4, 1])
    zeros, seeds = torch.zeros(count, dtype=torch.int64), row_seeds(2, count)
    arguments = {"sampling": Sampling(), "seeds": seeds, "root_positions": zeros}
    draft = sampled_tree(
        zeros,
        torch.tensor([[[0.3, 1.0]]]).expand(count, -1, -1),
        (2,),
        vocab_size=5,
        vocabulary=vocabulary,
        **arguments,
    )
    assert set(draft.draws.unique().tolist()) == {1, 4}
    assert draft.log_probs.isfinite().sum(-1).unique().tolist() == [2]
    distribution = as_tensor(exact.p)
    verified = verify_sampled(draft, distribution.log().expand(count, 3, -1), **arguments)
    assert p_value(verified.tokens[:, 0].bincount(minlength=5), count * distribution) > 1e-3
    one = sampled_tree(zeros, torch.randn(count, 1, 5), (3,), vocab_size=5, **(arguments | {"sampling": GREEDY}))
    assert one.tree.present.sum(1).unique().tolist() == [2]
    first = verify_sampled(one, distribution.log().expand(count, 4, -1), **arguments).tokens[:, 0]
    assert p_value(first.bincount(minlength=5), count * distribution) > 1e-3


def test_draws_without_replacement_have_the_distribution_of_sequential_draws(exact):
    count = 50_000
    zeros, seeds = torch.zeros(count, dtype=torch.int64), row_seeds(8, count)
    logits = as_tensor(exact.q).log().expand(count, 2, -1)
    draft = sampled_tree(zeros, logits, (3, 1), sampling=Sampling(), seeds=seeds, root_positions=zeros, vocab_size=5)
    expected = {draws: float(weight) * count for weight, draws in exact.without_replacement(exact.q, 3)}
    observed = Counter(map(tuple, draft.draws[:, 0].tolist()))
    assert p_value(torch.tensor([observed[d] for d in expected]), torch.tensor(list(expected.values()))) > 1e-3
    assert (draft.draws[:, 1, 1:] == -1).all()
    likeliest = as_tensor(exact.q)[draft.draws[:, 0]].amax(1)
    assert torch.equal(as_tensor(exact.q)[draft.tree.tokens[:, 1]], likeliest)


# --- bookkeeping ---


def test_path_acceptance_and_tested_levels():
    #  root 9 -> 1 -> 2 -> 3, 9 -> 4, 1 -> 5
    tree = DraftTree(torch.tensor([[9, 1, 2, 3, 4, 5]] * 5), torch.tensor([[-1, 0, 1, 2, 0, 1]] * 5))
    answers = torch.tensor(
        [
            [1, 2, 3, 7, 7, 7],  # all three levels, bonus 7
            [4, 0, 0, 0, 8, 0],  # the leaf below the root
            [1, 5, 0, 0, 0, 6],  # the leaf of level 2
            [5, 1, 1, 1, 1, 1],  # nothing: the node that holds 5 is another node's child
            [1, 2, 0, 0, 0, 0],  # two levels
        ]
    )
    logits = torch.nn.functional.one_hot(answers, 10).float()
    zeros = torch.zeros(5, dtype=torch.int64)
    verified = verify_matching(tree, logits, GREEDY, seeds=zeros, root_positions=zeros)
    assert verified.accepted.tolist() == [3, 1, 2, 0, 2]
    assert verified.bonus.tolist() == [7, 8, 6, 5, 0]
    assert verified.path.tolist() == [[0, 1, 2, 3], [0, 4, -1, -1], [0, 1, 5, -1], [0, -1, -1, -1], [0, 1, 2, -1]]
    assert verified.tokens.tolist() == [[1, 2, 3, 7], [4, 8, -1, -1], [1, 5, 6, -1], [5, -1, -1, -1], [1, 2, 0, -1]]
    assert verified.tested.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert verified.matched.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]


def test_count_kept():
    tokens = torch.tensor([[4, 5, 6, 7], [4, 5, -1, -1], [4, 5, 5, 4], [4, 6, 7, 8], [4, 6, 7, 8], [5, 4, 4, 4]])
    remaining = torch.tensor([9, 1, 9, 0, 4, 1])
    kept, finished = count_kept(tokens, (5, 2), remaining)
    assert kept.tolist() == [2, 1, 2, 0, 4, 1]
    assert finished.tolist() == [True, True, True, True, True, True]
    kept, finished = count_kept(tokens, (), torch.full((6,), 5))
    assert kept.tolist() == [4, 2, 4, 4, 4, 4]
    assert not finished.any()


# --- bad input ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_target_logits_are_refused_wherever_they_are(bad):
    tree = pad_tree(backbone_tree(torch.tensor([0, 1]), torch.tensor([[[1, 2]], [[2, 0]]]), (2,)))
    zeros = torch.zeros(2, dtype=torch.int64)
    logits = torch.zeros(2, 8, 3)
    logits[:, 3:] = bad  # absent nodes may hold anything
    verify_matching(tree, logits, GREEDY, seeds=zeros, root_positions=zeros)
    logits[1, 2, 0] = bad
    with pytest.raises(ValueError, match=r"row \(1, 2\) hold NaN"):
        verify_matching(tree, logits, GREEDY, seeds=zeros, root_positions=zeros)


def test_logits_that_do_not_fit_the_tree_are_refused():
    tree, zeros = backbone_tree(torch.tensor([0]), torch.tensor([[[1, 2]]]), (2,)), torch.zeros(1, dtype=torch.int64)
    for shape in ((1, 3, 2), (1, 4, 9), (2, 3, 9), (3, 9)):
        with pytest.raises(ValueError, match="logits must have shape"):
            verify_matching(tree, torch.zeros(shape), GREEDY, seeds=zeros, root_positions=zeros)


def test_draws_of_probability_0_are_refused():
    tree = backbone_tree(torch.tensor([0]), torch.tensor([[[1]]]), (1,))
    with pytest.raises(ValueError, match="probability 0"):
        SampledTree(tree, torch.tensor([[[1]]]), torch.tensor([[[0.0, -torch.inf]]]))
