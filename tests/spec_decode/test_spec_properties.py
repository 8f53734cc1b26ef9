"""Properties of draft trees, verification, sampling and the cost model on random trees and extreme logits."""

from itertools import pairwise, permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_decode.decoding.cost import best_tree, expected_tokens
from spec_decode.decoding.proposals import matching_tree, sampled_tree
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.tree import (
    DraftTree,
    ancestor_mask,
    backbone_tree,
    depths,
    merge_branches,
    pad_tree,
    paths,
    positions,
    prune_tree,
)
from spec_decode.decoding.verify import count_kept, recursive_rejection, verify_matching, verify_sampled
from spec_decode.models import KVCache
from spec_decode.training.losses import rejected_mass, soft_cross_entropy

props = settings(max_examples=60, deadline=None, derandomize=True)
VOCAB = 6

extreme = st.sampled_from([-1e4, -50.0, 0.0, 0.0, 1.0, 1e4])
KINDS = [st.floats(-30, 30, width=32), extreme, st.just(3.0)]
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@st.composite
def trees(draw, batch=2):
    """Any trees: absent nodes, branches at every node, siblings with tokens of their own."""
    size = draw(st.integers(1, 10))
    tokens, parents = torch.full((batch, size), -1), torch.full((batch, size), -1)
    for row in range(batch):
        tokens[row, 0] = draw(st.integers(0, VOCAB - 1))
        taken, present = set(), [0]
        for node in range(1, size):
            parent, token = draw(st.sampled_from(present)), draw(st.integers(-1, VOCAB - 1))
            if token < 0 or (parent, token) in taken:
                continue
            taken.add((parent, token))
            present.append(node)
            parents[row, node], tokens[row, node] = parent, token
    return DraftTree(tokens, parents)


