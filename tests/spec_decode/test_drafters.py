"""Every trained drafter: lossless, drafting what it was trained to predict, and clean caches."""

import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save
from torch.nn import functional as F

from kd_common.errors import UserError
from kd_common.registry import subclasses
from spec_decode import drafters
from spec_decode.decoding import tree as tree_module
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.sampling import Sampling, Stream, gumbel_noise, row_seeds
from spec_decode.decoding.tree import DraftTree
from spec_decode.decoding.verify import verify_matching
from spec_decode.drafters import (
    DraftModel,
    DynamicTree,
    FastEagle,
    Medusa,
    PromptLookup,
    WithLookup,
    load_drafter,
    save_drafter,
)
from spec_decode.drafters.base import DraftContext, draft_from_levels
from spec_decode.drafters.draft_model import PretrainedDraft
from spec_decode.drafters.dynamic import DynamicCandidates
from spec_decode.drafters.eagle3 import TrainingTimeTest
from spec_decode.drafters.files import frequent_tokens, holds_language_model
from spec_decode.drafters.trainable import TrainableDrafter
from spec_decode.models import CausalLM
from spec_decode.models.causal_lm import States
from spec_decode.models.layers import causal_attention

PROMPTS = [[5, 7, 9, 5, 7], [1], [3, 8, 3, 8, 3, 8, 3, 8, 2, 2, 6]]
OPTIONS = {
    "FastEagle": {"depth": 4},
    "FastEagle sequential": {"depth": 4, "sequential": True},
    "Eagle3": {"depth": 4},
    "Medusa": {"depth": 4},
    "DraftModel": {"depth": 4, "layers": 2},
}
GREEDY, HOT = Sampling(0.0), Sampling(1.0)
SEED = 4


def make(target, name, noise=0.1, **options):
    torch.manual_seed(1)
    drafter = getattr(drafters, name.split()[0])(**OPTIONS[name] | options).bind(target).eval().requires_grad_(False)
    if drafter.vocabulary is not None:
        drafter.use_vocabulary(torch.arange(0, target.vocab_size, 2)[: options["draft_vocab"]])
    for parameter in drafter.parameters():
        parameter.add_(noise * torch.randn_like(parameter))
    return drafter


def decode(target, drafter, sampling, count=20, prompts=PROMPTS, **settings):
    decoder = SpeculativeDecoder(target, drafter, **settings)
    return decoder.generate(
        prompts,
        max_new_tokens=count,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=SEED,
    )


@pytest.fixture(scope="module")
def plain(tiny):
    return {sampling: decode(tiny.target, None, sampling).new_tokens for sampling in (GREEDY, HOT)}


@pytest.mark.parametrize("name", [*OPTIONS, "PromptLookup"])
def test_the_packages_own_trees_are_valid_and_not_checked_in_every_pass(tiny, name, monkeypatch):
    lookup = name == "PromptLookup"
    drafter = PromptLookup() if lookup else make(tiny.target, name)
    ways = [{"tree": (1, 1) if lookup else (3, 2)}]
    if not lookup:
        ways += [{"tree": (3, 2), "rejection": True}, {"tree": (3, 2), "min_confidence": 0.1}]
    ways += [{"tree": DynamicTree(3, 3, 6)}] if drafter.capabilities.dynamic else []
    for way in ways:
        for used in (drafter, WithLookup(drafter)) if "rejection" not in way else (drafter,):
            trees = []
            decoder = SpeculativeDecoder(tiny.target, used, **way)
            with monkeypatch.context() as patch:
                patch.setattr(tree_module, "_check_tree", lambda tree: pytest.fail("checked"))
                decoder.generate(PROMPTS, max_new_tokens=12, temperature=1.0, on_pass=lambda t, _, s=trees: s.append(t))
            assert trees
            for tree in trees:
                DraftTree(tree.tokens, tree.parents)


