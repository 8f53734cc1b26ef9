"""Cost of a DeepKD step against its floor: ``uv run python benchmarks/deepkd_step.py``.

All variants run interleaved in one process on the same batch; the table gives medians over the rounds and ratios to
the floor, which is what no implementation of the method can avoid: teacher forward + student forward + G backward
passes, G = number of distinct momenta. The floor runs as one sequence, with no loss and no optimizer. Its parts are
also timed alone, where tensors stay in the cache and memory is not allocated anew, so their sum is below it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kd_common.functional import decoupled_kl, topk_class_mask
from kd_common.run.errors import run_command
from vision_kd.methods import Method
from vision_kd.methods.kd import KD
from vision_kd.models import ModelSpec, build_classifier
from vision_kd.policies import SGD, DeepKD, GradientPolicy
from vision_kd.training.step import distillation_step

LR, MOMENTUM, DECAY, T = 0.05, 0.9, 5e-4, 4.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks (CUDA graphs on a GPU)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def clock(device: torch.device) -> float:
    """Time after all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def count_flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def floor_step(student: nn.Module, teacher: nn.Module, images: Tensor, passes: int) -> Callable[[], None]:
    """The passes through the networks alone."""
    params = list(student.parameters())
    with torch.no_grad():
        upstream = torch.rand_like(teacher(images))

    def step() -> None:
        with torch.no_grad():
            teacher(images)
        logits = student(images)
        for i in range(passes):
            torch.autograd.grad(logits, params, upstream, retain_graph=i < passes - 1)

    return step


def naive_step(student: nn.Module, teacher: nn.Module, images: Tensor, target: Tensor) -> Callable[[], None]:
    """What one writes first: three losses, three full backward passes, a Python loop per parameter."""
    params = list(student.parameters())
    momenta = {"task": 0.975, "target": 0.825, "nontarget": 0.975}
    buffers = {name: [torch.zeros_like(p) for p in params] for name in momenta}

    def step() -> None:
        with torch.no_grad():
            teacher_logits = teacher(images)
        logits = student(images)
        tckd, nckd = decoupled_kl(logits, teacher_logits, target, temperature=T)
        rest = 1 - torch.softmax(teacher_logits / T, -1).gather(-1, target[:, None])[:, 0]
        losses = {
            "task": 0.1 * F.cross_entropy(logits, target),
            "target": 0.9 * T * T * tckd.mean(),
            "nontarget": 0.9 * T * T * (rest * nckd).mean(),
        }
        for name, loss in losses.items():
            for p in params:
                p.grad = None
            loss.backward(retain_graph=True)
            for p, buffer in zip(params, buffers[name], strict=True):
                grad = p.grad + DECAY * p.detach() if name == "target" else p.grad
                buffer.mul_(momenta[name]).add_(grad)
        with torch.no_grad():
            for i, p in enumerate(params):
                for name in momenta:
                    p -= LR * buffers[name][i]

    return step


