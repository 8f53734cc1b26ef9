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
# # Decoupled gradients
#
# Distillation adds several losses, and each has a gradient of its own. Here we measure how noisy each gradient is,
# see what momentum makes of it, hide classes with the dynamic mask, and then let DeepKD run against plain KD on
# digits.
#
# Everything runs on a CPU without a download. The method: [docs/deepkd.md](../docs/deepkd.md).

# %%
import logging
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars as text are enough here
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # the runs below report through their results

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch import nn
from torch.nn import functional as F

from kd_common.functional import decoupled_kl, topk_class_mask
from kd_common.grads import component_gradients, output_gradients
from kd_common.gsnr import GradientSNR
from kd_common.optim import DecoupledSGD, deepkd_momenta
from kd_common.run.compare import mean_and_spread, write_table
from kd_common.run.report import read_metrics
from kd_common.schedules import TopKSchedule
from vision_kd.data import Digits
from vision_kd.fit import build, run
from vision_kd.viz.runs import plot_signal_to_noise

# %matplotlib inline

# %% [markdown]
# ## 1. Signal and noise of a gradient, by hand
#
# A mini-batch gradient is the gradient over all data, the signal, plus noise. Its signal-to-noise ratio (GSNR) is
# `‖E g‖² / E‖g − E g‖²`.
#
# Two small networks on the digits: a teacher that was fitted, and a fresh student. The student has two losses, the
# cross-entropy to the label and the KL divergence to the teacher. To see a difference we spoil a share of the labels;
# the teacher has only seen good ones.

# %%
WRONG_LABELS = 0.4  # share of the student's labels that are replaced by random ones
BATCH = 32
BATCHES = 400
TEMPERATURE = 4.0

torch.manual_seed(0)
data = Digits(batch_size=BATCH)
images, labels = data.load(train=True)
x = (images.flatten(1) / 255 - data.mean[0]) / data.std[0]
spoiled = torch.where(torch.rand(len(labels)) < WRONG_LABELS, torch.randint(10, labels.shape), labels)

teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
adam = torch.optim.Adam(teacher.parameters(), lr=0.01)
for _ in range(150):
    adam.zero_grad()
    F.cross_entropy(teacher(x), labels).backward()
    adam.step()
with torch.no_grad():
    soft = teacher(x)
print(f"teacher: {(soft.argmax(1) == labels).float().mean():.1%} right on its training data")


def losses(logits, rows):
    """Two components, one value per sample."""
    log_p = (soft[rows] / TEMPERATURE).log_softmax(1)
    log_q = (logits / TEMPERATURE).log_softmax(1)
    return {
        "labels": F.cross_entropy(logits, spoiled[rows], reduction="none"),
        "teacher": TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1),
    }


# %% [markdown]
# `GradientSNR` streams: it keeps a mean and a variance, never the gradients. As a first check we keep all gradients
# and apply the formula to them. The gradients come from the functions that the training step uses: every loss is
# differentiated at the logits and then carried back through the network.

# %%
parameters = list(student.parameters())


def batch_gradients(rows):
    logits = student(x[rows])
    leaf = logits.detach().requires_grad_()
    return component_gradients([logits], output_gradients(losses(leaf, rows), [leaf]), parameters)


def measure_batches(batch, batches):
    """GradientSNR over mini-batches drawn with replacement, and the gradients themselves."""
    snr, kept = GradientSNR(), {"labels": [], "teacher": []}
    for _ in range(batches):
        gradients = batch_gradients(torch.randint(len(x), (batch,)))
        snr.update(gradients)
        for name, parts in gradients.items():
            kept[name].append(torch.cat([part.flatten() for part in parts]))
    return snr, {name: torch.stack(rows) for name, rows in kept.items()}


snr, kept = measure_batches(BATCH, BATCHES)
for name, g in kept.items():
    by_hand = g.mean(0).square().sum() / g.var(0).sum()
    torch.testing.assert_close(snr.vector(name), float(by_hand), rtol=1e-3, atol=0)
    print(f"{name:8s} GSNR streamed {snr.vector(name):.4f}, by hand {float(by_hand):.4f}")

# %% [markdown]
# The second check needs no batches. For samples drawn with replacement the noise of a batch of size B is the noise of
# a single sample divided by B, so
#
# `GSNR(B) = B · ‖mean of the samples' gradients‖² / (sum of their variances)`.
#
# The measured mean still contains 1/n of the noise after n batches, so a measurement reads `GSNR(B) + 1/n`: pure
# noise does not read 0. Compare components at equal n only.

# %%
closed = {}
singles = [batch_gradients(torch.tensor([row])) for row in range(len(x))]
for name in ("labels", "teacher"):
    g = torch.stack([torch.cat([part.flatten() for part in single[name]]) for single in singles])
    closed[name] = float(g.mean(0).square().sum() / g.var(0, unbiased=False).sum())