def test_every_trained_drafter_is_tested_here():
    found = subclasses(TrainableDrafter)
    assert {name for name, kind in found.items() if kind.__module__.startswith("spec_decode")} == {
        name.split()[0] for name in OPTIONS
    }


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", OPTIONS)
def test_coupling(tiny, plain, name, sampling):
    """Token for token, chain and tree, full and reduced vocabulary, alone and with lookup."""
    for options in ({}, {"draft_vocab": 17}):
        drafter = make(tiny.target, name, **options)
        for tree in ((1, 1, 1, 1), (4, 2), (3, 1, 2, 1)):
            assert decode(tiny.target, drafter, sampling, tree=tree).new_tokens == plain[sampling]
        assert decode(tiny.target, WithLookup(drafter), sampling, tree=(2, 1, 1)).new_tokens == plain[sampling]


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampling"])
def test_dynamic_tree(tiny, plain, sampling):
    for shape in (DynamicTree(4, 3, 10), DynamicTree(3, 4, 4), DynamicTree(1, 2, 5)):
        for options in ({}, {"draft_vocab": 17}):
            assert (
                decode(tiny.target, make(tiny.target, "Eagle3", **options), sampling, tree=shape).new_tokens
                == plain[sampling]
            )


def test_pretrained_draft_model(tiny, plain):
    """The target itself as its drafter is always right; another model sometimes."""
    same = decode(tiny.target, PretrainedDraft(tiny.target, tiny.target), HOT, tree=(1, 1, 1))
    assert same.new_tokens == plain[HOT]
    assert all(row[:-1] == [4] * (len(row) - 1) for row in same.acceptance_lengths)
    other = PretrainedDraft(tiny.target, CausalLM.from_transformers(tiny.make(9)))
    assert decode(tiny.target, other, HOT, tree=(2, 2, 1)).new_tokens == plain[HOT]
    with pytest.raises(UserError, match="39 tokens and the target 40"):
        PretrainedDraft(tiny.target, CausalLM.from_transformers(tiny.make(vocab_size=39)))


@pytest.mark.parametrize("rows", [34, 40, 48])
def test_a_draft_model_whose_head_is_padded_otherwise(tiny, plain, rows):
    """It drafts what both know: no token of its own padding, and it reads what the target writes beyond them."""
    shared = 32
    torch.manual_seed(3)
    model = tiny.make(9, vocab_size=rows)
    with torch.no_grad():
        model.lm_head.weight[shared:] = 9 * model.lm_head.weight[:1]  # would be drafted often
    drafter = PretrainedDraft(tiny.target, CausalLM.from_transformers(model), shared)
    assert any(token >= 34 for row in plain[HOT] for token in row)  # tokens that the smallest model has no row for
    drafted = []
    for settings in ({}, {"rejection": True}):
        decoder = SpeculativeDecoder(tiny.target, drafter, tree=(3, 2, 1), **settings)
        out = decoder.generate(
            PROMPTS, max_new_tokens=20, temperature=1.0, seed=SEED, on_pass=lambda tree, _: drafted.append(tree.tokens)
        )
        assert settings or out.new_tokens == plain[HOT]
    assert max(int(tokens[:, 1:].max()) for tokens in drafted) < shared
    with pytest.raises(UserError, match="the tree asks for 33"):
        SpeculativeDecoder(tiny.target, drafter, tree=(33,))
    for wrong in (0, rows + 1, 41):
        with pytest.raises(UserError, match="shared must be in"):
            PretrainedDraft(tiny.target, drafter.model, wrong)


@pytest.mark.parametrize("kind", ["trained", "pretrained", "with lookup"])
def test_a_drafter_of_another_target_is_refused_whatever_is_around_it(tiny, kind):
    other = CausalLM.from_transformers(tiny.make(8))
    drafter = {
        "trained": lambda: make(other, "Eagle3"),
        "pretrained": lambda: PretrainedDraft(other, tiny.target),
        "with lookup": lambda: WithLookup(make(other, "Eagle3")),
    }[kind]()
    with pytest.raises(UserError, match="built for another target"):
        SpeculativeDecoder(tiny.target, drafter)
    SpeculativeDecoder(other, drafter)
    SpeculativeDecoder(other, PromptLookup())


@pytest.mark.parametrize("name", OPTIONS)
def test_rejection_runs_and_keeps_greedy_text(tiny, plain, name):
    """With drawn candidates the distribution is tested in test_verify_exact; temperature 0 gives the greedy text."""
    drafter = make(tiny.target, name, draft_vocab=17)
    assert decode(tiny.target, drafter, GREEDY, tree=(1, 1, 1), rejection=True).new_tokens == plain[GREEDY]
    out = decode(tiny.target, drafter, HOT, tree=(3, 2, 2), rejection=True)
    assert [len(row) for row in out.new_tokens] == [20] * 3


# --- drafts are what training predicts ---


