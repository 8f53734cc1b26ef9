"""Draft trees against brute force on single rows."""

import pytest
import torch

from spec_decode.decoding.tree import (
    DraftTree,
    ancestor_mask,
    backbone_parents,
    backbone_tree,
    depths,
    merge_branches,
    pad_tree,
    paths,
    positions,
)


def climb(parents, node):
    """Path from the root (or from an absent node itself) down to the node."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def continuations(tree, row):
    """Every path of tokens below the root, as a set."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    present = [node for node in range(1, len(parents)) if parents[node] >= 0]
    return {tuple(tokens[node] for node in climb(parents, node)[1:]) for node in present}


def test_mask_depths_paths_and_positions_match_climbing(toy):
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 7, 16, 33):
        tree = toy.random_tree(3, size, 6, generator, torch.tensor([0, 1, 2]))
        mask, depth, path = ancestor_mask(tree.parents), depths(tree.parents), paths(tree.parents)
        place = positions(tree.parents, torch.tensor([10, 0, 5]))
        for row, parents in enumerate(tree.parents.tolist()):
            for node in range(size):
                expected = climb(parents, node)
                assert mask[row, node].nonzero().flatten().tolist() == expected
                assert depth[row, node] == len(expected) - 1
                assert [n for n in path[row, node].tolist() if n >= 0] == expected
                assert place[row, node] == [10, 0, 5][row] + len(expected) - 1
        assert path.shape[-1] == depth.max() + 1


def test_mask_of_a_chain_is_causal():
    assert torch.equal(ancestor_mask(backbone_parents((1,) * 20)[None])[0], torch.ones(21, 21).tril().bool())


def test_backbone_parents():
    #                                                    root  backbone  leaves of level 1, 2
    assert backbone_parents((3, 2, 1)).tolist() == [-1, 0, 1, 2, 0, 0, 1]
    assert backbone_parents(()).tolist() == [-1]


@pytest.mark.parametrize("branching", [(1,), (4,), (1, 1, 1), (3, 2, 1), (2, 5, 1, 3)])
def test_an_accepted_path_moves_at_most_one_row(branching):
    for path in paths(backbone_parents(branching)[None])[0].tolist():
        nodes = [node for node in path if node >= 0]
        moved = [row for row, node in enumerate(nodes) if row != node]
        assert moved in ([], [len(nodes) - 1])


def test_backbone_tree_places_candidates():
    candidates = torch.tensor([[[5, 6, 7], [8, 9, 5], [1, 2, 3]]])
    tree = backbone_tree(torch.tensor([4]), candidates, (3, 2, 1))
    assert tree.tokens.tolist() == [[4, 5, 8, 1, 6, 7, 9]]
    assert continuations(tree, 0) == {(5,), (6,), (7,), (5, 8), (5, 9), (5, 8, 1)}


def test_scores_choose_backbone_and_survivors():
    candidates = torch.tensor([[[5, 6, 7], [8, 9, -1]]])
    scores = torch.tensor([[[0.1, 0.2, 0.7], [0.4, 0.4, 0.9]]])
    tree = backbone_tree(torch.tensor([4]), candidates, (2, 2), scores=scores)
    assert tree.tokens.tolist() == [[4, 7, 8, 6, 9]]  # ties keep the order of the candidates


def test_missing_candidates_and_all_levels_behind_an_empty_one_are_absent():
    candidates = torch.tensor([[[5, -1], [6, 7], [8, 9]], [[5, 6], [-1, -1], [8, 9]]])
    tree = backbone_tree(torch.tensor([3, 4]), candidates, (2, 2, 2))
    assert continuations(tree, 0) == {(5,), (5, 6), (5, 7), (5, 6, 8), (5, 6, 9)}
    assert continuations(tree, 1) == {(5,), (6,)}