@st.composite
def logits(draw, *shape):
    count = torch.Size(shape).numel()
    values = draw(st.lists(draw(st.sampled_from(KINDS)), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float64).view(shape).to(draw(dtypes))


samplings = st.just(Sampling(0.0)) | st.builds(
    Sampling,
    st.sampled_from([1e-3, 0.7, 1.0, 50.0]),
    st.sampled_from([0, 1, 3, VOCAB, 99]),
    st.sampled_from([1e-6, 0.5, 0.95, 1.0]),
)


def continuations(tree, row):
    """Every path of tokens below the root, as a set."""
    tokens = tree.tokens[row]
    return {
        tuple(tokens[[node for node in path if node >= 0]].tolist())
        for node, path in enumerate(paths(tree.parents)[row].tolist())
        if node == 0 or tree.parents[row, node] >= 0
    }


# --- trees ---


@props
@given(tree=trees(), root=st.integers(0, 50))
def test_the_ancestor_mask_is_an_order_in_which_parents_come_first(tree, root):
    mask = ancestor_mask(tree.parents)
    assert mask.diagonal(dim1=1, dim2=2).all()
    assert not mask.triu(1).any()
    twice = (mask.float() @ mask.float()) > 0
    assert torch.equal(twice, mask)  # transitive: ancestors of ancestors are ancestors
    child = tree.parents >= 0
    level, place = depths(tree.parents), positions(tree.parents, torch.tensor([root, 0]))
    above = tree.parents.clamp(min=0)
    assert torch.equal(level[child], level.gather(1, above)[child] + 1)
    assert (level[~child] == 0).all()
    assert torch.equal(place - torch.tensor([[root], [0]]), level)


@props
@given(tree=trees(), data=st.data(), length=st.integers(0, 5))
def test_committing_a_path_leaves_exactly_its_nodes_behind_the_committed_ones(tree, data, length):
    size = tree.tokens.shape[1]
    cache = KVCache(2, 2, length + 1 + size, 1, 1, dtype=torch.float32, device="cpu")
    cache.lengths += torch.tensor([length, length + 1])
    for row in range(2):
        slots = torch.arange(cache.capacity) - int(cache.lengths[row])  # every slot holds the node that was written
        cache.keys[:, row, 0, :, 0] = slots
        cache.values[:, row, 0, :, 0] = 100 + slots
    before = cache.lengths.clone()
    every = paths(tree.parents)
    nodes = [data.draw(st.sampled_from(tree.present[row].nonzero().flatten().tolist())) for row in range(2)]
    path = every[torch.arange(2), torch.tensor(nodes)]
    kept = torch.tensor([data.draw(st.integers(0, int((row >= 0).sum()))) for row in path])
    cache.commit(path, kept)
    assert torch.equal(cache.lengths, before + kept)
    for row in range(2):
        start, end = before[row], cache.lengths[row]
        for stored, offset in ((cache.keys, 0), (cache.values, 100)):
            assert torch.equal(stored[0, row, 0, start:end, 0] - offset, path[row, : kept[row]].float())
            assert torch.equal(stored[1], stored[0])
            assert torch.equal(stored[0, row, 0, :start, 0] - offset, torch.arange(-start, 0).float())


@props
@given(tree=trees(), data=st.data())
def test_pruning_keeps_what_is_closed_under_parents_and_nothing_else(tree, data):
    batch, size = tree.tokens.shape
    flags = data.draw(st.lists(st.booleans(), min_size=batch * size, max_size=batch * size))
    keep = torch.tensor(flags).view(batch, size)
    pruned = prune_tree(tree, keep.clone())  # whose construction checks that no parent is missing
    kept = keep.clone()
    kept[:, 0] = True
    for row in range(batch):
        left = continuations(pruned, row)
        assert left <= continuations(tree, row)
        assert all(path[:-1] in left for path in left if len(path) > 1)
        whole = [bool(kept[row, ancestor_mask(tree.parents)[row, node]].all()) for node in range(size)]
        assert len(left) == sum(a and b for a, b in zip(whole, tree.present[row].tolist(), strict=True))
    again = prune_tree(pruned, torch.ones_like(pruned.tokens, dtype=torch.bool))
    assert torch.equal(again.tokens, pruned.tokens)
    assert torch.equal(again.parents, pruned.parents)
    alone = prune_tree(tree, torch.zeros_like(keep))
    assert torch.equal(alone.tokens, tree.tokens[:, :1])


@props
@given(
    branching=st.lists(st.integers(1, 4), max_size=4),
    more=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=4), max_size=3),
    room=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_number_of_nodes(branching, more, room, seed):
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.rand(2, len(branching), VOCAB, generator=generator).argsort(-1)[..., :4]
    tree = backbone_tree(torch.tensor([1, 2]), candidates, branching)
    assert tree.tokens.shape[1] == 1 + sum(branching)
    assert depths(tree.parents).max() == len(branching)
    assert [(depths(tree.parents)[0] == level + 1).sum() for level in range(len(branching))] == branching
    size = tree.tokens.shape[1]
    merged = merge_branches(tree, [more, more[:1]], room)
    assert merged.tokens.shape[1] <= max(room, size)
    assert torch.equal(merged.tokens[:, :size], tree.tokens)
    assert all(continuations(merged, row) >= continuations(tree, row) for row in range(2))
    padded = pad_tree(merged)
    assert padded.tokens.shape[1] % 8 == 0
    assert padded.tokens.shape[1] - merged.tokens.shape[1] < 8
    assert continuations(padded, 0) == continuations(merged, 0)


# --- verification ---