def state_at(target, texts, tree, cache, start=0, sampling=GREEDY):
    """State with every text committed from `start` on; the last token of each is the root."""
    lengths = torch.tensor([len(text) for text in texts])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True, padding_value=-1)
    states = target(padded.clamp(min=0))
    return DraftContext(
        contexts=texts,
        root=torch.tensor([text[-1] for text in texts]),
        root_positions=lengths - 1,
        states=States(states.features[:, start:-1], states.final[:, start:-1]),
        next_tokens=padded[:, start + 1 :],
        counts=lengths - 1 - start,
        tree=tree,
        sampling=sampling,
        seeds=row_seeds(SEED, len(texts)),
        rejection=False,
        cache=cache,
    )


def levels_of(tree, branching):
    """Candidates per level, backbone first, of a tree in the order of `backbone_parents`."""
    tokens, at, found = tree.tokens.tolist(), 1 + len(branching), []
    for level, width in enumerate(branching):
        found.append([[row[1 + level], *row[at : at + width - 1]] for row in tokens])
        at += width - 1
    return found


@pytest.mark.parametrize("draft_vocab", [None, 17])
@pytest.mark.parametrize("name", OPTIONS)
def test_drafts_are_the_best_tokens_of_the_teacher_forced_pass(tiny, name, draft_vocab):
    drafter, branching = make(tiny.target, name, draft_vocab=draft_vocab), (3, 2, 3, 1)
    texts = [torch.randint(40, (12,)).tolist(), torch.randint(40, (7,)).tolist()]
    drafted = drafter.propose(state_at(tiny.target, texts, branching, drafter.new_cache(2, 40)))
    found = levels_of(drafted, branching)
    for row, text in enumerate(texts):
        # Behind the prefix the drafted backbone itself, so that teacher forcing and drafting see the same tokens.
        tokens = torch.tensor([text + [level[row][0] for level in found]])
        levels = drafter.level_states(tokens, tiny.target(tokens))
        for level, width in enumerate(branching):
            logits = drafter.level_logits(level, levels[level][0, len(text) - 2])
            best = logits.topk(width).indices
            best = best if drafter.vocabulary is None else drafter.vocabulary[best]
            assert found[level][row] == best.tolist(), (name, level)


@pytest.mark.parametrize("name", OPTIONS)
def test_committing_in_parts_drafts_the_same(tiny, name):
    """Rows that commit different numbers of tokens, through several drafts, against one fresh draft."""
    drafter, branching = make(tiny.target, name), (2, 2, 2, 2)
    texts = [torch.randint(40, (14,)).tolist(), torch.randint(40, (9,)).tolist()]
    cache, done = drafter.new_cache(2, 60), [0, 0]
    for parts in ((5, 3), (1, 4), (3, 1), (5, 1)):
        now = [d + p for d, p in zip(done, parts, strict=True)]
        prefixes = [text[:n] for text, n in zip(texts, now, strict=True)]
        whole = state_at(tiny.target, prefixes, branching, cache)
        starts = [max(d - 1, 0) for d in done]
        counts = torch.tensor([n - 1 - s for n, s in zip(now, starts, strict=True)])
        index = (torch.tensor(starts).unsqueeze(1) + torch.arange(int(counts.max()))).clamp(max=max(now) - 2)
        partial = DraftContext(
            **{
                **vars(whole),
                "states": whole.states.gather(index),
                "next_tokens": whole.next_tokens.gather(1, index),
                "counts": counts,
            }
        )
        found = drafter.propose(partial)
        fresh = drafter.propose(state_at(tiny.target, prefixes, branching, drafter.new_cache(2, 60)))
        assert torch.equal(found.tokens, fresh.tokens)
        done = now


def test_fast_eagle_caches_hold_committed_positions_only(tiny, monkeypatch):
    """At every draft of a whole generation: as many entries as committed positions, nothing ever written behind them,
    and the entries equal those of a fresh pass over the committed text."""
    drafter, seen = make(tiny.target, "FastEagle"), []
    propose = drafter.propose

    def watched(state):
        draft = propose(state)
        cache, length = state.cache, int(state.root_positions[0])
        assert cache.lengths.tolist() == [length]
        for kept in (cache.keys, cache.values):
            assert (kept[..., length:, :] == 0).all()
        text = list(state.contexts[0])
        fresh = drafter.new_cache(1, cache.capacity)
        propose(state_at(tiny.target, [text], state.tree, fresh))
        torch.testing.assert_close(cache.keys, fresh.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.values, fresh.values, rtol=1e-4, atol=1e-5)
        seen.append(length)
        return draft

    monkeypatch.setattr(drafter, "propose", watched)
    decode(tiny.target, drafter, GREEDY, prompts=[PROMPTS[2]], tree=(3, 3, 2, 2))
    assert len(seen) > 5