def test_padding_adds_nodes_that_see_only_themselves():
    tree = backbone_tree(torch.tensor([4]), torch.tensor([[[5, 6], [7, 8]]]), (2, 2))
    padded = pad_tree(tree)
    assert padded.tokens.shape == (1, 8)
    assert pad_tree(padded).tokens.shape == (1, 8)
    mask = ancestor_mask(padded.parents)[0]
    assert torch.equal(mask[:5, :5], ancestor_mask(tree.parents)[0])
    assert torch.equal(mask[5:], torch.eye(8).bool()[5:])
    assert not mask[:5, 5:].any()
    assert padded.present.sum() == 5


def test_merged_branches_share_prefixes_and_keep_existing_nodes():
    tree = backbone_tree(torch.tensor([4, 4]), torch.tensor([[[5, 6], [7, 8]]] * 2), (2, 2))
    branches = [[[5, 7, 9, 1], [6, 2], [5, 7, 9, 3], [5, 7]], []]
    merged = merge_branches(tree, branches, max_nodes=64)
    assert torch.equal(merged.tokens[:, :5], tree.tokens)
    assert torch.equal(merged.parents[:, :5], tree.parents)
    assert continuations(merged, 0) == continuations(tree, 0) | {(5, 7, 9), (5, 7, 9, 1), (6, 2), (5, 7, 9, 3)}
    assert continuations(merged, 1) == continuations(tree, 1)
    assert merged.tokens.shape[1] == 5 + 4


def test_merging_equals_the_union_of_paths_on_random_trees(toy):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        tree = toy.random_tree(2, 9, 3, generator, torch.tensor([0, 1]))
        branches = torch.randint(3, (2, 4, 5), generator=generator).tolist()
        merged = merge_branches(tree, branches, max_nodes=100)
        for row in range(2):
            added = {tuple(branch[: i + 1]) for branch in branches[row] for i in range(len(branch))}
            assert continuations(merged, row) == continuations(tree, row) | added


def test_merging_stops_at_the_node_limit():
    tree = backbone_tree(torch.tensor([4]), torch.tensor([[[5]]]), (1,))
    merged = merge_branches(tree, [[[6, 7, 8], [5, 9], [6, 1]]], max_nodes=4)
    assert continuations(merged, 0) == {(5,), (6,), (6, 7)}
    assert merge_branches(tree, [[[6]]], max_nodes=1).tokens.shape == (1, 2)


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([[1, 2]], [[0, 0]], "earlier node"),
        ([[1, 2]], [[-1, 1]], "earlier node"),
        ([[1, 2]], [[-1, -2]], "earlier node"),
        ([[1, -1]], [[-1, 0]], "tokens must be"),
        ([[-1, 1]], [[-1, 0]], "tokens must be"),
        ([[1, 2]], [[-1, -1]], "tokens must be"),
        ([[1, -1, 2]], [[-1, -1, 1]], "must not be absent"),
        ([[1, 2, 2]], [[-1, 0, 0]], "distinct"),
        ([[1, 2]], [[-1]], "share one shape"),
        ([1, 2], [-1, 0], "share one shape"),
        ([[]], [[]], "int64"),
    ],
)
def test_malformed_trees_are_refused(tokens, parents, message):
    with pytest.raises(ValueError, match=message):
        DraftTree(torch.tensor(tokens), torch.tensor(parents))


def test_malformed_branching_and_branches_are_refused():
    candidates = torch.tensor([[[5, 6], [7, 8]]])
    with pytest.raises(ValueError, match="at least one candidate"):
        backbone_tree(torch.tensor([4]), candidates, (2, 0))
    with pytest.raises(ValueError, match="branching"):
        backbone_tree(torch.tensor([4]), candidates, (2, 3))
    with pytest.raises(ValueError, match="branching"):
        backbone_tree(torch.tensor([4]), candidates, (2,))
    with pytest.raises(ValueError, match="one list of branches per row"):
        merge_branches(backbone_tree(torch.tensor([4]), candidates, (1, 1)), [[], []], max_nodes=8)
