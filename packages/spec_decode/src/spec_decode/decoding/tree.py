"""Draft trees as parent arrays: the root is the last committed token, every other node one drafted token.

Parents precede their children, so that a node's ancestors in index order are its path from the root. A node with parent
-1, other than the root, is absent. It pads the rows of a batch to one size, attends to itself only and is never
accepted. Shapes: B rows of a batch, n nodes, N levels below the root, K candidates per level.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Tokens proposed as continuations of the last committed token.

    Args:
        tokens: int64 of shape (B, n); column 0 holds the last committed token. -1 at absent nodes.
        parents: int64 of shape (B, n), -1 in column 0 and at absent nodes, else the index of an earlier node.
        check: Look for mistakes, which waits for the device several times; False where the tree is valid by
            construction.

    Raises:
        ValueError: If shapes, dtypes or parents do not describe a tree, or siblings hold the same token.
    """

    tokens: Tensor
    parents: Tensor
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if check:
            _check_tree(self)

    @property
    def present(self) -> Tensor:
        """Boolean of shape (B, n): the root and every node that has a parent."""
        return (self.parents >= 0) | (torch.arange(self.parents.shape[1], device=self.parents.device) == 0)


def _check_tree(tree: DraftTree) -> None:
    tokens, parents = tree.tokens, tree.parents
    if tokens.dtype != torch.int64 or parents.dtype != torch.int64:
        raise ValueError(f"tokens and parents must be torch.int64, got {tokens.dtype} and {parents.dtype}")
    if tokens.dim() != 2 or tokens.shape != parents.shape or tokens.shape[1] == 0:
        raise ValueError(
            "tokens and parents must share one shape (batch, nodes) with at least the root, "
            f"got {tuple(tokens.shape)} and {tuple(parents.shape)}"
        )
    index = torch.arange(tokens.shape[1], device=parents.device)
    if ((parents >= index) | (parents < -1)).any():
        raise ValueError("parents must be -1 (root, absent nodes) or the index of an earlier node of the same row")
    present = tree.present
    if (present & (tokens < 0)).any() or (~present & (tokens != -1)).any():
        raise ValueError("tokens must be >= 0 at the root and at nodes with a parent, -1 at absent nodes")
    if (present[:, 1:] & ~present.gather(1, parents[:, 1:].clamp(min=0))).any():
        raise ValueError("a node's parent must not be absent")
    twins = (parents.unsqueeze(1) == parents.unsqueeze(2)) & (tokens.unsqueeze(1) == tokens.unsqueeze(2))
    if (twins & present.unsqueeze(1)).tril(-1).any():
        raise ValueError("children of one node must hold distinct tokens; drop the duplicates")


def root_tree(root: Tensor) -> DraftTree:
    """Return the last committed tokens alone, int64 of shape (B,): the tree of plain decoding."""
    tokens = root.unsqueeze(1)
    return DraftTree(tokens, torch.full_like(tokens, -1), check=False)


def ancestor_mask(parents: Tensor) -> Tensor:
    """Return the which nodes each node attends to: itself and its ancestors.

    Args:
        parents: Parent array of shape (B, n).

    Returns:
        Boolean of shape (B, n, n), True at [b, i, j] where j is i or an ancestor of i.
    """
    size = parents.shape[1]
    # Column 0 collects the links to parent -1 and is cut off.
    links = F.one_hot(parents + 1, size + 1)[..., 1:].float() + torch.eye(size, device=parents.device)
    for _ in range((size - 1).bit_length()):
        links = (links @ links).clamp(max=1.0)
    return links > 0


def depths(parents: Tensor) -> Tensor:
    """Return the levels below the root, int64 of shape (B, n); 0 at the root and at absent nodes."""
    return ancestor_mask(parents).sum(-1) - 1


def positions(parents: Tensor, root_positions: Tensor) -> Tensor:
    """Return the absolute position of every node, (B, n).

    It is the root's position, int64 of shape (B,), plus the node's depth.
    """
    return root_positions.unsqueeze(1) + depths(parents)


def paths(parents: Tensor) -> Tensor:
    """Return the nodes on the way from the root to each node.

    Args:
        parents: Parent array of shape (B, n) with largest depth D.

    Returns:
        int64 of shape (B, n, D + 1): at [b, i, d] the ancestor of i (or i itself) at depth d, -1 below node i. The path
        of an absent node is the node alone.
    """
    size = parents.shape[1]
    mask = ancestor_mask(parents)
    longest = int(mask.sum(-1).max())
    index = torch.arange(size, device=parents.device)
    ordered = torch.where(mask, index, size).sort(-1).values[..., :longest]
    return ordered.masked_fill(ordered == size, -1)


def backbone_parents(branching: Sequence[int]) -> Tensor:
    """Return the parent array of the constrained draft tree, in which only the backbone node of each level is expanded.

    Nodes are the root, the backbone from level 1 to N, then the remaining candidates level by level. An accepted path
    therefore occupies rows 0, 1, 2, ... of the pass except possibly its last node.

    Args:
        branching: Candidates per level, each >= 1; empty for the root alone.

    Returns:
        int64 of shape (1 + sum(branching),).

    Raises:
        ValueError: If a level has no candidate.

    References:
        FastEagle, arXiv 2509.20416 ("backbone expansion").
    """
    if any(width < 1 for width in branching):
        raise ValueError(f"every level needs at least one candidate, got {tuple(branching)}")
    leaves = [level for level, width in enumerate(branching) for _ in range(width - 1)]
    return torch.tensor([-1, *range(len(branching)), *leaves])


