"""Speculative decoding emits what plain decoding with transformers' own logits emits, token for token."""

from dataclasses import replace

import pytest
import torch

from kd_common.errors import UserError
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.tree import DraftTree
from spec_decode.drafters import Drafter, DynamicTree, FastEagle, PromptLookup, WithLookup
from spec_decode.drafters.prompt_lookup import NgramIndex

PROMPTS = [[5, 7, 9, 5, 7], [1], [3, 8, 3, 8, 3, 8, 3, 8, 2, 2, 6]]
SAMPLINGS = [Sampling(0.0), Sampling(1.0), Sampling(0.7, top_k=9), Sampling(1.3, top_p=0.8)]
SEED = 11


class RandomTrees(Drafter):
    """Random parents, random tokens, absent nodes."""

    def __init__(self, toy, size=12):
        self.generator, self.toy, self.size = torch.Generator().manual_seed(0), toy, size

    def propose(self, state):
        return self.toy.random_tree(len(state.root), self.size, 40, self.generator, state.root)


class Oracle(Drafter):
    """Knows the answer: a chain of it, with a wrong sibling beside each node; or only wrong tokens."""

    def __init__(self, answers, adversarial=False):
        self.answers, self.adversarial = answers, adversarial

    def propose(self, state):
        depth = len(state.tree)
        tokens, parents = [], []
        for answer, context in zip(self.answers, state.contexts, strict=True):
            coming = (answer[len(context) :] + [0] * depth)[:depth]
            wrong = [(token + 1) % 40 for token in coming]
            chain = wrong if self.adversarial else coming
            row, above, links = [context[-1]], 0, [-1]
            for token, other in zip(chain, [(token + 2) % 40 for token in coming], strict=True):
                row += [other, token]
                links += [above, above]
                above = len(row) - 1
            tokens.append(row)
            parents.append(links)
        return DraftTree(torch.tensor(tokens), torch.tensor(parents))


def expected(tiny, sampling, count=24, stop_tokens=(), prompts=PROMPTS):
    seeds = row_seeds(SEED, len(prompts))
    return [tiny.plain(tiny.model, p, sampling, s, count, stop_tokens) for p, s in zip(prompts, seeds, strict=True)]


def generate(tiny, drafter, sampling, count=24, prompts=PROMPTS, tree=(4, 4, 4), **options):
    if isinstance(drafter, PromptLookup):
        tree = (1,) * len(tree)
    decoder = SpeculativeDecoder(tiny.target, drafter, tree=tree)
    settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": SEED}
    return decoder.generate(prompts, max_new_tokens=count, **settings, **options)


@pytest.fixture(scope="module")
def answers(tiny):
    return [expected(tiny, sampling) for sampling in SAMPLINGS]


@pytest.mark.parametrize("sampling", range(4))
@pytest.mark.parametrize("kind", ["none", "random", "oracle", "adversarial", "lookup", "merged"])
def test_coupling(tiny, toy, answers, kind, sampling):
    full = [p + a for p, a in zip(PROMPTS, answers[sampling], strict=True)]
    drafter = {
        "none": lambda: None,
        "random": lambda: RandomTrees(toy),
        "oracle": lambda: Oracle(full),
        "adversarial": lambda: Oracle(full, adversarial=True),
        "lookup": PromptLookup,
        "merged": lambda: WithLookup(RandomTrees(toy)),
    }[kind]()
    out = generate(tiny, drafter, SAMPLINGS[sampling])
    assert out.new_tokens == answers[sampling]
    assert [sum(row) + 1 for row in out.acceptance_lengths] == [24] * 3
    if kind in ("none", "adversarial"):
        assert out.tau == 1
        assert sum(out.matched) == 0
    if kind == "oracle":
        assert all(row[:-1] == [4] * (len(row) - 1) for row in out.acceptance_lengths)
        assert out.tested[0] == sum(map(len, out.acceptance_lengths))


def test_greedy_text_is_that_of_transformers_generate(tiny):
    ids = torch.tensor([PROMPTS[2]])
    theirs = tiny.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    out = generate(tiny, PromptLookup(), Sampling(0.0), count=30, prompts=[PROMPTS[2]])
    assert torch.equal(out.sequences, theirs)
    assert out.tau > 1.2  # greedy text of a random model repeats itself


