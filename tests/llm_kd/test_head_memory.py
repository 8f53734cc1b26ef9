"""The head's memory depends on the chunk: largest tensor, live bytes, default chunk; and its benchmark runs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_common.registry import subclasses
from kd_common.run.memory import LiveBytes
from llm_kd.head import KDHead, LMHead, TeacherHiddenStates, truncate
from llm_kd.head.kd_head import BYTES_PER_LOGIT
from llm_kd.head.linear import rows_per_chunk
from llm_kd.objectives import Objective
from llm_kd.selection import Selector

OBJECTIVES = subclasses(Objective)
SELECTORS = subclasses(Selector)

H, V = 6, 64


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parents[2] / "benchmarks/kd_head.py"
    spec = importlib.util.spec_from_file_location("kd_head_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(rows):
    """Student hidden states and head weight, teacher hidden states and head weight."""
    student = [torch.randn(n, H, requires_grad=True) for n in (rows, V)]
    return [*student, *(torch.randn(n, H) for n in (rows, V))]


def run(objective, selector, chunk_size, inputs):
    hidden, weight, teacher_hidden, teacher_weight = inputs
    head = KDHead(OBJECTIVES[objective](), SELECTORS[selector](), chunk_size=chunk_size)
    head(hidden, LMHead(weight), TeacherHiddenStates(teacher_hidden, LMHead(teacher_weight))).loss.backward()


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation returns, views of the inputs left out."""

    def __init__(self, ignore):
        super().__init__()
        self.ignore = {tensor.untyped_storage().data_ptr() for tensor in ignore}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.ignore:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("objective", ["ReverseKL", "AlphaBeta", "TAID"])
def test_largest_tensor_is_a_chunk(objective, selector):
    chunk = 8
    for rows in (16, 40):
        inputs = tensors(rows)
        inputs[1].requires_grad_(False)  # else the head's gradient, (V, H), may be the largest
        with LargestTensor(ignore=inputs) as record:
            run(objective, selector, chunk, inputs)
        assert V * 3 <= record.largest <= V * chunk  # entropy_top_p keeps 3 of 16 rows, all logits are V * rows


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_live_memory_is_a_few_chunks(objective, selector):
    chunk = 16  # entropy_top_p keeps more than a chunk of either batch
    extra = {}
    for rows in (96, 160):
        inputs = tensors(rows)
        with LiveBytes(inputs) as record:
            run(objective, selector, chunk, inputs)
        extra[rows] = record.peak - 4 * (V + rows) * H
    per_row = 64  # a few numbers per token; its logits would be 256 bytes
    assert extra[96] <= BYTES_PER_LOGIT * V * chunk + per_row * 96
    assert extra[160] - extra[96] <= per_row * 64


@pytest.mark.parametrize("size", [4, 40, V])
def test_stored_teachers_take_no_more(size):
    chunk, extra = 16, {}
    for rows in (96, 160):
        hidden, weight, *teacher = tensors(rows)
        stored = truncate(TeacherHiddenStates(teacher[0], LMHead(teacher[1])), size, V)
        head = KDHead(OBJECTIVES["ReverseKL"](), SELECTORS["TopK"](k=2), chunk_size=chunk)
        ignore = [hidden, weight, stored.log_probs, stored.indices, stored.tail_mass]
        with LiveBytes(ignore) as record:
            head(hidden, LMHead(weight), stored).loss.backward()
        extra[rows] = record.peak - 4 * (V + rows) * H
    assert extra[96] <= (BYTES_PER_LOGIT * V + 16 * size) * chunk + 64 * 96
    assert extra[160] - extra[96] <= 64 * 64


def test_default_chunk_shrinks_with_the_vocabulary():
    class Stub:
        hidden = torch.empty(1)

        def __init__(self, vocab):
            self.weight = torch.empty(vocab, 1, device="meta")

    vocabularies = (49_152, 151_936)
    sizes = [rows_per_chunk(Stub(vocab), BYTES_PER_LOGIT) for vocab in vocabularies]
    assert all(size * vocab * BYTES_PER_LOGIT <= 2**26 for size, vocab in zip(sizes, vocabularies, strict=True))
    assert sizes[0] > sizes[1] > 16
    assert rows_per_chunk(Stub(10**9), BYTES_PER_LOGIT) == 1


def test_benchmark_runs(benchmark, monkeypatch, capsys, tmp_path):
    sizes = ["--vocab", "32", "--tokens", "8", "--hidden", "4", "--teacher-hidden", "4", "--rounds", "2"]
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["kd_head", *sizes, "--threads", "1", "--peers", "--out", str(out)])
    benchmark.main()
    printed, rows = capsys.readouterr().out, out.read_text()
    assert len(printed.splitlines()) == 2 + 9 * 2 + 6  # head and dense, and a stored teacher for none and topk
    out.write_text("".join(rows.splitlines(keepends=True)[:4]))
    benchmark.main()  # measures the other five
    assert out.read_text().splitlines()[:4] == rows.splitlines()[:4]
    assert len(out.read_text().splitlines()) == 9
    monkeypatch.setattr(benchmark.Case, "random", None)
    benchmark.main()  # measures nothing
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(printed.splitlines())


def test_benchmark_names_missing_peers(benchmark, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert benchmark.available(["liger", "trl"]) == []
    assert capsys.readouterr().out.count("is left out") == 2
