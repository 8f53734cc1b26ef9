"""Exact enumeration of verification rules in rational numbers, and a toy target model, shared by the tests.

A rule is a generator rule(p, q, k) of runs (weight, draws, token, accepted): with probability `weight` the drafter
proposes `draws` (in test order) and the rule emits `token`, which it took from the draft or not.
"""

from fractions import Fraction
from itertools import permutations, product
from types import SimpleNamespace

import pytest
import torch
import transformers

from spec_decode.decoding.sampling import Sampling
from spec_decode.decoding.tree import DraftTree
from spec_decode.decoding.verify import count_kept, verify_matching
from spec_decode.models import CausalLM


def fractions(*hundredths):
    distribution = [Fraction(h, 100) for h in hundredths]
    assert sum(distribution) == 1
    return distribution


def normalised(weights):
    total = sum(weights)
    return [w / total for w in weights]


def without_replacement(q, k):
    """Every ordered draw of k tokens and its probability."""
    for draws in permutations([x for x, mass in enumerate(q) if mass], k):
        weight, left = Fraction(1), Fraction(1)
        for x in draws:
            weight, left = weight * q[x] / left, left - q[x]
        yield weight, draws


def iid(q, k):
    for draws in product(range(len(q)), repeat=k):
        weight = Fraction(1)
        for x in draws:
            weight *= q[x]
        yield weight, draws


def best(q, k):
    """The k likeliest tokens, with certainty."""
    yield Fraction(1), tuple(sorted(range(len(q)), key=lambda x: (-q[x], x))[:k])


def match(proposals):
    """Sample and match on any kind of proposals."""

    def rule(p, q, k):
        for weight, draws in proposals(q, k):
            for token, mass in enumerate(p):
                yield weight * mass, draws, token, token in draws

    return rule


def reject(proposals, *, tested=lambda draws, q: draws, shrink=True, final="residual", skip_repeats=False, ratio=None):
    """Recursive rejection; the defaults are the correct rule for draws without replacement, the options its variants.

    tested: order in which the draws are tested. shrink: remove a rejected token from q. final: distribution of the
    token after the last rejection. skip_repeats: ignore a token drawn again. ratio: distribution used in place of q.
    """

    def rule(p, q, k):
        for weight, drawn in proposals(q, k):
            distribution, draft, alive, seen = list(p), list(ratio(q) if ratio else q), Fraction(1), set()
            for x in tested(drawn, q):
                if skip_repeats and x in seen:
                    continue
                seen.add(x)
                accept = min(Fraction(1), distribution[x] / draft[x])
                yield weight * alive * accept, drawn, x, True
                alive *= 1 - accept
                if alive == 0:
                    break
                distribution = normalised([max(a - b, Fraction(0)) for a, b in zip(distribution, draft, strict=True)])
                if shrink and sum(draft) > draft[x]:
                    draft = normalised([Fraction(0) if y == x else b for y, b in enumerate(draft)])
            for token, mass in enumerate(p if final == "target" else distribution):
                yield weight * alive * mass, drawn, token, False

    return rule


def one_level(rule, p, q, k):
    """Law of the emitted token and the probability that it was accepted."""
    distribution, accepted = [0] * len(p), 0
    for weight, _, token, from_draft in rule(p, q, k):
        distribution[token] += weight
        accepted += weight * from_draft
    return distribution, accepted


def two_levels(rule, p1, p2, q1, q2, k):
    """Joint distribution of two tokens under a constrained tree of two levels; the likeliest draw is the backbone."""
    distribution = dict.fromkeys(product(range(len(p1)), repeat=2), 0)
    for weight, draws, first, accepted in rule(p1, q1, k):
        backbone = min(draws, key=lambda x: (-q1[x], x))
        # A leaf ends in a bonus token; after a rejection the next pass starts below the emitted token. Its own draft
        # is verified by the same rule, which its one-level distribution covers; here it is plain decoding.
        follow = rule(p2[first], q2, k) if accepted and first == backbone else match(best)(p2[first], q2, k)
        for inner, _, second, _ in follow:
            distribution[first, second] += weight * inner
    return distribution


def total_variation(distribution, target):
    return sum(abs(a - b) for a, b in zip(distribution, target, strict=True)) / 2