def test_a_row_does_not_depend_on_its_batch(tiny, toy):
    together = generate(tiny, RandomTrees(toy), SAMPLINGS[1])
    alone = generate(tiny, RandomTrees(toy), SAMPLINGS[1], prompts=PROMPTS[:1])
    assert alone.new_tokens[0] == together.new_tokens[0]


def test_stop_tokens_inside_accepted_runs_and_rows_that_end_at_different_steps(tiny, answers):
    for sampling, answer in zip(SAMPLINGS, answers, strict=True):
        stops = (answer[0][6], answer[1][2])
        wanted = [row[: next((i + 1 for i, t in enumerate(row) if t in stops), 24)] for row in answer]
        assert len({len(row) for row in wanted}) > 1
        full = [p + a for p, a in zip(PROMPTS, answer, strict=True)]
        for drafter in (None, Oracle(full), PromptLookup()):
            out = generate(tiny, drafter, sampling, stop_tokens=stops, pad_token=39)
            assert out.new_tokens == wanted
            if isinstance(drafter, Oracle):  # each of whose drafts has candidates in the first level
                assert out.tested[0] == sum(map(len, out.acceptance_lengths))
                assert out.matched[0] >= sum(length > 1 for row in out.acceptance_lengths for length in row)
                assert out.matched[0] <= out.tested[0]
            assert out.lengths == [len(p) + len(w) for p, w in zip(PROMPTS, wanted, strict=True)]
            for row, length in zip(out.sequences, out.lengths, strict=True):
                assert (row[length:] == 39).all()


def test_a_stop_token_as_the_very_first_token(tiny, answers):
    out = generate(tiny, PromptLookup(), SAMPLINGS[0], stop_tokens=[row[0] for row in answers[0]])
    assert out.new_tokens == [row[:1] for row in answers[0]]
    assert out.acceptance_lengths == [[], [], []]
    assert out.tau == 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_length_limits(tiny, answers, count):
    full = [p + a for p, a in zip(PROMPTS, answers[1], strict=True)]
    out = generate(tiny, Oracle(full), SAMPLINGS[1], count=count)
    assert out.new_tokens == [row[:count] for row in answers[1]]


def test_the_context_is_filled_to_its_last_token(tiny, toy):
    prompts = [list(range(40)) + [3] * 22, [4] * 55]
    sampling = SAMPLINGS[1]
    answer = [
        tiny.plain(tiny.model, p, sampling, s, 64 - len(p)) for p, s in zip(prompts, row_seeds(SEED, 2), strict=True)
    ]
    for drafter in (None, RandomTrees(toy), Oracle([p + a for p, a in zip(prompts, answer, strict=True)])):
        out = generate(tiny, drafter, sampling, count=None, prompts=prompts)
        assert out.lengths == [64, 64]
        assert out.new_tokens == answer


def test_padded_input(tiny, answers):
    ids, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):  # on the left, as transformers pads prompts
        ids[row, 11 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 11 - len(prompt) :] = 1
    assert generate(tiny, None, SAMPLINGS[0], prompts=ids, attention_mask=mask).new_tokens == answers[0]


class Letters:
    """Tokenizer of the letters: token i is the i-th letter."""

    @staticmethod
    def decode(tokens):
        return "".join(chr(65 + token) for token in tokens)


def test_stop_strings(tiny, answers):
    text = Letters.decode(answers[1][0])
    stop = text[9:12]
    end = text.index(stop) + 3
    full = [p + a for p, a in zip(PROMPTS, answers[1], strict=True)]
    decoder = SpeculativeDecoder(tiny.target, Oracle(full), tree=(4, 4, 4), tokenizer=Letters)
    out = decoder.generate(PROMPTS, max_new_tokens=24, temperature=1.0, seed=SEED, stop_strings=[stop])
    assert Letters.decode(out.new_tokens[0]) == text[:end]
    with pytest.raises(UserError, match="stop string"):
        decoder.generate(PROMPTS, stop_strings=[""])