@props
@given(tree=trees(), sampling=samplings, seed=st.integers(0, 99), data=st.data())
def test_what_is_accepted_is_a_path_of_the_tree_and_the_bonus_leaves_it(tree, sampling, seed, data):
    size = tree.tokens.shape[1]
    target = data.draw(logits(2, size, VOCAB))
    seeds, roots = row_seeds(seed, 2), torch.tensor([3, 9])
    verified = verify_matching(tree, target, sampling, seeds=seeds, root_positions=roots)
    depth = verified.tokens.shape[1] - 1
    assert ((verified.accepted >= 0) & (verified.accepted <= depth)).all()
    assert (verified.matched <= verified.tested).all()
    for row in range(2):
        count = int(verified.accepted[row])
        path, tokens = verified.path[row, : count + 1], verified.tokens[row, : count + 1]
        assert path[0] == 0
        assert (verified.path[row, count + 1 :] == -1).all()
        assert (verified.tokens[row, count + 1 :] == -1).all()
        assert torch.equal(tree.parents[row, path[1:]], path[:-1])
        assert torch.equal(tree.tokens[row, path[1:]], tokens[:-1])
        children = tree.tokens[row, tree.parents[row] == path[-1]]
        assert tokens[-1] == verified.bonus[row]
        assert tokens[-1] not in children
        assert sampling.log_probs(target[row, path]).gather(1, tokens.unsqueeze(1)).isfinite().all()
    padded = verify_matching(
        pad_tree(tree),
        torch.nn.functional.pad(target, (0, 0, 0, -size % 8)),
        sampling,
        seeds=seeds,
        root_positions=roots,
    )
    assert torch.equal(padded.tokens, verified.tokens)
    assert torch.equal(padded.path, verified.path)


@props
@given(
    branching=st.lists(st.integers(1, VOCAB), min_size=1, max_size=3),
    sampling=samplings,
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_a_drafter_equal_to_the_target_is_accepted_until_the_drafts_are_used_up(branching, sampling, seed, data):
    """Under either rule the walk ends at a node without children; with one candidate per level all are accepted."""
    levels = data.draw(logits(2, len(branching) + 1, VOCAB)).double()
    levels = levels - 1e-6 * torch.arange(VOCAB)  # among equal logits topk may rank any first, argmax takes the lowest
    first, where = torch.tensor([0, 1]), {"seeds": row_seeds(seed, 2), "root_positions": torch.tensor([3, 9])}

    def at_nodes(tree):
        return levels.gather(1, depths(tree.parents).unsqueeze(-1).expand(-1, -1, VOCAB))

    draft = sampled_tree(first, levels[:, :-1], branching, sampling=sampling, vocab_size=VOCAB, **where)
    plain = Sampling(sampling.temperature)  # what the candidates are ranked by
    tree = matching_tree(first, levels[:, :-1], branching, temperature=sampling.temperature, **where)
    outcomes = (
        (draft.tree, verify_sampled(draft, at_nodes(draft.tree), sampling, **where)),
        (tree, verify_matching(tree, at_nodes(tree), plain, **where)),
    )
    for tree, verified in outcomes:
        last = verified.path.gather(1, verified.accepted.unsqueeze(1))
        assert not (tree.parents == last).any()
        if max(branching) == 1:
            assert (verified.accepted == len(branching)).all()


@st.composite
def distributions(draw):
    """Probabilities, some of them 0 or tiny."""
    weights = torch.tensor(
        draw(st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 3.0]), min_size=VOCAB, max_size=VOCAB)),
        dtype=torch.float64,
    )
    if weights.sum() == 0:
        weights[draw(st.integers(0, VOCAB - 1))] = 1.0
    return weights / weights.sum()


