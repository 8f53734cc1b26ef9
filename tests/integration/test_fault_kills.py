"""Runs and writers killed at many moments, drawn from a seed, and started again: the end is the undisturbed one.

The kill comes right before a file is opened, renamed or removed, between two steps of the optimizer, or in the
middle of a write. Whatever is found afterwards under its final name must be whole.
"""

import random
import shutil
from importlib import import_module

import pytest

from kd_common.hub import load_causal_lm, load_tokenizer
from kd_common.run.checkpoints import check_resumable
from llm_kd.cache_teacher import main as cache_teacher
from llm_kd.teacher import TeacherCache
from llm_kd.teacher.cache import CacheError
from spec_decode.drafters.files import CONFIG, read_config, read_weights
from vision_kd.detection.coco import open_annotations
from vision_kd.detection.scenes import build_scenes
from vision_kd.models import load_classifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]


def check_whole(folder):
    """Read everything that a run keeps under its final name; returns what was found."""
    found = []
    for path in folder.rglob("*.ckpt"):
        check_resumable(path)
        found.append(path.name)
    for path in folder.rglob("*.pt"):
        load_classifier(path)
        found.append(path.name)
    for student in ("student_best", "student_last"):
        if (folder / student).is_dir():
            load_causal_lm(str(folder / student))
            load_tokenizer(str(folder / student))
            found.append(student)
    for path in folder.rglob(CONFIG):
        read_weights(path.parent, read_config(path.parent))
        found.append(path.parent.name)
    return found


def moments_to_die(seen, draws, count=4):
    """Some moments, at least one of them a step and at least one the renaming that puts a file in its place."""
    kinds = ("kd.step", "os.rename", "open")
    chosen = [draws.choice([i for i, moment in enumerate(seen) if moment.startswith(kind)]) for kind in kinds]
    return chosen + [draws.randrange(len(seen)) for _ in range(count - len(chosen))]


@pytest.mark.parametrize(("package", "seed"), [("vision_kd", 1), ("llm_kd", 2), ("spec_decode", 3)])
def test_a_run_killed_at_any_moment_ends_as_if_undisturbed(
    package, seed, tmp_path, tiny_run, outcome, die, step_moments, assert_equal, monkeypatch
):
    """Each of them begins without caches, so that teacher, responses, text and features are written, too."""
    fit, settings, draws = import_module(f"{package}.fit"), tiny_run(package, tmp_path), random.Random(seed)

    def attempt(name, **death):
        folder, cache = tmp_path / name / "run", tmp_path / name / "cache"
        monkeypatch.setenv("KD_CACHE", str(cache))
        last = folder / "checkpoints/last.ckpt"
        resume = [f"--ckpt_path={last}"] if last.is_file() else []

        def train():
            cli = fit.build([f"--run_dir={folder}", *settings, *resume])
            cli.trainer.callbacks.append(step_moments)
            fit.run(cli)

        return die(train, tmp_path / "log", [folder, cache], **death)

    seen = attempt("whole")
    expected = outcome(tmp_path / "whole/run")
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    deaths = [{"at": at} for at in moments_to_die(seen, draws)] + [{"size": draws.randrange(200, largest)}]
    for number, death in enumerate(deaths):
        name = f"killed{number}"
        assert attempt(name, **death) is None, death
        check_whole(tmp_path / name)
        attempt(name)
        assert_equal(outcome(tmp_path / name / "run"), expected, f"{death}")
        check_whole(tmp_path / name)
        shutil.rmtree(tmp_path / name)


def test_a_teacher_cache_killed_at_any_moment_is_continued(tmp_path, target, tiny_run, die, monkeypatch):
    """The command, which also writes the responses; test_teacher_cache.py tests the writer alone."""
    data = [argument for argument in tiny_run("llm_kd", tmp_path) if argument.startswith("--data.")]
    command = [f"--model.teacher.name={target}", "--size=8", *data]
    draws = random.Random(4)

    def attempt(name, **death):
        monkeypatch.setenv("KD_CACHE", str(tmp_path / name / "responses"))
        folder = tmp_path / name / "cache"
        return die(
            lambda: cache_teacher([f"--folder={folder}", *command]), tmp_path / "log", [tmp_path / name], **death
        )

    def content(name):
        cache = TeacherCache(tmp_path / name / "cache")
        stored = cache.read(sorted(cache.keys()))
        return cache.complete, [stored.counts, *(t.tolist() for t in (stored.tokens, stored.distribution.log_probs))]

    seen = attempt("whole")
    for number, death in enumerate([*({"at": at} for at in draws.sample(range(len(seen)), 4)), {"size": 3000}]):
        name = f"killed{number}"
        assert attempt(name, **death) is None, death
        if (tmp_path / name / "cache/manifest.json").is_file():
            assert not TeacherCache(tmp_path / name / "cache").complete
        else:
            with pytest.raises(CacheError, match="is no teacher cache"):
                TeacherCache(tmp_path / name / "cache")
        attempt(name)
        assert content(name) == content("whole")
    responses = {path.read_bytes() for path in tmp_path.glob("*/responses/responses/*.jsonl")}
    assert len(responses) == 1 or len({tuple(sorted(r.splitlines())) for r in responses}) == 2  # training, validation


def test_scenes_killed_while_they_are_built_appear_whole_or_not_at_all(tmp_path, die):
    draws = random.Random(5)
    for number in range(3):
        folder = tmp_path / f"scenes{number}"
        assert (
            die(lambda folder=folder: build_scenes(folder), tmp_path / "log", [tmp_path], at=draws.randrange(60))
            is None
        )
        assert not folder.exists()
    build_scenes(folder)
    assert len(list((folder / "train").iterdir())) == len(
        open_annotations(folder / "annotations/instances_train.json").imgs
    )