sizes = [4, 8, 16, 32, 64, 128]
fig, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for name, colour in (("labels", "tab:blue"), ("teacher", "tab:green")):
    label = f"{name}: closed form + 1/n"
    ax.plot(sizes, [b * closed[name] + 1 / BATCHES for b in sizes], color=colour, label=label)
measured = {b: measure_batches(b, BATCHES)[0] for b in sizes}
for name, colour in (("labels", "tab:blue"), ("teacher", "tab:green")):
    ax.plot(sizes, [measured[b].vector(name) for b in sizes], "o", color=colour, label=f"{name}: GradientSNR")
ax.axhline(1 / BATCHES, color="0.4", ls="--", lw=1, label=f"pure noise, 1/n with n = {BATCHES}")
ax.set(xscale="log", yscale="log", xlabel="batch size B (samples)", ylabel="GSNR, vector form (no unit)")
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.grid(alpha=0.3)
ax.legend(fontsize=8, loc="upper left")
plt.show()
worst = max(abs(measured[b].vector(n) / (b * closed[n] + 1 / BATCHES) - 1) for b in sizes for n in closed)
print(f"largest relative gap between measurement and closed form: {worst:.1%}")
print(f"at B = {BATCH} the teacher's gradient has {closed['teacher'] / closed['labels']:.1f} times the labels' GSNR")

# %% [markdown]
# Set `WRONG_LABELS` to 0 and run on: how much of the gap between the two lines remains?

# %% [markdown]
# ## 2. What momentum makes of a steady and of a noisy gradient
#
# With momentum m the update is `v ← m v + g`. In the steady state a constant gradient is multiplied by `1 / (1 − m)`;
# independent noise of standard deviation σ becomes `σ / √(1 − m²)`. So the variance GSNR of the update is that of the
# gradient times `(1 + m) / (1 − m)`. The price: the update answers late when the signal changes.
#
# `DecoupledSGD` gives every component a momentum of its own. Below, each of 4,000 parameters is one repetition of the
# same experiment, so means and spreads can be read off across them.

# %%
MOMENTA = (0.0, 0.5, 0.825, 0.9, 0.95, 0.975)
SIGNAL, NOISE = 1.0, 4.0
REPEATS, UPDATES, TURN = 4000, 400, 300  # the signal changes its sign at update TURN


def momentum_response(momentum):
    """Displacement per update and learning rate, (UPDATES, REPEATS), of each component and of their sum."""
    torch.manual_seed(1)
    found = {"steady": [], "noisy": [], "both": []}
    parts = {name: nn.Parameter(torch.zeros(REPEATS)) for name in found}
    momenta = dict.fromkeys(("steady", "noisy"), momentum)
    optimizers = {name: DecoupledSGD([p], lr=1.0, momenta=momenta) for name, p in parts.items()}
    for update in range(UPDATES):
        steady = torch.full((REPEATS,), SIGNAL if update < TURN else -SIGNAL)
        noisy = NOISE * torch.randn(REPEATS)
        for name, p in parts.items():
            before = p.detach().clone()
            given = {"steady": [steady if name != "noisy" else None], "noisy": [noisy if name != "steady" else None]}
            optimizers[name].step(components=given)
            found[name].append(before - p.detach())
    return {name: torch.stack(rows) for name, rows in found.items()}


responses = {m: momentum_response(m) for m in MOMENTA}

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
fine = torch.linspace(0, 0.98, 200)
left.plot(fine, 1 / (1 - fine), color="tab:green", label="signal: 1 / (1 − m)")
left.plot(fine, 1 / (1 - fine**2).sqrt(), color="tab:blue", label="noise: 1 / √(1 − m²)")
settled = TURN - 1
left.plot(MOMENTA, [responses[m]["steady"][settled].mean() / SIGNAL for m in MOMENTA], "o", color="tab:green")
left.plot(MOMENTA, [responses[m]["noisy"][settled].std() / NOISE for m in MOMENTA], "o", color="tab:blue")
left.set(xlabel="momentum m (no unit)", ylabel="multiplied by (no unit)", yscale="log")
left.set_title("Lines: closed form. Dots: DecoupledSGD", fontsize=9)
left.legend(fontsize=8, loc="upper left")
for m in (0.825, 0.9, 0.975):
    v = (1 - m) * responses[m]["both"][TURN - 60 :]
    time = torch.arange(TURN - 60, UPDATES)
    (line,) = right.plot(time, v.mean(1), label=f"m = {m}: mean of {REPEATS:,}")
    right.fill_between(time, v.mean(1) - v.std(1), v.mean(1) + v.std(1), color=line.get_color(), alpha=0.12, lw=0)