def test_training_time_test_attends_like_a_mask():
    """Dense reference: step i, row p attends to step 0 up to row p and to steps 1..i at row p."""
    size, heads, kv_heads, dim, steps = 6, 4, 2, 8, 3
    test, keys, values = TrainingTimeTest(), [], []
    for step in range(steps):
        rows = size - step
        q = torch.randn(2, rows, heads, dim, dtype=torch.float64)
        k, v = (torch.randn(2, rows, kv_heads, dim, dtype=torch.float64) for _ in range(2))
        keys.append(k)
        values.append(v)
        found = test.attend(q, k, v)
        for row in range(rows):
            pairs = [(0, j) for j in range(row + 1)] + [(i, row) for i in range(1, step + 1)]
            mine = [torch.stack([x[i][:, j] for i, j in pairs], 1).repeat_interleave(2, dim=2) for x in (keys, values)]
            weights = torch.einsum("bhd,bshd->bhs", q[:, row], mine[0]).mul(dim**-0.5).softmax(-1)
            expected = torch.einsum("bhs,bshd->bhd", weights, mine[1]).flatten(1)
            torch.testing.assert_close(found[:, row], expected, rtol=1e-6, atol=1e-6)
    first = TrainingTimeTest().attend(q, k, v)
    torch.testing.assert_close(first, causal_attention()(q, k, v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_dynamic_tree_is_the_best_of_all_considered_nodes(tiny, temperature):
    """Brute force: the beam's candidates recomputed path by path in teacher-forced passes.

    Above temperature 0 the target's noise at the position is known, so that it belongs to the distribution.
    """
    drafter, shape = make(tiny.target, "Eagle3", noise=0.3), DynamicTree(4, 3, 12)
    text = torch.randint(40, (8,)).tolist()

    def log_probs(path):
        tokens = torch.tensor([text + path + [0]])
        levels = drafter.level_states(tokens, tiny.target(tokens))
        logits = drafter.level_logits(len(path), levels[len(path)][0, len(text) - 2]).double()
        if temperature:
            position = torch.tensor([len(text) + len(path)])
            noise = gumbel_noise(row_seeds(SEED, 1), position, torch.arange(40), Stream.TARGET)[0]
            logits = logits / temperature + noise
        return logits.log_softmax(-1)

    frontier, candidates = [((), 0.0)], {}
    for _ in range(shape.depth):
        children = {}
        for path, score in frontier:
            best = log_probs(list(path)).topk(shape.top_k)
            children |= {
                (*path, t): score + s for t, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            }
        candidates |= children
        frontier = sorted(children.items(), key=lambda item: -item[1])[: shape.top_k]
    expected = {path for path, _ in sorted(candidates.items(), key=lambda item: -item[1])[: shape.nodes]}
    sampling = Sampling(temperature)
    tree = drafter.propose(state_at(tiny.target, [text], shape, drafter.new_cache(1, 64), sampling=sampling))
    found, tokens, parents = set(), tree.tokens[0].tolist(), tree.parents[0].tolist()
    for node in range(1, len(tokens)):
        path, at = [], node
        while at:
            path.insert(0, tokens[at])
            at = parents[at]
        found.add(tuple(path))
    assert found == expected
    assert max(map(len, found)) > 1


def test_a_frontiers_node_sees_its_ancestors_and_itself(tiny):
    shape = DynamicTree(5, 3, 40)
    candidates = DynamicCandidates(state_at(tiny.target, [[1, 2], [3, 4]], shape, None), shape, None)
    tokens = candidates.expand(torch.randn(2, 1, 40))
    paths = [[[(0, place)] for place in range(3)] for _ in range(2)]
    for level in range(1, 5):
        tokens = candidates.expand(3 * torch.randn(2, 3, 40))
        above = candidates.expanded.tolist()
        paths = [[[*paths[row][above[row][i]], (level, i)] for i in range(3)] for row in range(2)]
        assert candidates.seen.shape == (2, 3, 3 * (level + 1))
        for row in range(2):
            for i in range(3):
                seen = candidates.seen[row, i].nonzero().flatten().tolist()
                assert seen == [3 * depth + place for depth, place in paths[row][i]]
    assert tokens.shape == (2, 3)


def test_a_dynamic_tree_holds_what_the_target_draws_where_the_drafter_is_the_target(toy):
    """Its candidates are ranked with the noise that the target draws with, so that most levels are accepted."""
    model, sampling, count = toy.TableModel(30, seed=4), Sampling(1.0), 200
    seeds, contexts = row_seeds(3, count), [[i % 30, i * 7 % 30] for i in range(count)]
    shape = DynamicTree(depth=3, top_k=4, nodes=8)
    accepted = {}
    for known in (seeds, seeds + 1):  # the second is noise that the target does not draw with
        state = SimpleNamespace(
            root=torch.tensor([context[-1] for context in contexts]),
            root_positions=torch.ones(count, dtype=torch.int64),
            sampling=sampling,
            seeds=known,
        )
        state = DraftContext(
            contexts=contexts,
            states=None,
            next_tokens=None,
            counts=None,
            tree=shape,
            rejection=False,
            cache=None,
            **vars(state),
        )
        candidates = DynamicCandidates(state, shape, None)
        before, tokens = torch.tensor(contexts)[:, :1], state.root.unsqueeze(1)
        for _ in range(shape.depth):
            above, tokens = tokens, candidates.expand(model.table[before, tokens])
            before = above.gather(1, candidates.expanded)
        tree = candidates.tree(0.0)
        logits = model.tree_logits(contexts, tree)
        verified = verify_matching(tree, logits, sampling, seeds=seeds, root_positions=state.root_positions)
        accepted[known is seeds] = float(verified.accepted.double().mean())
    assert accepted[True] > 2.6
    assert accepted[False] < 2.0, accepted


def test_backbone_noise_is_the_final_trees(tiny):
    """A level drafted alone has the backbone it has in the whole tree, also with noise."""
    logits = torch.randn(2, 3, 40)
    state = state_at(tiny.target, [[1, 2], [3, 4]], (2, 3, 1), None, sampling=HOT)
    for rejection in (False, True):
        whole = DraftContext(**{**vars(state), "rejection": rejection})
        tree = draft_from_levels(whole, logits, None, 40)
        tree = tree.tree if rejection else tree
        for level, width in enumerate(state.tree):
            alone = {"tree": (width,), "root_positions": state.root_positions + level}
            single = draft_from_levels(DraftContext(**{**vars(whole), **alone}), logits[:, level : level + 1], None, 40)
            single = single.tree if rejection else single
            assert torch.equal(single.tokens[:, 1], tree.tokens[:, 1 + level])


# --- pruning by confidence ---


def brute_force_paths(tree, row):
    """Tokens from the root down to each present node of a row."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    found = {0: ()}
    for node in range(1, len(tokens)):
        if parents[node] >= 0:
            found[node] = (*found[parents[node]], tokens[node])
    return found


@pytest.mark.parametrize("vocabulary", [None, torch.arange(0, 80, 2)])
def test_pruned_tree_is_the_likely_part_of_the_whole_one(tiny, vocabulary):
    logits = 2 * torch.randn(3, 3, 40)
    state = state_at(tiny.target, [[1, 2], [3, 4], [5, 6]], (3, 2, 4), None)
    whole = draft_from_levels(state, logits, vocabulary, 80)
    sizes = set()
    for threshold in (0.001, 0.01, 0.05, 0.2, 0.999):
        pruned = draft_from_levels(replace(state, min_confidence=threshold), logits, vocabulary, 80)
        for row in range(3):
            expected = set()
            for path in brute_force_paths(whole, row).values():
                probability = 1.0
                for level, token in enumerate(path):
                    index = token if vocabulary is None else token // 2
                    probability *= float(logits[row, level].double().softmax(-1)[index])
                if probability >= threshold:
                    expected.add(path)
            assert set(brute_force_paths(pruned, row).values()) == expected
        assert pruned.parents.shape[1] == 1 or (pruned.parents[:, 1:] >= 0).any(0).all()  # no column is empty
        sizes.add(pruned.tokens.shape[1])
    assert len(sizes) > 2
    assert 1 in sizes


def test_known_noise_counts_in_the_confidence(tiny):
    """A level is pruned from its worst candidates on, whatever the noise has made of the drafter's own order."""
    logits = torch.randn(64, 2, 40)
    state = state_at(tiny.target, [[n % 40, 1] for n in range(64)], (4, 1), None, sampling=HOT)
    whole = draft_from_levels(state, logits, None, 40)
    pruned = draft_from_levels(replace(state, min_confidence=0.3), logits, None, 40)
    disagree = 0
    for row in range(64):
        before, after = brute_force_paths(whole, row), brute_force_paths(pruned, row)
        first = [path for path in before.values() if len(path) == 1]
        kept = [path for path in first if path in after.values()]
        assert kept == first[: len(kept)]
        disagree += bool(kept) and kept[0] != (int(logits[row, 0].argmax()),)
    assert disagree > 5


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", OPTIONS)
def test_coupling_holds_under_pruning(tiny, plain, name, sampling):
    """Token for token, and fewer nodes are verified than without."""
    drafter = make(tiny.target, name, draft_vocab=17)
    nodes = []
    for threshold in (0.0, 0.1):
        out = decode(tiny.target, drafter, sampling, tree=(6, 5, 4, 3), min_confidence=threshold)
        assert out.new_tokens == plain[sampling]
        nodes.append(sum(size * count for size, count in out.pass_sizes.items()) / sum(out.pass_sizes.values()))
    assert nodes[1] < nodes[0] == 24


def test_an_unsure_drafter_decodes_plainly(tiny, plain):
    out = decode(tiny.target, make(tiny.target, "Eagle3"), GREEDY, tree=(2, 2, 2), min_confidence=0.999)
    assert out.new_tokens == plain[GREEDY]
    assert set(out.pass_sizes) == {1}


def test_autoregressive_drafting_stops_early(tiny, monkeypatch):
    """No level is drafted below one that no row is expected to reach."""
    calls = []
    real = PretrainedDraft.next_logits
    monkeypatch.setattr(PretrainedDraft, "next_logits", lambda *a: (calls.append(1), real(*a))[1])
    drafter = PretrainedDraft(tiny.target, tiny.target)
    per_draft = []
    for threshold in (0.0, 0.999):
        calls.clear()
        out = decode(tiny.target, drafter, GREEDY, tree=(1, 1, 1, 1), min_confidence=threshold)
        per_draft.append(len(calls) / sum(out.pass_sizes.values()))
    assert per_draft == [4, 1]


def test_dynamic_tree_under_pruning(tiny, plain):
    drafter = make(tiny.target, "Eagle3", draft_vocab=17)
    whole = decode(tiny.target, drafter, HOT, tree=DynamicTree(3, 4, 12))
    pruned = decode(tiny.target, drafter, HOT, tree=DynamicTree(3, 4, 12), min_confidence=0.08)
    assert pruned.new_tokens == whole.new_tokens == plain[HOT]
    assert set(whole.pass_sizes) == {16}
    assert min(pruned.pass_sizes) < 16


@pytest.mark.parametrize(
    "settings", [{"min_confidence": 1.0}, {"min_confidence": -0.1}, {"min_confidence": 0.1, "rejection": True}]
)
def test_bad_confidence(tiny, settings):
    with pytest.raises(UserError, match="min_confidence"):
        SpeculativeDecoder(tiny.target, make(tiny.target, "FastEagle"), **settings)


def test_lookup_has_no_confidence(tiny, plain):
    with pytest.raises(UserError, match="PromptLookup"):
        SpeculativeDecoder(tiny.target, PromptLookup(), min_confidence=0.1)
    both = WithLookup(make(tiny.target, "FastEagle"))
    assert decode(tiny.target, both, GREEDY, tree=(2, 1), min_confidence=0.1).new_tokens == plain[GREEDY]


def test_a_looked_up_branch_fills_the_slots_of_a_pass(tiny):
    """Passes are padded to 8 nodes anyway, so that the branch may be longer than the drafter's tree is deep."""
    cycle, sizes = [3, 8, 5, 9, 2, 6, 7, 4, 1, 12, 11], []
    decoder = SpeculativeDecoder(tiny.target, WithLookup(make(tiny.target, "FastEagle")), tree=(1, 1))
    decoder.generate(
        [cycle * 3 + cycle[:4]],
        max_new_tokens=12,
        on_pass=lambda tree, _: sizes.append((tree.tokens.shape[1], int(tree.present.sum()))),
    )
    assert {size for size, _ in sizes} == {8}
    assert max(present for _, present in sizes) == 8


# --- initialisation, vocabulary, files ---


def test_medusa_starts_from_the_targets_own_prediction(tiny):
    drafter = Medusa(depth=2).bind(tiny.target)
    tokens = torch.randint(40, (1, 6))
    states = tiny.target(tokens)
    for level, x in enumerate(drafter.level_states(tokens, states)):
        torch.testing.assert_close(drafter.level_logits(level, x), tiny.target.logits(states.final[:, :-1]))


def test_fast_eagle_starts_as_the_targets_last_layers(tiny):
    target = tiny.target
    tokens = torch.randint(40, (2, 9))
    drafter = FastEagle(depth=len(target.layers) - target.feature_layers[2]).bind(target)
    states = target(tokens)
    with torch.no_grad():
        drafter.join.weight[:, target.shape.hidden_size :].zero_()  # but for the next token
    last = drafter.level_states(tokens, states)[-1]
    assert last.shape[1] > 4
    torch.testing.assert_close(last, states.final[:, : last.shape[1]], rtol=1e-4, atol=1e-4)


def test_the_target_is_frozen_and_not_part_of_the_drafter(tiny):
    for name in OPTIONS:
        drafter = getattr(drafters, name.split()[0])(**OPTIONS[name]).bind(tiny.target)
        assert not any("embed" in key or "target" in key for key in drafter.state_dict())
        tokens = torch.randint(40, (2, 9))
        levels = drafter.level_states(tokens, tiny.target(tokens))
        assert len(levels) == 4
        loss = sum(drafter.level_logits(i, x).float().logsumexp(-1).sum() for i, x in enumerate(levels))
        loss.backward()
        assert all(p.grad is None for p in tiny.target.parameters())
        assert all(p.grad is not None for p in drafter.parameters()), name


def test_reduced_vocabulary(tiny):
    assert frequent_tokens(torch.tensor([3, 0, 5, 3, 0]), 4).tolist() == [0, 1, 2, 3]
    drafter = FastEagle(draft_vocab=3).bind(tiny.target)
    with pytest.raises(RuntimeError, match="not chosen yet"):
        drafter.frozen_head()
    for ids in ([1, 2], [2, 1, 3], [1, 1, 2], [1, 2, 40], [-1, 2, 3]):
        with pytest.raises(ValueError, match="draft vocabulary"):
            drafter.use_vocabulary(torch.tensor(ids))
    drafter.use_vocabulary(torch.tensor([4, 9, 30]))
    assert torch.equal(drafter.frozen_head(), tiny.target.lm_head.weight[[4, 9, 30]])
    with pytest.raises(ValueError, match="draft_vocab"):
        FastEagle().bind(tiny.target).use_vocabulary(torch.tensor([1]))


@pytest.mark.parametrize("name", OPTIONS)
def test_saved_and_loaded(tiny, tmp_path, name):
    drafter = make(tiny.target, name, draft_vocab=17)
    drafter.acceptance = [[0.5, 0.25]]
    save_drafter(drafter, tmp_path, {"target": "tiny"})
    loaded = load_drafter(tmp_path, tiny.target)
    assert loaded.acceptance == [[0.5, 0.25]]
    for key, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    first = decode(tiny.target, drafter, GREEDY, tree=(2, 1, 1))
    assert decode(tiny.target, loaded, GREEDY, tree=(2, 1, 1)).acceptance_lengths == first.acceptance_lengths
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drafter.json", "drafter.safetensors"]

    other = CausalLM.from_transformers(tiny.make(8))
    with pytest.raises(UserError, match=r"trained for another target \(tiny, fingerprint"):
        load_drafter(tmp_path, other)
    config = json.loads((tmp_path / "drafter.json").read_text())
    config["drafter"]["settings"]["depth"] = 3
    (tmp_path / "drafter.json").write_text(json.dumps(config))
    if name in ("FastEagle", "Medusa"):  # the others have the same parameters at every depth
        with pytest.raises(UserError, match="does not fit"):
            load_drafter(tmp_path, tiny.target)
    (tmp_path / "drafter.json").unlink()
    with pytest.raises(UserError, match="holds no drafter"):
        load_drafter(tmp_path, tiny.target)


def rewritten(folder, change):
    """The drafter of a folder with other weights, whose checksum is right."""
    content = save(change(load_file(folder / "drafter.safetensors")))
    (folder / "drafter.safetensors").write_bytes(content)
    config = json.loads((folder / "drafter.json").read_text())
    (folder / "drafter.json").write_text(json.dumps(config | {"weights_crc32": zlib.crc32(content)}))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("norms.1.weight", None, "missing"),
        ("extra", torch.ones(2), "left over"),
        ("fuse.weight", torch.ones(2, 3), "shape"),
        ("norms.0.weight", torch.ones(32, dtype=torch.int64), "type"),
        ("norms.0.weight", torch.ones(32, dtype=torch.complex64), "type"),
        ("norms.0.weight", torch.full((32,), torch.nan), "not finite"),
        ("norms.0.weight", torch.full((32,), torch.inf), "not finite"),
    ],
)
def test_a_drafter_is_never_loaded_in_part(tiny, tmp_path, name, value, problem):
    save_drafter(make(tiny.target, "FastEagle", depth=2), tmp_path, {})
    rewritten(tmp_path, lambda weights: {k: v for k, v in (weights | {name: value}).items() if v is not None})
    with pytest.raises(UserError, match=rf"drafter\.safetensors .*{problem}.*{name}"):
        load_drafter(tmp_path, tiny.target)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_that_a_wrapper_changed_are_understood(tiny, tmp_path, prefix):
    drafter = make(tiny.target, "FastEagle", depth=2)
    save_drafter(drafter, tmp_path, {})
    rewritten(tmp_path, lambda weights: {prefix + name: value for name, value in weights.items()})
    for name, value in load_drafter(tmp_path, tiny.target).state_dict().items():
        assert torch.equal(value, drafter.state_dict()[name])


