"""Damaged files, drawn from a seed and counted: each one is refused by name, or loads as if it were whole.

Every loader gets an empty file, garbage, files cut at several places, and single flipped bits. What no format notices
(a digit of a JSON file, a weight in somebody else's format) is counted as unnoticed, and allowed only where said so.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kd_common.files import CHECKSUM, checksummed_line, read_checksummed_line
from kd_common.hub.language_models import load_causal_lm, load_config, load_tokenizer
from kd_common.run.checkpoints import check_resumable
from kd_common.run.compare import ComparedRun, run_matrix
from kd_common.run.report import read_config as read_run_config
from kd_common.run.report import read_metrics
from kd_common.run.settings_text import check_config_files
from kd_common.text import AnswerCache
from llm_kd.data import read_rows
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher import CacheHeader, CacheWriter, TeacherCache
from spec_decode.benchmark import checksum, read_results
from spec_decode.data.corpus import corpus, encode_prompts, write_corpus
from spec_decode.data.features import DATA, PROGRESS, FeatureStore
from spec_decode.data.prompts import read_prompts
from spec_decode.decoding.sampling import Sampling
from spec_decode.drafters import FastEagle, load_drafter, save_drafter
from spec_decode.drafters.files import CONFIG, WEIGHTS
from spec_decode.models import CausalLM
from vision_kd.data.fashion_mnist import read_idx
from vision_kd.data.image_folder import read_rgb
from vision_kd.detection.coco import read_split
from vision_kd.models import ModelSpec, build_classifier, load_classifier, save_student

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")]
DATA_SPEC = {"num_classes": 4, "in_channels": 1, "mean": (0.4,), "std": (0.3,)}
FLIPS = 30


class Case(NamedTuple):
    """A file and what reads it; ``flips`` says whether a flipped bit may go unnoticed."""

    path: Path
    load: Callable[[], Any]
    flips: bool = False


def student():
    return build_classifier(ModelSpec("resnet8"), **DATA_SPEC)


def student_file(tmp_path, target):
    path = tmp_path / "student.pt"
    save_student(path, student(), ModelSpec("resnet8"), extra={"top1": 0.5})
    return Case(path, lambda: load_classifier(path).state_dict())


def teacher_safetensors(tmp_path, target):
    path = tmp_path / "teacher.safetensors"
    save_file({name: value.contiguous() for name, value in student().network.state_dict().items()}, path)
    return Case(
        path, lambda: build_classifier(ModelSpec("resnet8", checkpoint=str(path)), **DATA_SPEC).state_dict(), True
    )


def teacher_of_old_torch(tmp_path, target):
    path = tmp_path / "teacher.pth"
    torch.save(student().network.state_dict(), path, _use_new_zipfile_serialization=False)
    return Case(
        path, lambda: build_classifier(ModelSpec("resnet8", checkpoint=str(path)), **DATA_SPEC).state_dict(), True
    )


def checkpoint(tmp_path, target):
    path = tmp_path / "last.ckpt"
    weights = {"w": torch.randn(40, 40)}
    torch.save({"state_dict": weights, "optimizer_states": [{"state": {0: torch.randn(90)}}], "loops": {}}, path)
    return Case(path, lambda: check_resumable(path))


def configuration(tmp_path, target):
    path = tmp_path / "config.yaml"
    path.write_text(
        "seed_everything: 3\nmodel:\n  init_args:\n    k: 4\ntrainer:\n  max_epochs: 4\ndata:\n  batch_size: 32\n"
    )

    def load():
        check_config_files([f"--config={path}"])
        return read_run_config(tmp_path)

    return Case(path, load, True)


def metrics(tmp_path, target):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss\n0,1,0.53\n0,2,0.4\n1,3,\n1,4,0.21\n")
    return Case(path, lambda: read_metrics(tmp_path), True)


class Run(ComparedRun):
    headline = "done"

    @classmethod
    def train(cls, args, **place):
        return cls(args=args, history=[{"top1": 0.5}], parameters={}, **place)


def comparison(tmp_path, target):
    path = tmp_path / "results.json"

    def load():
        variants = {"a": [], "b": []}
        return run_matrix(ComparedRun, base=[], variants=variants, output=tmp_path, seeds=[0])

    run_matrix(Run, base=[], variants={"a": [], "b": []}, output=tmp_path, seeds=[0])
    return Case(path, load, True)


def benchmark_results(tmp_path, target):
    path = tmp_path / "results.json"
    rows = [{"set": "own", "temperature": 0.0, "drafter": "x", "tokens_per_second": 3.5}]
    path.write_text(json.dumps({"key": "0123456789abcdef", "rows": rows, "crc32": checksum(rows)}))
    return Case(path, lambda: read_results(path), True)


def model_file(name):
    def make(tmp_path, target):
        for path in target.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())

        def load():
            model, tokenizer = load_causal_lm(str(tmp_path)), load_tokenizer(str(tmp_path))
            tokens = encode_prompts(tokenizer, ["Hi you"], longest=10**6)
            configs = load_config(str(tmp_path)).to_dict(), model.generation_config.to_dict()
            return model.state_dict(), configs, tokens, tokenizer.eos_token_id

        return Case(tmp_path / name, load, True)

    return make


def manifest(tmp_path, target):
    folder = tmp_path / "cache"
    with CacheWriter(folder, CacheHeader("model", "w" * 64, "t" * 64, 300, 4, "float16")) as writer:
        for key in ("a" * 64, "b" * 64):
            writer.add([key], [3], torch.arange(3), TruncatedDistribution.from_logits(torch.randn(3, 300), 4))

    def load():
        cache = TeacherCache(folder)
        stored = cache.read(list(cache.keys()))
        return cache.complete, cache.num_tokens, stored.tokens, stored.distribution.log_probs

    return Case(folder / "manifest.json", load)


def response_file(tmp_path, target):
    cache = AnswerCache(tmp_path, "model", {"seed": 0}, [[1], [2, 3], [4]], batch_size=2)
    cache.write(lambda asked, start: [[prompt[0], 7] for prompt in asked], "answers", progress=False)
    return Case(cache.path, cache.read)


def rows_jsonl(tmp_path, target):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Count to {n}.", "output": "1 2"}) + "\n" for n in range(5)))
    return Case(path, lambda: [repr(row) for row in read_rows(path)], True)


def rows_parquet(tmp_path, target):
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": [f"Count to {n}." for n in range(40)]}), path)
    return Case(path, lambda: [repr(row) for row in read_rows(path)], True)


def prompts(tmp_path, target):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(5)))
    return Case(path, lambda: read_prompts(path), True)


def drafter_file(name):
    def make(tmp_path, target):
        runner = CausalLM.from_transformers(load_causal_lm(str(target)))
        save_drafter(FastEagle(depth=1).bind(runner), tmp_path, {"target": str(target)})

        def load():
            drafter = load_drafter(tmp_path, runner)
            return drafter.state_dict(), drafter.acceptance

        return Case(tmp_path / name, load, name == CONFIG)

    return make


def target_text(tmp_path, target):
    runner = CausalLM.from_transformers(load_causal_lm(str(target)))
    sampling, asked = Sampling(0.0, max_new_tokens=4), [[5, 7, 9], [1, 2], [3, 8, 3, 8], [11]]
    cache = corpus(tmp_path, runner, asked, sampling, stops=(257,), seed=0, batch_size=2)

    def load():
        written = write_corpus(cache, runner, sampling, stops=(257,), seed=0, progress=False)
        return [vars(sample) for sample in written]

    load()
    return Case(cache.path, load)


def feature_file(name):
    def make(tmp_path, target):
        runner, folder = CausalLM.from_transformers(load_causal_lm(str(target))), tmp_path / "text-0123"
        texts = [[5, 7, 9], [1, 2], [3, 8, 3, 8]]
        FeatureStore(folder, texts, 32).write(runner, batch_size=2, progress=False)

        def load():  # states that are missing are computed again
            store = FeatureStore(folder, texts, 32)
            store.write(runner, batch_size=2, progress=False)
            return [store.read(n) for n in range(3)]

        return Case(folder / name, load)

    return make


def annotations(tmp_path, target):
    path = tmp_path / "instances.json"
    Image.new("RGB", (32, 24)).save(tmp_path / "a.jpg")
    box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1.0, 2.0, 5.0, 6.0], "iscrowd": 0, "area": 30.0}
    images = [{"id": 7, "width": 32, "height": 24, "file_name": "a.jpg"}]
    path.write_text(json.dumps({"images": images, "annotations": [box], "categories": [{"id": 3, "name": "cat"}]}))

    def load():
        split = read_split(path, tmp_path, train=False)
        return (
            split.image_ids,
            split.files,
            split.sizes,
            split.boxes,
            split.labels,
            split.category_ids,
            split.class_names,
        )

    return Case(path, load, True)


def idx(tmp_path, target):
    path = tmp_path / "labels-idx1-ubyte"
    path.write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x28" + bytes(range(40)))
    return Case(path, lambda: read_idx(path), True)


def image(tmp_path, target):
    path = tmp_path / "image.png"
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(path)
    return Case(path, lambda: read_rgb(path), True)


CASES = {
    "student": student_file,
    "safetensors": teacher_safetensors,
    "old torch.save": teacher_of_old_torch,
    "training checkpoint": checkpoint,
    "config.yaml": configuration,
    "metrics.csv": metrics,
    "compare results": comparison,
    "benchmark results": benchmark_results,
    "model config.json": model_file("config.json"),
    "model generation_config.json": model_file("generation_config.json"),
    "model weights": model_file("model.safetensors"),
    "tokenizer.json": model_file("tokenizer.json"),
    "tokenizer_config.json": model_file("tokenizer_config.json"),
    "chat template": model_file("chat_template.jinja"),
    "teacher cache manifest": manifest,
    "responses": response_file,
    "rows.jsonl": rows_jsonl,
    "rows.parquet": rows_parquet,
    "prompts.jsonl": prompts,
    "drafter.json": drafter_file(CONFIG),
    "drafter weights": drafter_file(WEIGHTS),
    "corpus": target_text,
    "features": feature_file(DATA),
    "progress of features": feature_file(PROGRESS),
    "COCO annotations": annotations,
    "idx": idx,
    "image": image,
}


def damages(content, draws):
    """Name and content of damaged versions of a file."""
    yield "empty", b""
    for share in (0.03, 0.3, 0.6, 0.95):
        yield f"cut at {share:.0%}", content[: int(share * len(content))]
    yield "one byte short", content[:-1]
    yield "garbage", draws.randbytes(min(len(content), 3000))
    yield "zeros", bytes(len(content))
    yield "text", b"<html>not found</html>\n"
    yield "another object", b'{"a": 1}\n'
    yield "a list", b"[1]\n"
    yield "a number", b"7\n"
    yield "no UTF-8", b"\xff\xfe" + content
    yield "nested too deeply", b"[" * 100_000
    for _ in range(FLIPS):
        damaged = bytearray(content)
        place = draws.randrange(len(content))
        damaged[place] ^= 1 << draws.randrange(8)
        yield f"bit of byte {place}", bytes(damaged)


def plain(value):
    """Nested tensors and arrays as something that compares by content."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return value