right.axvline(TURN, color="0.4", ls="--", lw=1, label="the signal turns")
right.set(xlabel="update", ylabel="update × (1 − m), in units of the signal")
right.set_title("Band: one standard deviation of a single repetition", fontsize=9)
right.legend(fontsize=8, loc="upper right")
for ax in (left, right):
    ax.grid(alpha=0.3)
plt.show()

rows = []
for m in MOMENTA:
    v = responses[m]["both"][settled]
    turned = (responses[m]["both"][TURN:].mean(1) < 0).nonzero()
    rows.append(
        {
            "momentum": f"{m}",
            "GSNR of the update": f"{v.mean() ** 2 / v.var():.3f}",
            "closed form": f"{(SIGNAL / NOISE) ** 2 * (1 + m) / (1 - m):.3f}",
            "step relative to m = 0": f"{v.mean() / SIGNAL:.1f}",
            "updates until it follows the turn": str(int(turned[0]) + 1) if len(turned) else f"more than {len(v)}",
        }
    )
output = Path(tempfile.mkdtemp(prefix="decoupled_gradients_"))
write_table(rows, output / "momentum.md", f"signal {SIGNAL:g}, noise {NOISE:g}")

# %% [markdown]
# Momentum averages noise away, makes the step larger, and delays it, all three at once. DeepKD gives a larger
# momentum to the task and the non-target component and a smaller one to the target component. That also changes how
# much each of them weighs in the step, which a comparison at equal learning rate should keep in mind:

# %%
DELTA = 0.075
for name, m in deepkd_momenta(base_momentum=0.9, delta=DELTA).items():
    print(f"{name:10s} momentum {m:.3f}: its steady gradient counts {1 / (1 - m):4.1f} times (plain SGD: 10.0)")

# %% [markdown]
# ## 3. The dynamic top-k mask
#
# The non-target part of the KL is taken over the k non-target classes that the teacher finds most likely. k starts
# small and grows until it holds all of them. Which classes stay hidden, and for how long, depends on the image.

# %%
K_START, K_OPT, PHASE_ENDS = 0.05, 0.5, (0.3, 0.6)
schedule = TopKSchedule(10, total_steps=1000, k_start=K_START, k_opt=K_OPT, phase_ends=PHASE_ENDS)

moments = [0, 150, 450, 800]
fig, axes = plt.subplots(1, len(moments), figsize=(12, 3.6), layout="constrained", sharey=True)
for ax, step in zip(axes, moments, strict=True):
    survives = topk_class_mask(soft, labels, schedule(step)).float()
    share = torch.stack([survives[labels == c].mean(0) for c in range(10)])
    share.fill_diagonal_(torch.nan)
    shown = ax.imshow(100 * share, vmin=0, vmax=100, cmap="viridis")
    ax.set_title(f"{step / 10:.0f}% of the run, k = {schedule(step)} ({schedule.phase(step)})", fontsize=9)
    ax.set(xlabel="non-target class (digit)", xticks=range(10), yticks=range(10))
axes[0].set_ylabel("class of the image (digit)")
fig.colorbar(shown, ax=axes, label="images in which the class survives (%)", shrink=0.9)
plt.show()

# %%
steps = torch.arange(0, 1001, 10)
torch.manual_seed(2)
start = student(x).detach()
ks, mass, loss = [], [], []
no_target = (soft / TEMPERATURE).scatter(1, labels[:, None], -torch.inf).softmax(1)
for step in steps.tolist():
    mask = topk_class_mask(soft, labels, schedule(step))
    ks.append(schedule(step))
    mass.append(100 * float((no_target * mask).sum(1).mean()))
    loss.append(float(decoupled_kl(start, soft, labels, temperature=TEMPERATURE, class_mask=mask)[1].mean()))
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.step(steps / 10, ks, where="post", color="0.2", label="k")
left.set(xlabel="share of the run (%)", ylabel="k: surviving classes", ylim=(0, 9.5))
twin = left.twinx()
twin.plot(steps / 10, mass, color="tab:green", label="teacher's non-target probability kept")
twin.set(ylabel="probability kept (%)", ylim=(0, 105))
both = [*left.lines, *twin.lines]
left.legend(both, [line.get_label() for line in both], fontsize=8, loc="lower right")
right.plot(steps / 10, loss, color="tab:green", label="fresh student")
right.set(xlabel="share of the run (%)", ylabel="masked NCKD (nats)")
right.legend(fontsize=8, loc="upper left")
for ax in (left, right):
    ax.grid(alpha=0.3)
plt.show()
print(f"first k: {ks[0]}; masked non-target loss there: {loss[0]:.4f} nats")

# %% [markdown]
# With ten classes the schedule starts at one class. One class, renormalised, is certain, so the non-target loss is
# exactly 0 until k reaches 2. With 100 classes, for which the mask was made, 5% is five classes. Try `K_START = 3`.