@props
@given(p=distributions(), q=distributions(), count=st.integers(1, 3))
def test_rejection_emits_the_targets_distribution_whatever_is_drafted(p, q, count):
    support = q.nonzero().flatten().tolist()
    orders = torch.tensor(list(permutations(support, min(count, len(support)))))
    weight, left = torch.ones(len(orders), dtype=torch.float64), torch.ones(len(orders), dtype=torch.float64)
    for x in orders.T:  # the probability of the order under draws without replacement
        weight, left = weight * q[x] / left, (left - q[x]).clamp(min=1e-300)
    acceptance, residual = recursive_rejection(p.expand(len(orders), -1), q.expand(len(orders), -1), orders)
    assert ((acceptance >= 0) & (acceptance <= 1)).all()
    assert (residual >= 0).all()
    torch.testing.assert_close(residual.sum(1), torch.ones(len(orders), dtype=torch.float64))
    alive, distribution = weight, torch.zeros_like(p)
    for j, x in enumerate(orders.T):
        distribution.index_add_(0, x, alive * acceptance[:, j])
        alive = alive * (1 - acceptance[:, j])
    distribution += alive @ residual
    if weight.sum() > 0.999:  # tiny masses cancel in 1 - q
        torch.testing.assert_close(distribution, p, rtol=0, atol=1e-3 if (q[q > 0] < 1e-9).any() else 1e-9)
    same, _ = recursive_rejection(q.expand(len(orders), -1), q.expand(len(orders), -1), orders)
    torch.testing.assert_close(same[:, 0], torch.ones_like(same[:, 0]))


@props
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 7)), min_size=1, max_size=3
    ),
    stops=st.lists(st.integers(0, 9), max_size=2),
)
def test_a_row_keeps_a_prefix_up_to_its_limit_and_its_first_stop(rows, stops):
    tokens = torch.full((len(rows), 5), -1)
    for row, (new, _) in enumerate(rows):
        tokens[row, : len(new)] = torch.tensor(new)
    kept, finished = count_kept(tokens, stops, torch.tensor([limit for _, limit in rows]))
    for (new, limit), count, ended in zip(rows, kept.tolist(), finished.tolist(), strict=True):
        assert 0 <= count <= min(limit, len(new))
        assert not set(new[: count - 1 if count else 0]) & set(stops)
        stopped = count > 0 and new[count - 1] in stops
        assert stopped or count == min(limit, len(new))
        assert ended == (stopped or count == limit)


# --- sampling ---


@props
@given(
    data=st.data(),
    sampling=samplings,
    shift=st.sampled_from([-64.0, 0.0, 128.0]),
    seed=st.integers(0, 99),
    position=st.integers(0, 99),
)
def test_processed_distributions_of_any_logits(data, sampling, shift, seed, position):
    z = data.draw(logits(3, VOCAB))
    distribution = sampling.log_probs(z)
    torch.testing.assert_close(distribution.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    support = distribution > -torch.inf
    assert (support.sum(-1) <= (sampling.top_k or VOCAB)).all()
    assert support.gather(-1, z.argmax(-1, keepdim=True)).all()
    drawn = sampling.draw(z, row_seeds(seed, 3), torch.full((3,), position))
    assert support.gather(-1, drawn.unsqueeze(-1)).all()
    plain = Sampling(sampling.temperature).log_probs(z)
    # What survives keeps its proportions, and nothing that survives is less likely than what does not.
    ratio = (distribution - plain).masked_fill(~support, 0.0)
    assert (ratio.amax(-1) - ratio.masked_fill(~support, torch.inf).amin(-1) <= 1e-9).all()
    least = plain.masked_fill(~support, torch.inf).amin(-1)
    assert (least >= plain.masked_fill(support, -torch.inf).amax(-1)).all()
    wider = Sampling(sampling.temperature, sampling.top_k and sampling.top_k + 1, sampling.top_p)
    if sampling.top_p == 1:
        assert (support <= (wider.log_probs(z) > -torch.inf)).all()
    mass = plain.exp()
    if not sampling.top_k:
        assert (mass.where(support, 0).sum(-1) >= sampling.top_p - 1e-9).all()
        smallest = mass.masked_fill(~support, 2.0).amin(-1)
        assert ((mass.where(support, 0).sum(-1) - smallest < sampling.top_p) | (support.sum(-1) == 1)).all()
    if z.dtype == torch.float64 and sampling.temperature >= 0.7 and sampling.top_p == 1 and not sampling.top_k:
        torch.testing.assert_close(sampling.log_probs(z + shift), distribution, rtol=1e-9, atol=1e-9)


@props
@given(data=st.data())
def test_soft_cross_entropy_is_least_at_equality_with_finite_gradients(data):
    student, teacher = data.draw(logits(3, VOCAB)).float(), data.draw(logits(3, VOCAB))
    (loss, gradient), (least, _) = soft_cross_entropy(student, teacher), soft_cross_entropy(teacher, teacher)
    assert (loss >= least - 1e-4).all()
    assert (least >= -1e-6).all()
    assert gradient.isfinite().all()
    assert (gradient.sum(-1).abs() <= 1e-5).all()
    assert (gradient.abs() <= 1 + 1e-5).all()  # q - p


@props
@given(data=st.data())
def test_rejected_mass_is_a_probability_with_finite_gradients(data):
    student, teacher = data.draw(logits(3, VOCAB)).float(), data.draw(logits(3, VOCAB))
    mass, gradient = rejected_mass(student, teacher)
    assert ((mass >= -1e-5) & (mass <= 1 + 1e-5)).all()
    torch.testing.assert_close(mass, rejected_mass(teacher, student)[0], atol=1e-5, rtol=0)
    assert (gradient.sum(-1).abs() <= 1e-5).all()
    assert (gradient.abs() <= 1 + 1e-5).all()


# --- cost ---


@st.composite
def tables(draw):
    """Acceptance by level and rank whose rows sum to at most 1."""
    ranks = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 25), min_size=ranks, max_size=ranks)
    return [[x / 100 for x in r] for r in draw(st.lists(row, min_size=1, max_size=4))]


