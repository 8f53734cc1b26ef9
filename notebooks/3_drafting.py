# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Drafting
#
# Speculative decoding guesses several tokens cheaply, lets the target check them in one pass, and keeps those it
# would have emitted itself. Here we draw a draft tree, verify it step by step, test that the output does not change,
# and measure on this machine what acceptance is needed for drafting to pay.
#
# The target is SmolLM2-135M-Instruct from its wheel, so nothing is downloaded. More:
# [docs/spec_decode.md](../docs/spec_decode.md), proofs: [docs/spec_exactness.md](../docs/spec_exactness.md).

# %%
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars as text are enough here

import matplotlib.pyplot as plt
import torch
import transformers
from scipy.optimize import brentq
from scipy.stats import chi2

from kd_common.hub.language_models import EMBEDDED, load_causal_lm
from kd_common.run.compare import write_table
from llm_kd.models import depth_prune
from spec_decode.decoding.autotune import measure_drafts, measure_passes
from spec_decode.decoding.cost import best_tree, expected_tokens, speedup
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.measure import first_divergence, measure
from spec_decode.decoding.proposals import SampledTree, sampled_tree
from spec_decode.decoding.sampling import Sampling, row_seeds
from spec_decode.decoding.session import Session
from spec_decode.decoding.tree import ancestor_mask, backbone_tree
from spec_decode.decoding.verify import verify_matching, verify_sampled
from spec_decode.drafters import PromptLookup
from spec_decode.drafters.draft_model import PretrainedDraft
from spec_decode.fit import build, run
from spec_decode.models import CausalLM
from spec_decode.viz.figures import Passes, plot_time, plot_trees

# %matplotlib inline

output = Path(tempfile.mkdtemp(prefix="drafting_"))
session = Session.open("none", EMBEDDED, dtype="float32", device="cpu", tree="chain")
target, tokenizer = session.target, session.tokenizer

# %% [markdown]
# ## 1. A draft tree
#
# The tree has one backbone that leads on, and some further candidates on every level. As drafter we take the target
# without a few of its layers. It is a poor drafter, since it costs nearly as much as the target, but it needs no
# training.

# %%
LAYERS = 27  # of 30
TREE = (3, 2, 2, 1)  # candidates per level
PROMPT = "Name three fruits and say what colour they are."

drafter = PretrainedDraft(target, CausalLM.from_transformers(depth_prune(load_causal_lm(EMBEDDED), LAYERS)))
prompt = session.encode([{"role": "user", "content": PROMPT}])
passes = Passes(100)
out = SpeculativeDecoder(target, drafter, tree=TREE).generate([prompt], max_new_tokens=12, on_pass=passes)
print(repr(tokenizer.decode(out.new_tokens[0])))
print(f"{len(out.acceptance_lengths[0])} target passes, {out.tau:.2f} tokens per pass")

# The three passes that accepted most, in their order; most passes accept less.
per_pass = [int(verified.accepted) for _, verified in passes.kept]
print(f"accepted in each pass: {per_pass}")
shown = sorted(sorted(range(len(per_pass)), key=lambda number: -per_pass[number])[:3])
plot_trees([passes.kept[number] for number in shown], tokenizer)

# %% [markdown]
# Green: what the target accepted. The token in each title is the target's own, so that even a pass in which all
# guesses are wrong yields one token.

# %% [markdown]
# ## 2. Verification, step by step
#
# All nodes of a tree go through the target at once. Every node may attend to itself, its ancestors and the text
# before, and to nothing else; so the logits at a node are those of its own branch.

# %%
pick = per_pass.index(max(per_pass))
tree, verified = passes.kept[pick]
print(f"pass {pick + 1}, with {per_pass[pick]} accepted tokens")
names = [repr(tokenizer.decode([t])) if t >= 0 else "(absent)" for t in tree.tokens[0].tolist()]
fig, ax = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
ax.imshow(ancestor_mask(tree.parents)[0], cmap="Greens", vmin=0, vmax=1.4)
ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
ax.set_yticks(range(len(names)), names, fontsize=7)
ax.set(xlabel="node that is attended to", ylabel="node that attends")
ax.set_title("Attention inside the tree (green: allowed)", fontsize=9)
plt.show()