def our_step(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    target: Tensor,
    policy: GradientPolicy,
    k: int | None,
    method: Method | None = None,
) -> Callable[[], None]:
    """The step of `vision_kd`, without the trainer around it."""
    method = method or KD()
    optimizer = policy.optimizer(student, method.components, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        out = distillation_step(
            student, teacher, method, {"weak": images}, target, params, buckets=optimizer.buckets, k=k
        )
        optimizer.step(components=out.gradients)

    return step


def optimizer_alone(student: nn.Module, policy: GradientPolicy) -> Callable[[], None]:
    """The optimizer's share: a step on ready gradients."""
    optimizer = policy.optimizer(student, KD.components, lr=0.0, momentum=MOMENTUM, weight_decay=DECAY)
    grads = {
        bucket: [torch.zeros_like(p) for group in optimizer.param_groups for p in group["params"]]
        for bucket, members in optimizer.buckets.items()
        if set(members) - {"weight_decay"}
    }
    return lambda: optimizer.step(components=grads)


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = {"num_classes": args.classes, "mean": (0.5,) * 3, "std": (0.25,) * 3}

    def network(name: str) -> nn.Module:
        net = build_classifier(ModelSpec(name), **shape).to(device)
        if args.compile:
            net.compile(mode="reduce-overhead" if device.type == "cuda" else "default")
        return net

    teacher = network(args.teacher).eval().requires_grad_(False)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    target = torch.randint(args.classes, (args.batch_size,), device=device)
    k = args.classes // 2

    probe = network(args.student)
    logits = probe(images)
    probe_params, upstream = list(probe.parameters()), torch.rand_like(logits)
    plain = network(args.student)
    for p in plain.parameters():
        p.grad = torch.zeros_like(p)
    three = DeepKD(delta={"task": 0.075, "target": 0.075, "nontarget": 0.05})
    parts: dict[str, Callable[[], object]] = {
        "teacher forward": torch.no_grad()(lambda: teacher(images)),
        "student forward": lambda: probe(images),
        "one backward": lambda: torch.autograd.grad(logits, probe_params, upstream, retain_graph=True),
        "optimizer, 2 momenta": optimizer_alone(network(args.student), DeepKD()),
        "optimizer, torch SGD": torch.optim.SGD(plain.parameters(), LR, MOMENTUM, weight_decay=DECAY).step,
        "top-k mask": lambda: topk_class_mask(upstream, target, k),
    }
    variants: dict[str, tuple[int, Callable[[], None]]] = {
        "KD, plain SGD": (1, our_step(network(args.student), teacher, images, target, SGD(), None)),
        "DeepKD, 2 momenta (paper)": (2, our_step(network(args.student), teacher, images, target, DeepKD(), None)),
        "DeepKD, 2 momenta + mask": (2, our_step(network(args.student), teacher, images, target, DeepKD(), k)),
        "DeepKD, 3 momenta": (3, our_step(network(args.student), teacher, images, target, three, None)),
        "three-backward version": (3, naive_step(network(args.student), teacher, images, target)),
    }
    flops = {name: count_flops(parts[name]) for name in ("teacher forward", "student forward", "one backward")}

    floors = {passes: floor_step(network(args.student), teacher, images, passes) for passes in (1, 2, 3)}
    calls = {
        **parts,
        **{f"floor {passes}": step for passes, step in floors.items()},
        **{name: step for name, (_, step) in variants.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(args.rounds + 3):
        for name, call in calls.items():
            start = clock(device)
            call()
            if round_ >= 3:  # warm-up
                times[name].append(1e3 * (clock(device) - start))
    median = {name: statistics.median(values) for name, values in times.items()}

    print(
        f"{args.teacher} -> {args.student}, batch {args.batch_size}, {args.image_size}x{args.image_size}, "
        f"{args.classes} classes, {device}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds"
        f"{', compiled' if args.compile else ''}"
    )
    print(f"\n{'part':<28}{'median ms':>10}{'IQR':>14}{'GFLOP':>8}")
    for name in parts:
        low, _, high = statistics.quantiles(times[name], n=4)
        work = f"{flops[name] / 1e9:8.2f}" if name in flops else ""
        print(f"{name:<28}{median[name]:>10.3f}{f'{low:.2f}-{high:.2f}':>14}{work}")
    print(
        f"\n{'step':<28}{'median ms':>10}{'IQR':>14}{'floor ms':>10}{'x floor':>9}{'x plain KD':>12}{'floor GFLOP':>13}"
    )
    rows = {}
    for name, (passes, _) in variants.items():
        floor = median[f"floor {passes}"]
        work = (flops["teacher forward"] + flops["student forward"] + passes * flops["one backward"]) / 1e9
        low, _, high = statistics.quantiles(times[name], n=4)
        ratio = median[name] / median["KD, plain SGD"]
        rows[name] = {
            "ms": median[name],
            "floor_ms": floor,
            "backward_passes": passes,
            "over_floor": median[name] / floor,
        }
        print(
            f"{name:<28}{median[name]:>10.2f}{f'{low:.1f}-{high:.1f}':>14}{floor:>10.2f}"
            f"{median[name] / floor:>9.3f}{ratio:>12.2f}{work:>13.2f}"
        )
    step_ms = median["DeepKD, 2 momenta + mask"]
    extra = median["optimizer, 2 momenta"] + median["top-k mask"]
    print(f"\noptimizer and mask: {extra:.3f} ms, {extra / step_ms:.2%} of the DeepKD step with mask")
    if args.json:
        args.json.write_text(
            json.dumps({"settings": vars(args), "parts": median, "steps": rows}, default=str, indent=1)
        )


if __name__ == "__main__":
    run_command(main)