# %% [markdown]
# ## 4. KD against DeepKD on the digits
#
# `build` takes what the command line of `python -m vision_kd.fit` takes, `run` trains. The teacher, a resnet20, is
# trained by the first run and then read from the cache. The runs are short: enough to see the machinery, too short
# and too few to judge a method. The accuracy after the last epoch counts, not the best one.

# %%
EPOCHS = 5
TEACHER_EPOCHS = 8
SEEDS = (0, 1, 2)
LEARNING_RATE = 0.05
VARIANTS = {
    "KD": ["--config=methods/kd", "--config=policies/sgd", "--model.topk=null"],
    "KD + DeepKD": ["--config=methods/kd", "--config=policies/deepkd", "--model.topk=null"],
    "KD + DeepKD + mask": ["--config=methods/kd", "--config=policies/deepkd"],
}

results, folders, momenta = {}, {}, {}
for name, choice in VARIANTS.items():
    for seed in SEEDS:
        folder = output / f"{name.replace(' ', '')}_{seed}"
        cli = build(
            [
                *choice,
                f"--seed_everything={seed}",
                f"--run_dir={folder}",
                f"--trainer.max_epochs={EPOCHS}",
                f"--model.teacher.epochs={TEACHER_EPOCHS}",
                f"--model.learning_rate={LEARNING_RATE}",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
            ]
        )
        results[name, seed] = run(cli)
        folders[name, seed], momenta[name] = folder, cli.model.momenta
first = next(iter(results.values()))
print(f"teacher: {first.teacher['top1']:.1%}, {first.teacher['origin']}")

# %%
rows = []
for name in VARIANTS:
    runs = [results[name, seed] for seed in SEEDS]
    rows.append(
        {
            "variant": name,
            "top-1, last epoch (%)": mean_and_spread([100 * r.last["top1"] for r in runs]),
            "loss, last epoch (nats)": mean_and_spread([r.last["loss"] for r in runs], 3),
            "s per epoch": mean_and_spread([r.seconds_per_epoch for r in runs]),
        }
    )
write_table(rows, output / "digits.md", f"{EPOCHS} epochs, {len(SEEDS)} seeds")

fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for number, name in enumerate(VARIANTS):
    for seed in SEEDS:
        error = [100 * (1 - epoch["top1"]) for epoch in results[name, seed].history]
        ax.plot(range(1, EPOCHS + 1), error, ".-", color=f"C{number}", label=name if seed == SEEDS[0] else None)
ax.axhline(100 * (1 - first.teacher["top1"]), color="0.4", ls="--", lw=1, label="teacher")
ax.set(xlabel="epoch", ylabel="error on 500 validation digits (%)", xticks=range(1, EPOCHS + 1), yscale="log")
ax.set_yticks([3, 5, 10, 20, 50], [3, 5, 10, 20, 50])
ax.minorticks_off()
ax.set_title("One line per seed", fontsize=9)
ax.grid(alpha=0.3)
ax.legend(fontsize=8, loc="upper right")
plt.show()


# %%
def gap(name, other):
    """Difference of the last top-1 in points, seed by seed."""
    return [100 * (results[name, seed].last["top1"] - results[other, seed].last["top1"]) for seed in SEEDS]


kd_top1 = sum(results["KD", seed].last["top1"] for seed in SEEDS) / len(SEEDS)
error = 100 * (kd_top1 * (1 - kd_top1) / 500) ** 0.5
print(f"500 digits measure an accuracy of {kd_top1:.1%} with a standard error of {error:.1f} points.")
for name in ("KD + DeepKD", "KD + DeepKD + mask"):
    gaps = gap(name, "KD")
    mean = sum(gaps) / len(gaps)
    verdict = "cannot be told from KD" if abs(mean) < 2 * error else "wins here" if mean > 0 else "loses here"
    print(f"{name} minus KD, per seed: {', '.join(f'{g:+.1f}' for g in gaps)} points; mean {mean:+.1f}: it {verdict}.")

# %% [markdown]
# ### GSNR of the components
#
# The dashed line is what pure noise reads. If a component stays near it, its gradient says little per batch.

# %%
seed = SEEDS[0]
figure = plot_signal_to_noise({name: read_metrics(folders[name, seed]) for name in VARIANTS}, momenta)
display(figure)

# %% [markdown]
# ## What to take home
#
# * A GSNR depends on the batch size and carries a bias of 1/n. Without both numbers it cannot be compared.
# * A large momentum filters noise, but it also enlarges the step and delays it. On short runs the delay is felt.
# * In the project's longer comparison ([docs/results_vision.md](../docs/results_vision.md)) DeepKD's momenta alone
#   did not beat plain KD. Whether they do on your data is a question for several seeds and a learning rate tuned per
#   policy.