# %%
# What was emitted before this pass; its last token is the root of the tree, which the target has not read yet.
emitted_before = 1 + sum(out.acceptance_lengths[0][:pick])
context = [*prompt, *out.new_tokens[0][:emitted_before]][:-1]
cache = target.new_cache(1, len(context) + tree.tokens.shape[1])
with torch.no_grad():
    target.prefill(torch.tensor([context]), torch.tensor([len(context)]), cache)
    logits, _ = target.tree_logits(tree, cache)

node = 0
while True:
    choice = int(logits[0, node].argmax())
    children = [n for n, parent in enumerate(tree.parents[0].tolist()) if parent == node]
    drafted = ", ".join(names[n] for n in children) or "nothing"
    print(f"at {names[node]}: the target says {tokenizer.decode([choice])!r}; drafted: {drafted}")
    found = [n for n in children if tree.tokens[0, n] == choice]
    if not found:
        break
    node = found[0]
again = verify_matching(tree, logits, Sampling(0.0), seeds=row_seeds(0, 1), root_positions=torch.tensor([len(context)]))
assert again.tokens.tolist() == verified.tokens.tolist()
print(f"verify_matching emits the same: {[tokenizer.decode([t]) for t in again.tokens[0].tolist() if t >= 0]}")

# %% [markdown]
# ## 3. Why the output does not change
#
# There are two exact rules. *Sample and match* draws the target's own token at every node, with noise that depends on
# the position alone, and moves on if the tree holds it: same tokens as without drafting. *Rejection* accepts a drawn
# candidate x with probability min(1, p(x)/q(x)) or else draws from what is left of p: other tokens, same distribution.
#
# First one token, with known distributions. A wrong rule runs along to show that the comparison can fail: it passes the
# drafter's most likely tokens off as random draws.

# %%
P = (0.40, 0.25, 0.20, 0.10, 0.05)  # the target's distribution
Q = (0.55, 0.10, 0.05, 0.25, 0.05)  # the drafter's
CANDIDATES = 2
ROWS = 20_000

p, q = torch.tensor(P).double(), torch.tensor(Q).double()
sampling, seeds, zero = Sampling(1.0), row_seeds(0, ROWS), torch.zeros(ROWS, dtype=torch.int64)
draft_logits = q.log().expand(ROWS, 1, -1)
target_logits = p.log().expand(ROWS, CANDIDATES + 1, -1)
where = {"seeds": seeds, "root_positions": zero}
best = q.argsort(descending=True)[:CANDIDATES].expand(ROWS, 1, -1)
best_tree_of_q = backbone_tree(zero, best, (CANDIDATES,))
drawn = sampled_tree(zero, draft_logits, (CANDIDATES,), sampling=sampling, vocab_size=len(P), **where)
outcomes = {
    "without drafts": (sampling.draw(target_logits[:, 0], seeds, zero + 1), None),
    "sample and match": verify_matching(best_tree_of_q, target_logits, sampling, **where),
    "rejection": verify_sampled(drawn, target_logits, sampling, **where),
    "wrong: top-k as draws": verify_sampled(
        SampledTree(best_tree_of_q, best, draft_logits), target_logits, sampling, **where
    ),
}
emitted = {name: found[0] if isinstance(found, tuple) else found.tokens[:, 0] for name, found in outcomes.items()}


def against(p, counts):
    """Total variation and chi-square of counts against a distribution: distance, statistic, p-value."""
    expected = counts.sum() * p
    rare = expected < 5  # too rare for the chi-square approximation: taken together
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (counts, expected)]
    statistic = float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
    return float((counts / counts.sum() - p).abs().sum() / 2), statistic, float(chi2.sf(statistic, len(cells[0]) - 1))