@props
@given(table=tables(), data=st.data())
def test_expected_tokens_is_bounded_and_grows_with_acceptance_width_and_depth(table, data):
    ranks = len(table[0])
    branching = data.draw(st.lists(st.integers(1, ranks), max_size=len(table)))
    tau = expected_tokens(table, branching)
    assert 1 <= tau <= len(branching) + 1
    level, rank = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, ranks - 1))
    better = [list(row) for row in table]
    better[level][rank] += data.draw(st.floats(0, 0.2))
    assert expected_tokens(better, branching) >= tau - 1e-12
    assert all(
        expected_tokens(table, short) <= expected_tokens(table, long) + 1e-12
        for short, long in pairwise([branching[:d] for d in range(len(branching) + 1)])
    )
    assert expected_tokens(table, [ranks] * len(branching)) >= tau - 1e-12
    sure = [[1.0] + [0.0] * (ranks - 1)] * len(table)
    assert expected_tokens(sure, branching) == len(branching) + 1


@props
@given(table=tables(), data=st.data())
def test_the_best_tree_never_loses_and_gains_where_time_or_acceptance_improves(table, data):
    times = st.floats(0.5, 3)
    verify_times = {size: data.draw(times) for size in (1, 4, 8, 16)}
    draft_times = [data.draw(st.floats(0, 0.5)) for _ in table]
    choice = best_tree(table, verify_times, draft_times)
    assert choice.speedup >= 1
    assert 1 <= choice.tokens_per_pass <= len(choice.branching) + 1
    assert len(choice.branching) <= len(table)
    assert all(1 <= width <= len(table[0]) for width in choice.branching)
    faster = best_tree(table, verify_times, [t / 2 for t in draft_times])
    assert faster.speedup >= choice.speedup - 1e-12
    better = best_tree([[min(1.0, 1.1 * a) for a in row] for row in table], verify_times, draft_times)
    assert better.speedup >= choice.speedup - 1e-12 or sum(map(sum, table)) == 0
    unit = 7.0  # speed-ups are ratios
    scaled = best_tree(table, {n: unit * t for n, t in verify_times.items()}, [unit * t for t in draft_times])
    assert abs(scaled.speedup - choice.speedup) <= 1e-9 * choice.speedup