def what_happens(case, expected):
    """``refused`` by name, ``harmless`` if nothing changed, ``unnoticed`` if it did; ``bare`` for other errors."""
    try:
        found = case.load()
    except (ValueError, OSError, RuntimeError) as error:
        named = case.path.name in str(error) or str(case.path.parent) in str(error)
        return ("refused", "") if named else ("bare", repr(error))
    except Exception as error:
        return "bare", repr(error)
    return ("harmless" if plain(found) == expected else "unnoticed"), ""


@pytest.mark.parametrize("name", CASES)
def test_damage_is_refused_by_name_or_changes_nothing(name, tmp_path, target, record_property):
    case, draws = CASES[name](tmp_path, target), random.Random(name)
    content, expected = case.path.read_bytes(), plain(case.load())
    assert case.path.read_bytes() == content
    siblings = {path: path.read_bytes() for path in case.path.parent.iterdir() if path.is_file()}
    counts, bare, silent = Counter(), [], []
    for damage, damaged in damages(content, draws):
        case.path.write_bytes(damaged)
        result, error = what_happens(case, expected)
        counts[result] += 1
        if result == "bare":
            bare.append(f"{damage}: {error[:300]}")
        if result == "unnoticed":
            silent.append(damage)
        for path, whole in siblings.items():
            path.write_bytes(whole)
    record_property("counts", dict(counts))
    print(f"\n{name}: {dict(counts)}; unnoticed: {silent}")
    assert not bare, "\n".join(bare)
    assert not silent or case.flips, silent
    assert plain(case.load()) == expected


def test_every_flipped_bit_of_a_checksummed_line_is_noticed_or_harmless():
    record = {"prompt": 3, "tokens": [1, 22, 257], "text": 'naïve "quote"\n'}
    line = checksummed_line(record)
    for place in range(8 * (len(line) - 1)):
        damaged = bytearray(line)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = read_checksummed_line(bytes(damaged))
        except ValueError:
            continue
        assert {key: found[key] for key in record} == record  # the name of the checksum's entry was hit
    with pytest.raises(ValueError, match="checksum"):
        read_checksummed_line(json.dumps(record).encode())
    assert json.loads(line).keys() == {*record, CHECKSUM}