def sampling_distance(p, n, repeats=400):
    """Total variation between a distribution and n draws from it: mean and 95th percentile."""
    torch.manual_seed(0)
    counts = torch.distributions.Multinomial(n, p).sample((repeats,))
    distance = (counts / n - p).abs().sum(1) / 2
    return float(distance.mean()), float(distance.quantile(0.95))


usual, high = sampling_distance(p, ROWS)
rows = []
for name, tokens in emitted.items():
    distance, statistic, chance = against(p, torch.bincount(tokens, minlength=len(P)).double())
    found = outcomes[name]
    accepted = "" if isinstance(found, tuple) else f"{100 * found.accepted.double().mean():.1f}"
    rows.append(
        {
            "rule": name,
            "accepted (%)": accepted,
            "TV to p": f"{distance:.4f}",
            "chi-square": f"{statistic:.1f}",
            "p-value": f"{chance:.2g}",
        }
    )
write_table(
    rows, output / "rules.md", f"{ROWS:,} draws; n draws from p itself: TV {usual:.4f} on average, {high:.4f} at 95%"
)
assert torch.equal(emitted["without drafts"], emitted["sample and match"])

fig, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 2))
groups = ([name for name in emitted if "wrong" not in name], [name for name in emitted if "wrong" in name])
for ax, group, first in zip(panels, groups, (0, 3), strict=True):
    width = 0.8 / len(group)
    for number, name in enumerate(group):
        share = torch.bincount(emitted[name], minlength=len(P)) / ROWS
        x = torch.arange(len(P)) + (number - (len(group) - 1) / 2) * width
        error = 200 * (p * (1 - p) / ROWS).sqrt()
        ax.bar(x, 100 * (share - p), width, yerr=error, color=f"C{first + number}", label=name, error_kw={"lw": 0.8})
    ax.axhline(0, color="0.3", lw=0.8)
    ax.set(xlabel="token", ylabel="share minus p (points)", xticks=range(len(P)))
    ax.set_title("Error bars: 2 standard errors", fontsize=9)
    ax.legend(fontsize=8, loc="upper right")
    ax.grid(alpha=0.3, axis="y")
plt.show()

# %% [markdown]
# Now whole generations. A tiny random Llama of 8 tokens emits pairs of tokens, thousands of times, without drafts and
# with the drafts of another random Llama. The distribution of the pair is known exactly from the logits.

# %%
PAIRS = 6000
TEMPERATURE = 1.0


def tiny(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=32,
    )
    return CausalLM.from_transformers(transformers.LlamaForCausalLM(config).eval(), (0, 1, 2))


small, other = tiny(0), tiny(1)
start = [1, 2, 3]
with torch.no_grad():
    log_probs = Sampling(TEMPERATURE).log_probs
    first = log_probs(small.logits(small(torch.tensor([start])).final[:, -1]))[0]
    second = log_probs(small.logits(small(torch.tensor([[*start, t] for t in range(8)])).final[:, -1]))
    exact = (first[:, None] + second).exp().flatten()

decoders = {
    "without drafts": SpeculativeDecoder(small),
    "sample and match": SpeculativeDecoder(small, PretrainedDraft(small, other), tree=(2,)),
    "rejection": SpeculativeDecoder(small, PretrainedDraft(small, other), tree=(2,), rejection=True),
}
usual, high = sampling_distance(exact, PAIRS)
rows, pairs = [], {}
for name, decoder in decoders.items():
    # Another seed for every decoder; with one seed for all, sample and match would repeat plain decoding's tokens.
    out = decoder.generate([start] * PAIRS, max_new_tokens=3, temperature=TEMPERATURE, seed=len(pairs))
    pairs[name] = torch.tensor(out.new_tokens)[:, :2]
    counts = torch.bincount(pairs[name] @ torch.tensor([8, 1]), minlength=64).double()
    distance, statistic, chance = against(exact, counts)
    accepted = f"{100 * out.matched[0] / out.tested[0]:.1f}" if out.tested else ""
    rows.append(
        {
            "decoding": name,
            "accepted (%)": accepted,
            "TV to the exact distribution": f"{distance:.4f}",
            "chi-square": f"{statistic:.1f}",
            "p-value": f"{chance:.2g}",
        }
    )