def test_a_drafter_that_overflows_in_the_targets_type_is_refused(tiny, tmp_path):
    target = CausalLM.from_transformers(tiny.make().to(torch.bfloat16).to(torch.float16))
    drafter = make(target, "FastEagle", depth=2)
    with torch.no_grad():
        drafter.norms[0].weight.fill_(1e6)
    save_drafter(drafter, tmp_path, {})
    with pytest.raises(UserError, match=r"1 not finite in torch.float16 \(norms.0.weight\)"):
        load_drafter(tmp_path, target)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"},
        {"architectures": ["Eagle3Speculator"]},
        {"model_type": "medusa"},
        {"medusa_num_heads": 4, "base_model_name_or_path": "x"},
        {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 100},
    ],
)
def test_drafters_of_other_programs_are_no_language_models(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another program wrote"):
        holds_language_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    assert holds_language_model(tmp_path)
    (tmp_path / "drafter.json").touch()
    assert not holds_language_model(tmp_path)


def test_half_precision_drafter_keeps_its_vocabulary(tiny, tmp_path):
    save_drafter(make(tiny.target, "FastEagle", draft_vocab=5, depth=2), tmp_path, {})
    half = CausalLM.from_transformers(tiny.make().to(torch.bfloat16))
    loaded = load_drafter(tmp_path, half)
    assert loaded.dtype == torch.bfloat16
    assert loaded.vocabulary.tolist() == [0, 2, 4, 6, 8]
    assert len(decode(half, loaded, GREEDY, tree=(2, 1)).new_tokens[0]) == 20


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [(FastEagle, "depth", 0), (FastEagle, "stem", -1), (Medusa, "draft_vocab", 41), (DraftModel, "layers", 0)],
)
def test_bad_settings(tiny, kind, setting, value):
    with pytest.raises(UserError, match=f"{setting} must be"):
        kind(**{setting: value}).bind(tiny.target)
    for wrong in (0, 2.5, True):
        with pytest.raises(UserError, match="must be whole numbers >= 1"):
            DynamicTree(depth=wrong)


@pytest.mark.parametrize("draft_vocab", [None, 17])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_drafter_in_float32_drafts_for_a_target_in_bfloat16(tiny, name, draft_vocab):
    """Also once both are packed."""
    target = CausalLM.from_transformers(tiny.make().to(torch.bfloat16))
    plain = decode(target, None, GREEDY).new_tokens
    assert decode(target, make(target, name, draft_vocab=draft_vocab), GREEDY, tree=(2, 1)).new_tokens == plain


def test_linear_in_eights():
    from spec_decode.drafters.trainable import linear_in_eights

    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    torch.testing.assert_close(linear_in_eights(x, weight), F.linear(x, weight))
