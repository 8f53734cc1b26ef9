"""Cost of a detector's distillation step against its floor: ``uv run python benchmarks/detection_step.py``.

All variants run in turns in one process on the same batch; the table gives medians and ratios to the floor, which no
implementation can avoid: the teacher's backbone and ROI head, one forward pass of the student, and G backward passes,
G = number of distinct momenta. The line "ROI head twice" runs the student's ROI head a second time for the
distillation, as published detectron2 code does. Peak memory is that of one step in a process of its own, above what
was in use before it.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from kd_common.run.errors import run_command
from vision_kd.detection import Detector, build_detector, detection_step
from vision_kd.detection.review import ReviewFusion
from vision_kd.methods import Method
from vision_kd.methods.dkd import DKD
from vision_kd.methods.vanilla import Vanilla
from vision_kd.models import ModelSpec
from vision_kd.policies import SGD, DeepKD, GradientPolicy

Step = Callable[[], object]
CLASSES = [f"class {number}" for number in range(1, 81)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--teacher", default="fasterrcnn_resnet50_fpn")
    parser.add_argument("--student", default="fasterrcnn_resnet18_fpn")
    parser.add_argument("--image-size", type=int, nargs=2, default=(256, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


class Setting:
    """Networks and a batch of random images with three boxes each."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(args.threads)
        self.device = torch.device(args.device)
        self.names = (args.teacher, args.student)
        self.teacher = self.network(args.teacher).eval().requires_grad_(False)
        height, width = args.image_size
        self.images = [torch.rand(3, height, width, device=self.device) for _ in range(args.batch_size)]
        boxes = torch.tensor([[10.0, 10, 60, 90], [80, 40, 200, 160], [100, 30, 130, 70]], device=self.device)
        labels = torch.tensor([1, 20, 80], device=self.device)
        self.targets = [{"boxes": boxes, "labels": labels, "seed": number} for number in range(args.batch_size)]

    def network(self, name: str) -> Detector:
        """A detector of 80 classes with random weights."""
        data_spec = {"class_names": CLASSES, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        return build_detector(ModelSpec(name), **data_spec).to(self.device)

    def ours(self, method: Method, policy: GradientPolicy, *, k: int | None = None, features: bool = False) -> Step:
        """The step of `vision_kd`, without the trainer around it."""
        student = self.network(self.names[1]).train()
        fusion = ReviewFusion(5, 256, 256, 256).to(self.device) if features else None
        components = (*method.components, "feature") if features else method.components
        trained = torch.nn.ModuleList([student, *([fusion] if fusion else [])])
        optimizer = policy.optimizer(trained, components, lr=1e-4, momentum=0.9, weight_decay=1e-4)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        teacher = self.teacher if method.needs_teacher else None
        class_indices = self.teacher.class_indices(CLASSES)

        def step() -> None:
            settings = {"class_indices": class_indices, "buckets": optimizer.buckets, "k": k}
            settings |= {"fusion": fusion, "feature_weight": 1.0}
            made = detection_step(student, teacher, method, self.images, self.targets, params, **settings)
            optimizer.step(components=made.gradients)

        return step

    def floor(self, passes: int, *, with_teacher: bool = True, roi_twice: bool = False) -> Step:
        """The passes through the networks alone: no distillation loss, no optimizer."""
        student = self.network(self.names[1]).train()
        params = list(student.parameters())

        def step() -> None:
            theirs: dict[str, Tensor] = {}
            if with_teacher:
                with torch.no_grad():
                    theirs = self.teacher.features(self.teacher.batch(self.images))
            own = student.training_pass(self.images, self.targets)
            outputs: Sequence[Tensor] = [own.class_logits, own.box_loss, *own.rpn_losses.values()]
            if roi_twice:
                outputs = [student.classify(own.features, own.proposals, own.image_sizes), *outputs]
            if with_teacher:
                with torch.no_grad():
                    self.teacher.classify(theirs, own.proposals, own.image_sizes)
            # As in the step, all passes but one start from the class logits alone.
            for number in range(passes):
                wanted = outputs if number == 0 else outputs[:1]
                torch.autograd.grad(
                    wanted,
                    params,
                    [torch.ones_like(output) for output in wanted],
                    retain_graph=number < passes - 1,
                    allow_unused=True,
                )

        return step


def variants(setting: Setting) -> dict[str, tuple[str, Callable[[], Step]]]:
    """Floor and maker of every variant; made one at a time, so that memory can be measured alone."""
    dkd = DKD(temperature=1.0, beta=0.25, warmup_epochs=0.0)
    return {
        "floor, student alone": ("", lambda: setting.floor(1, with_teacher=False)),
        "floor, G = 1": ("", lambda: setting.floor(1)),
        "floor, G = 2": ("", lambda: setting.floor(2)),
        "ROI head twice, G = 1": ("floor, G = 1", lambda: setting.floor(1, roi_twice=True)),
        "student alone": ("floor, student alone", lambda: setting.ours(Vanilla(), SGD())),
        "DKD, SGD": ("floor, G = 1", lambda: setting.ours(dkd, SGD())),
        "DKD, DeepKD": ("floor, G = 2", lambda: setting.ours(dkd, DeepKD())),
        "DKD, DeepKD, mask": ("floor, G = 2", lambda: setting.ours(dkd, DeepKD(), k=40)),
        "DKD, DeepKD, mask, features": ("floor, G = 2", lambda: setting.ours(dkd, DeepKD(), k=40, features=True)),
    }


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """MiB that one step of a variant needs above what the process held before it, alone in its process.

    On CPU that is the first step, new optimizer buffers included; on CUDA the second, after the libraries' workspace.
    """
    setting = Setting(args)
    step = variants(setting)[name][1]()
    if setting.device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def clock(device: torch.device) -> float:
    """Time after all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    args = parse()
    context = multiprocessing.get_context("spawn")
    memory = {}
    setting = Setting(args)
    chosen = variants(setting)
    for name in chosen:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            memory[name] = pool.submit(peak_memory, args, name).result()
    steps = {name: make() for name, (_, make) in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            start = clock(setting.device)
            step()
            if round_ >= 1:  # warm-up
                times[name].append(1e3 * (clock(setting.device) - start))
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{args.teacher} -> {args.student}, batch {args.batch_size}, {args.image_size[0]}x{args.image_size[1]}, "
        f"{setting.device}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds"
    )
    print(f"\n{'step':<30}{'median ms':>10}{'IQR':>16}{'x floor':>9}{'peak MiB':>10}")
    for name, (floor, _) in chosen.items():
        low, _, high = statistics.quantiles(times[name], n=4)
        ratio = f"{median[name] / median[floor]:.3f}" if floor else ""
        print(f"{name:<30}{median[name]:>10.1f}{f'{low:.0f}-{high:.0f}':>16}{ratio:>9}{memory[name]:>10.0f}")


if __name__ == "__main__":
    run_command(main)
