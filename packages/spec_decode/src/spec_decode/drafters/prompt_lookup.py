"""Prompt lookup: drafts copied from the text behind the longest earlier match of its last tokens."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from kd_common.errors import UserError
from spec_decode.decoding.proposals import SampledTree
from spec_decode.decoding.tree import merge_branches, root_tree
from spec_decode.drafters.base import Capabilities, Draft, DraftContext, Drafter, tree_depth, verified_slots
from spec_decode.models import CausalLM


class NgramIndex:
    """Index of the last place at which every n-gram of a growing text ended, for n up to `longest`.

    Args:
        longest: Largest n.
    """

    def __init__(self, longest: int) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self._indexed = 0

    def continuation(self, text: list[int], count: int) -> list[int]:
        """Return up to `count` tokens that followed the longest, then latest, earlier match of the end of the text.

        Args:
            text: The text given before with tokens appended.
            count: Tokens wanted.
        """
        # Only n-grams with a successor are indexed, so the end of the text never finds itself.
        for end in range(self._indexed + 1, len(text)):
            for n, ends in enumerate(self._ends[:end], start=1):
                ends[tuple(text[end - n : end])] = end
        self._indexed = max(self._indexed, len(text) - 1)
        for n in range(min(len(self._ends), len(text)), 0, -1):
            if (found := self._ends[n - 1].get(tuple(text[-n:]))) is not None:
                return text[found : found + count]
        return []


class PromptLookup(Drafter):
    """Drafter with one branch: the continuation of the longest earlier match.

    Args:
        longest: Largest number of tokens to match, >= 1.

    Raises:
        UserError: If it is below 1.

    References:
        Saxena, Prompt lookup decoding, 2023 (first match); the longest match is taken here.
    """

    capabilities = Capabilities(max_width=1, chain_depth=7)  # 8 nodes with the root, the size of a padded pass

    def __init__(self, longest: int = 5) -> None:
        if type(longest) is not int or longest < 1:
            raise UserError(f"longest must be >= 1, a whole number, got {longest}")
        self.longest = longest

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return one index per row."""
        return [NgramIndex(self.longest) for _ in range(batch)]

    def branches(self, context: DraftContext, count: int) -> list[list[list[int]]]:
        """Return the branch of every row: at most `count` tokens, none without a match.

        The cache holds the indexes.
        """
        return [[index.continuation(list(c), count)] for index, c in zip(context.cache, context.contexts, strict=True)]

    def propose(self, context: DraftContext) -> Draft:
        """Return the chain of at most as many tokens as the tree has levels."""
        return merge_branches(root_tree(context.root), self.branches(context, tree_depth(context.tree)), 1 << 30)


class WithLookup(Drafter):
    """Drafter that adds the continuation of the longest earlier match to another drafter's tree.

    It is exact under sample-and-match only, because the branch is not drawn by the drafter. The branch takes the nodes
    that pad a pass to a multiple of 8, and 8 more if these are fewer than the tree is deep.

    Args:
        drafter: Drafter whose tree is extended.
        longest: Largest number of tokens to match.
    """

    standalone = False

    def __init__(self, drafter: Drafter, longest: int = 5) -> None:
        self.drafter, self.lookup = drafter, PromptLookup(longest)
        self.acceptance, capabilities = drafter.acceptance, drafter.capabilities
        self.capabilities = replace(capabilities, samples=False, extra_branches=capabilities.extra_branches + 1)

    def serves(self, target: CausalLM) -> bool:
        """Return whether the other drafter does."""
        return self.drafter.serves(target)

    def pack(self) -> None:
        """Pack the weights of the wrapped drafter."""
        self.drafter.pack()

    def weights(self) -> list[Tensor]:
        """Return the weights of the wrapped drafter."""
        return self.drafter.weights()

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Return the caches of both."""
        return self.drafter.new_cache(batch, capacity), self.lookup.new_cache(batch, capacity)

    def propose(self, context: DraftContext) -> Draft:
        """Return the drafter's tree, and a branch that fills its pass (`verified_slots`)."""
        inner, indexes = context.cache
        draft = self.drafter.propose(replace(context, cache=inner))
        assert not isinstance(draft, SampledTree)
        slots = verified_slots(context.tree)
        return merge_branches(draft, self.lookup.branches(replace(context, cache=indexes), slots - 1), slots)