write_table(rows, output / "pairs.md", f"{PAIRS:,} pairs; sampling alone: TV {usual:.4f} on average, {high:.4f} at 95%")

same_seed = {
    name: decoders[name].generate([start] * 200, max_new_tokens=10, temperature=TEMPERATURE, seed=7).new_tokens
    for name in decoders
}
for name in ("sample and match", "rejection"):
    same = sum(a == b for a, b in zip(same_seed[name], same_seed["without drafts"], strict=True))
    print(f"{name}: {same} of 200 texts are token for token those of plain decoding with the same seed")

# %% [markdown]
# ## 4. Does it pay on this machine?
#
# A pass over n nodes takes T(n), here the median of a few runs, which is noisy on a busy machine. With τ tokens per
# pass, decoding is faster by `τ · T(1) / (T_draft + T(n))`. Prompt lookup drafts what followed the last occurrence of
# the latest tokens; its drafts cost next to nothing, so here all depends on T(n) and on how often the text repeats
# itself.

# %%
SIZES = (1, 4, 8, 16, 24, 32)  # nodes; the decoder pads trees to multiples of 8
CONTEXT = 128  # tokens before
REPEATS = 5

lookup = PromptLookup()
passes_seconds = measure_passes(target, SIZES, length=CONTEXT, repeats=REPEATS)
draft_seconds = measure_drafts(target, lookup, 7, length=CONTEXT, repeats=REPEATS)
plain = passes_seconds[1]


def padded(levels):
    """Time of the pass that checks a chain of so many levels."""
    return passes_seconds[min(n for n in passes_seconds if n >= levels + 1 and n % 8 == 0)]


def needed(levels):
    """Acceptance, the same on every level, at which a chain breaks even; 1.0 if more than all would be needed."""
    cost = (draft_seconds[levels - 1] + padded(levels)) / plain

    def gain(a):
        return expected_tokens([[a]] * levels, (1,) * levels) - cost

    return 1.0 if gain(1.0) <= 0 else 0.0 if gain(0.0) >= 0 else brentq(gain, 0, 1)


fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
left.plot(SIZES, [1000 * passes_seconds[n] for n in SIZES], "o-", label="T(n), measured")
left.plot(SIZES, [1000 * plain * n for n in SIZES], color="0.5", ls="--", lw=1, label="n · T(1): no gain from one pass")
left.set(xlabel="nodes n in a pass", ylabel="time (ms)", ylim=(0, 1300 * max(passes_seconds.values())))
levels = range(1, 8)
right.plot(
    levels,
    [100 * needed(d) for d in levels],
    "o-",
    color="tab:red",
    label="needed to break even (100%: pays at no acceptance)",
)
right.set(xlabel="levels of the chain", ylabel="acceptance per level (%)", ylim=(0, 105), xticks=levels)
for ax in (left, right):
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
plt.show()
print(f"T(1) {1000 * plain:.0f} ms, T(8) {1000 * passes_seconds[8]:.0f} ms, draft {1e6 * draft_seconds[3]:.0f} µs")
print(f"a pass of 8 nodes costs {passes_seconds[8] / plain:.2f} plain passes: τ must exceed that")

# %% [markdown]
# Now real decoding, on text that repeats its prompt and on text that does not. The prediction takes the acceptance
# found here and the times measured above; it is the model's check, not a forecast.

# %%
CHAIN = 7  # levels
NEW_TOKENS = 40
PROMPTS = {
    "repeats": [
        "Repeat this text word for word: The ship left the harbour at dawn, and the ship came back to the harbour at "
        "dusk. The crew of the ship slept in the harbour until the ship left the harbour again.",
        "Correct the spelling and give the whole sentence again: The quik brown fox jumps over the lazy dog near the "
        "river bank while the lazy dog sleeps near the river bank.",
    ],
    "free": ["Write a short story about a lighthouse keeper.", "Why is the sky blue?"],
}