class TableModel:
    """Language model whose logits depend on the last two tokens through a random table."""

    def __init__(self, vocab_size, seed):
        self.vocab_size = vocab_size
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(vocab_size, vocab_size, vocab_size, generator=generator)

    def logits(self, context):
        return self.table[context[-2], context[-1]]

    def tree_logits(self, contexts, tree):
        before = torch.tensor([[context[-2]] for context in contexts])
        parent = tree.tokens.gather(1, tree.parents.clamp(min=0))
        before = torch.where(tree.parents >= 0, parent, before)
        return self.table[before, tree.tokens.clamp(min=0)]

    def plain(self, prompt, sampling, seed, max_new_tokens, stop_tokens=()):
        """Plain decoding of one row, a token at a time."""
        context = list(prompt)
        for _ in range(max_new_tokens):
            position = torch.tensor([len(context)])
            context.append(int(sampling.draw(self.logits(context).unsqueeze(0), seed.reshape(1), position)))
            if context[-1] in stop_tokens:
                break
        return context[len(prompt) :]

    def speculate(self, prompts, propose, sampling, seeds, max_new_tokens, stop_tokens=()):
        """Speculative decoding of a batch; propose(contexts) returns a tree. Returns new tokens and passes per row."""
        contexts = [list(prompt) for prompt in prompts]
        limits = [len(prompt) + n for prompt, n in zip(prompts, max_new_tokens, strict=True)]
        finished = torch.zeros(len(prompts), dtype=torch.bool)
        passes = torch.zeros(len(prompts), dtype=torch.int64)
        while not finished.all():
            tree: DraftTree = propose(contexts)
            root_positions = torch.tensor([len(context) - 1 for context in contexts])
            verified = verify_matching(
                tree, self.tree_logits(contexts, tree), sampling, seeds=seeds, root_positions=root_positions
            )
            left = torch.tensor([limit - len(c) for limit, c in zip(limits, contexts, strict=True)])
            kept, ended = count_kept(verified.tokens, stop_tokens, left.masked_fill(finished, 0))
            for context, tokens, n in zip(contexts, verified.tokens.tolist(), kept.tolist(), strict=True):
                context += tokens[:n]
            passes += ~finished
            finished |= ended
        return [c[len(p) :] for c, p in zip(contexts, prompts, strict=True)], passes.tolist()


def random_tree(batch, size, vocab_size, generator, roots):
    """Random parents (a quarter of the nodes absent) and random tokens, distinct among siblings."""
    parents, tokens = torch.full((batch, size), -1), torch.full((batch, size), -1)
    tokens[:, 0] = roots
    for row in range(batch):
        present, taken = [0], set()
        for node in range(1, size):
            parent = present[int(torch.randint(len(present), (), generator=generator))]
            token = int(torch.randint(vocab_size, (), generator=generator))
            if torch.rand((), generator=generator) < 0.25 or (parent, token) in taken:
                continue
            parents[row, node], tokens[row, node] = parent, token
            present.append(node)
            taken.add((parent, token))
    return DraftTree(tokens, parents)


@pytest.fixture
def exact():
    """Rational enumeration: proposals, rules, distributions."""
    return SimpleNamespace(
        p=fractions(40, 25, 20, 10, 5),
        q=fractions(55, 10, 5, 25, 5),
        fractions=fractions,
        normalised=normalised,
        without_replacement=without_replacement,
        iid=iid,
        best=best,
        match=match,
        reject=reject,
        one_level=one_level,
        two_levels=two_levels,
        total_variation=total_variation,
    )


@pytest.fixture
def toy():
    return SimpleNamespace(TableModel=TableModel, random_tree=random_tree, Sampling=Sampling)


TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_model(seed=3, kind="Llama", **changes):
    """Random transformers model; noise on every parameter, since biases of 0 and norms of 1 would hide mistakes."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(TINY | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def plain_decoding(model, prompt, sampling, seed, count, stop_tokens=()):
    """The reference of every losslessness test: transformers' logits from scratch for every token of one row."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        logits = model(torch.tensor([text]), use_cache=False).logits[:, -1]
        text.append(int(sampling.draw(logits, seed.reshape(1), torch.tensor([len(text)]))))
        if text[-1] in stop_tokens:
            break
    return text[len(prompt) :]


@pytest.fixture(scope="session")
def tiny():
    """Tiny models, and plain decoding with transformers."""
    model = tiny_model()
    return SimpleNamespace(
        model=model, target=CausalLM.from_transformers(model), make=tiny_model, plain=plain_decoding, sizes=TINY
    )


@pytest.fixture(scope="session")
def standin(tmp_path_factory, byte_tokenizer):
    """Folder of a tiny target with a byte tokenizer, in the layout of a real one."""
    folder = tmp_path_factory.mktemp("standin")
    tiny_model(vocab_size=258, num_hidden_layers=4, max_position_embeddings=2048).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fit_args(tmp_path, standin):
    """Command line of a run of a second: six prompts, answers of twelve tokens, two epochs."""
    return [
        f"--run_dir={tmp_path / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--model.target.name={standin}",
        "--model.target.dtype=float32",
        "--model.drafter=FastEagle",
        "--model.drafter.depth=3",
        "--model.drafter.draft_vocab=null",
        "--model.learning_rate=0.002",
        "--data.limit=10",
        "--data.val_prompts=2",
        "--data.sampling.max_new_tokens=12",
        "--data.generation_batch_size=4",
        "--data.max_length=200",
        "--data.batch_size=2",
        "--measure_prompts=0",
    ]