def test_streaming(tiny, answers):
    full = [p + a for p, a in zip(PROMPTS, answers[0], strict=True)]
    received, flags = [[], [], []], [[], [], []]

    def on_tokens(row, tokens, drafted):
        received[row] += tokens
        flags[row] += drafted

    out = generate(tiny, Oracle(full), SAMPLINGS[0], on_tokens=on_tokens)
    assert received == out.new_tokens == answers[0]
    for row in range(3):
        # The prefill's token, then three drafted ones and the target's own.
        assert flags[row][:9] == [False, True, True, True, False, True, True, True, False]


def test_timings_add_up(tiny):
    out = generate(tiny, PromptLookup(), SAMPLINGS[0])
    assert set(out.timings) == {"prefill", "draft", "target", "verify", "commit", "total"}
    phases = sum(v for k, v in out.timings.items() if k != "total")
    assert 0 < phases <= out.timings["total"]
    assert out.tokens_per_second > 0


def test_ngram_index_finds_the_longest_then_latest_match():
    def brute(text, longest, count):
        for n in range(min(longest, len(text)), 0, -1):
            for end in range(len(text) - 1, n - 1, -1):
                if text[end - n : end] == text[-n:]:
                    return text[end : end + count]
        return []

    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        index, text = NgramIndex(3), []
        for _ in range(25):
            text += torch.randint(4, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator).tolist()
            assert index.continuation(text, 4) == brute(text, 3, 4)


# --- bad input ---


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([], "no prompt"),
        ([[1], []], "prompt 1"),
        ([[1] * 64], "prompt 0 .* 64"),
        ([[1, 40]], r"\[0, 40\)"),
        (torch.ones(1, 3), "torch.float32"),
        (torch.ones(1, 3, dtype=torch.bool), "torch.bool"),
        (torch.ones(3, dtype=torch.int64), "shape"),
        ([[1.5, 2.0]], "token ids"),
        ([1, 2], "token ids"),
    ],
)
def test_bad_prompts(tiny, prompts, named):
    with pytest.raises(UserError, match=named):
        SpeculativeDecoder(tiny.target).generate(prompts)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("temperature", [-1.0]),
        ("top_p", [0.0]),
        ("top_k", [-1, 2.5, True]),
        ("max_new_tokens", [0, True, 2.5]),
        ("seed", [1.5, True, 2**63]),
        ("stop_tokens", [[5.5], ["a"]]),
        ("stop_strings", [["x"]]),
        ("attention_mask", [torch.ones(1, 1)]),
    ],
)
def test_bad_settings(tiny, setting, values):
    for value in values:
        with pytest.raises(UserError, match=setting):
            SpeculativeDecoder(tiny.target).generate([[1]], **{setting: value})
    ids = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(UserError, match="attention_mask"):
        SpeculativeDecoder(tiny.target).generate(ids, attention_mask=torch.tensor([[-1e9, 0.0]]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tree": DynamicTree()}, "dynamic tree"),
        ({"rejection": True}, "does not draw"),
        ({"tree": (1, 0)}, "number of candidates >= 1"),
        ({"tree": "auto"}, "number of candidates >= 1"),
        ({"tree": (2.0,)}, "number of candidates >= 1"),
        ({"tree": (True,)}, "number of candidates >= 1"),
        ({"tree": (1, 3)}, "PromptLookup has 1 .* 3"),
        ({"tree": (1, 1, 1)}, "at most 2 levels"),
    ],
)
def test_trees_that_a_drafter_cannot_draft(tiny, settings, named):
    lookup = PromptLookup()
    lookup.capabilities = replace(lookup.capabilities, max_depth=2)
    with pytest.raises(UserError, match=named):
        SpeculativeDecoder(tiny.target, lookup, **{"tree": (1,), **settings})


def test_more_candidates_than_the_drafters_vocabulary(tiny):
    drafter = FastEagle(depth=3, draft_vocab=9).bind(tiny.target)
    drafter.use_vocabulary(torch.arange(9))
    with pytest.raises(UserError, match=r"has 9 .* 10"):
        SpeculativeDecoder(tiny.target, drafter, tree=(2, 10))
    with pytest.raises(UserError, match="longest"):
        PromptLookup(0)


def test_nan_logits_are_refused(tiny):
    model = tiny.make()
    from spec_decode.models import CausalLM

    target = CausalLM.from_transformers(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        SpeculativeDecoder(target).generate([[1, 2]], max_new_tokens=2)