decoders = {
    "plain decoding": SpeculativeDecoder(target),
    "prompt lookup": SpeculativeDecoder(target, lookup, tree=(1,) * CHAIN),
}
rows, measured = [], {}
for kind, texts in PROMPTS.items():
    encoded = [session.encode([{"role": "user", "content": text}]) for text in texts]
    found = measure(decoders, encoded, max_new_tokens=NEW_TOKENS, stop_tokens=session.stops)
    base, drafted = found.values()
    measured |= {f"{kind}: {name}": value for name, value in found.items()}
    differing = [at for at in first_divergence(drafted.texts, base.texts) if at is not None]
    mean_pass = sum(count * passes_seconds[size] for size, count in drafted.pass_sizes.items()) / drafted.passes
    rows.append(
        {
            "text": kind,
            "plain (tokens/s)": f"{base.tokens_per_second:.1f}",
            "lookup (tokens/s)": f"{drafted.tokens_per_second:.1f}",
            "τ": f"{drafted.tau:.2f}",
            "speed-up, measured": f"{drafted.tokens_per_second / base.tokens_per_second:.2f}",
            "by the model": f"{speedup(drafted.tau, plain, draft_seconds[CHAIN - 1], mean_pass):.2f}",
            "texts equal": f"{len(texts) - len(differing)} of {len(texts)}",
        }
    )
write_table(rows, output / "speed.md", f"greedy, float32, chain of {CHAIN}, {NEW_TOKENS} tokens per prompt")
plot_time(measured)

# %% [markdown]
# Texts are equal where the logits are. In float32 a pass over a tree and a pass over one token differ by rounding,
# which changes a token only if the two best ones are that close; in bfloat16 it happens often.
#
# Which chain would have been best, given this acceptance and these times? `best_tree` looks at all of them.

# %%
for kind in PROMPTS:
    acceptance = [[a] for a in measured[f"{kind}: prompt lookup"].acceptance]
    if not acceptance:
        print(f"{kind}: nothing was ever drafted")
        continue
    best = best_tree(acceptance, passes_seconds, draft_seconds[: len(acceptance)])
    shown = ", ".join(f"{a:.0%}" for (a,) in acceptance)
    verdict = (
        f"a chain of {len(best.branching)}, {best.speedup:.2f} times plain speed" if best.branching else "no drafts"
    )
    print(f"{kind}: acceptance by level {shown}; needed {needed(min(CHAIN, len(acceptance))):.0%}. Best: {verdict}")

# %% [markdown]
# The acceptance counts only passes in which something was drafted, so the choice is for those passes.
#
# ## 5. A drafter that is trained
#
# `spec_decode.fit` on the command line is `build(arguments)` and `run(...)` here: the target answers prompts, its
# states are stored, a FastEagle cascade learns to say them in advance. So little training drafts nothing useful yet,
# and `SpeculativeDecoder.tuned` finds that out; the command's defaults take minutes, a good drafter takes hours
# ([docs/results_spec.md](../docs/results_spec.md)). Try more prompts, or `Medusa`.

# %%
cli = build(
    [
        "--model.target.dtype=float32",
        "--model.drafter.depth=2",
        "--model.drafter.draft_vocab=512",
        "--data.limit=36",
        "--data.val_prompts=4",
        "--data.sampling.max_new_tokens=24",
        "--data.max_length=128",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--measure_prompts=0",
        f"--run_dir={output / 'run'}",
    ]
)
result = run(cli)
acceptance = [f"{level[0]:.0%}" for level in result.last["acceptance"]]
print(f"tau {result.last['tau']:.2f}, acceptance by level {', '.join(acceptance)}, saved in {result.run_dir}")

# %% [markdown]
# ## What to take home
#
# * Drafting never changes the distribution of the text; a bug in verification shows as a distance above sampling error.
# * Whether it pays is a property of the machine and of the text. On a CPU a pass over 8 nodes costs noticeably more
#   than one over a single node, so acceptance has to make up for it.
# * Two prompts of each kind show the mechanism; `python -m spec_decode.benchmark` measures properly.
