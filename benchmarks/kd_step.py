"""Where the time of a distillation step goes: ``uv run python benchmarks/kd_step.py``.

Teacher and student are random models of SmolLM2-135M's shape, 30 and 10 layers (--layers), on random tokens. A step is
teacher forward, student forward, distillation head (with its share of the backward) and the student's backward; the
optimizer is left out. ``selection`` is the time of the selector's scores, a part of the head's; the second projections
of a selector that compares tokens with each other (adakd, entropy_top_p) count as the head's. Medians over the rounds.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_common.registry import subclasses
from kd_common.run.errors import run_command
from llm_kd.head import KDHead, TeacherHiddenStates
from llm_kd.models import Backbone
from llm_kd.objectives import Objective
from llm_kd.selection import Selector

OBJECTIVES = subclasses(Objective)
SELECTORS = subclasses(Selector)

VOCAB, HIDDEN = 49_152, 576


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[30, 10], help="of teacher and student")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--objective", default="ReverseKL", choices=OBJECTIVES)
    parser.add_argument("--selectors", nargs="+", default=["TopK", "SpecK", "AdaKD"], choices=SELECTORS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def random_model(layers: int) -> Backbone:
    """A model of SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return Backbone(LlamaForCausalLM(config))


@torch.no_grad()
def selection_seconds(head: KDHead, student: TeacherHiddenStates, teacher: TeacherHiddenStates) -> float:
    """Time of the selector's scores of all rows, in blocks of 64 rows that are projected beforehand."""
    seconds = 0.0
    for rows in torch.arange(len(student)).split(64):
        z, z_teacher = (signal.hidden[rows] @ signal.head.weight.T for signal in (student, teacher))
        start = time.perf_counter()
        head._score(z, z_teacher)
        seconds += time.perf_counter() - start
    return seconds


def step(teacher: Backbone, student: Backbone, head: KDHead, tokens: torch.Tensor) -> dict[str, float]:
    """Seconds of the parts of one step."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    times = [time.perf_counter()]

    def lap() -> None:
        times.append(time.perf_counter())

    with torch.no_grad():
        teacher_hidden = teacher(tokens, positions).flatten(0, 1)
    lap()
    hidden = student(tokens, positions).flatten(0, 1)
    lap()
    online = TeacherHiddenStates(teacher_hidden, teacher.lm_head())
    loss = head(hidden, student.lm_head(), online).loss
    lap()
    loss.backward()
    lap()
    student.zero_grad()
    parts = dict(zip(["teacher", "student", "head", "backward"], torch.tensor(times).diff().tolist(), strict=True))
    parts["step"] = times[-1] - times[0]
    return parts | {
        "selection": selection_seconds(head, TeacherHiddenStates(hidden.detach(), student.lm_head()), online)
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    teacher, student = (random_model(layers) for layers in args.layers)
    student.train()
    tokens = torch.randint(0, VOCAB, (args.batch_size, args.length))
    print(f"{tokens.numel()} tokens, {args.objective}, layers {args.layers}, {args.threads} threads")
    print(f"{'selector':<15}{'step ms':>10}" + "".join(f"{n:>12}" for n in ("teacher", "student", "head", "backward")))
    for name in args.selectors:
        head = KDHead(OBJECTIVES[args.objective](), SELECTORS[name]())
        rounds = [step(teacher, student, head, tokens) for _ in range(args.rounds + 1)][1:]  # the first warms up
        parts = {part: statistics.median(round_[part] for round_ in rounds) for part in rounds[0]}
        shares = "".join(f"{parts[part] / parts['step']:>12.1%}" for part in ("teacher", "student", "head", "backward"))
        of_step, of_head = (parts["selection"] / parts[whole] for whole in ("step", "head"))
        selection = f"selection {of_step:.2%} of the step, {of_head:.2%} of the head"
        print(f"{name:<15}{1e3 * parts['step']:>10.0f}{shares}   {selection}")


if __name__ == "__main__":
    run_command(main)