def backbone_tree(
    root: Tensor,
    candidates: Tensor,
    branching: Sequence[int],
    *,
    scores: Tensor | None = None,
    check: bool = True,
) -> DraftTree:
    """Return the constrained draft tree over the candidates of every level.

    Args:
        root: Last committed token per row, int64 of shape (B,).
        candidates: Distinct candidate tokens per level, int64 of shape (B, N, K), the backbone's first unless scores
            are given; -1 where a level has fewer. Levels behind one without candidates are left out.
        branching: Candidates to keep per level, N numbers in [1, K].
        scores: Optional ranking of shape (B, N, K), such as draft probabilities: the best ones are kept, the best of
            all becomes the backbone. Equal scores keep the order of the candidates.
        check: See `DraftTree`.

    Returns:
        Tree of 1 + sum(branching) nodes in the order of `backbone_parents`.

    Raises:
        ValueError: If the branching does not fit the candidates, or a level holds one token twice.
    """
    batch, levels, width = candidates.shape
    if len(branching) != levels or any(w > width for w in branching):
        raise ValueError(
            f"branching {tuple(branching)} needs candidates of shape (batch, {len(branching)}, "
            f">= {max(branching, default=0)}), got {tuple(candidates.shape)}"
        )
    parents = backbone_parents(branching).to(candidates.device).expand(batch, -1)
    if scores is not None:
        ranked = scores.masked_fill(candidates < 0, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        candidates = candidates.gather(-1, ranked)
    leaves = [candidates[:, level, 1:w] for level, w in enumerate(branching)]
    tokens = torch.cat([root.unsqueeze(1), candidates[:, :, 0], *leaves], dim=1)
    unreachable = (ancestor_mask(parents) & (tokens < 0).unsqueeze(1)).any(-1)
    return DraftTree(tokens.masked_fill(unreachable, -1), parents.masked_fill(unreachable, -1), check)


def prune_tree(tree: DraftTree, keep: Tensor) -> DraftTree:
    """Return the tree without some nodes and their descendants; nodes absent from every row are cut out.

    Args:
        tree: Tree to prune.
        keep: Boolean of shape (B, n); the root is always kept.

    Returns:
        Tree of at most n nodes in the same order.
    """
    keep = keep & tree.present
    keep[:, 0] = True
    keep = ~(ancestor_mask(tree.parents) & ~keep.unsqueeze(1)).any(-1)
    place = keep.any(0).cumsum(0) - 1
    parents = torch.where(keep & (tree.parents >= 0), place[tree.parents.clamp(min=0)], -1)
    columns = keep.any(0)
    return DraftTree(tree.tokens.masked_fill(~keep, -1)[:, columns], parents[:, columns], check=False)


def merge_branches(tree: DraftTree, branches: Sequence[Sequence[Sequence[int]]], max_nodes: int) -> DraftTree:
    """Add further continuations of the root, such as n-gram matches, each sharing the prefix it finds in the tree.

    Existing nodes keep their index, and new ones follow. So committing a path through new nodes may move several rows
    of the KV cache. This is exact under `verify_matching` only, as the branches are not draws of the drafter.

    Args:
        tree: Tree to extend.
        branches: For each row of the batch its branches, each a run of tokens that starts below the root. Earlier
            branches are served first.
        max_nodes: Largest number of nodes, absent ones included; further continuations are dropped.

    Returns:
        Tree of at most max(max_nodes, n) nodes; shorter rows end in absent nodes.

    Raises:
        ValueError: If there is not one list of branches per row, or one holds a negative token.
    """
    if len(branches) != len(tree.tokens):
        raise ValueError(f"need one list of branches per row ({len(tree.tokens)}), got {len(branches)}")
    all_tokens, all_parents = tree.tokens.tolist(), tree.parents.tolist()
    for row_tokens, row_parents, row_branches in zip(all_tokens, all_parents, branches, strict=True):
        child = {
            (parent, token): node for node, (parent, token) in enumerate(zip(row_parents, row_tokens, strict=True))
        }
        for branch in row_branches:
            if min(branch, default=0) < 0:
                raise ValueError(f"a branch must hold tokens, numbers >= 0, got {list(branch)}")
            node = 0
            for token in branch:
                if (node, token) not in child:
                    if len(row_tokens) >= max_nodes:
                        break
                    child[node, token] = len(row_tokens)
                    row_tokens.append(token)
                    row_parents.append(node)
                node = child[node, token]
    size = max(map(len, all_tokens))
    padded = [[row + [-1] * (size - len(row)) for row in rows] for rows in (all_tokens, all_parents)]
    tokens, parents = (torch.tensor(rows, device=tree.tokens.device) for rows in padded)
    return DraftTree(tokens, parents, check=False)


def pad_tree(tree: DraftTree) -> DraftTree:
    """Append absent nodes until the number of nodes is a multiple of 8."""
    extra = -tree.tokens.shape[1] % 8
    return DraftTree(F.pad(tree.tokens, (0, extra), value=-1), F.pad(tree.parents, (0, extra), value=-1), check=False)
