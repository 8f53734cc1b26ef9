"""A disk without room: the error names the file, what was there before is unchanged, nothing is left lying about."""

import shutil
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_common.errors import UserError
from kd_common.hub.language_models import load_causal_lm, load_config, load_tokenizer
from kd_common.run.checkpoints import AtomicCheckpointIO, check_resumable
from kd_common.run.compare import ComparedRun, run_matrix
from kd_common.sampling import SamplingParams
from llm_kd.data.responses import write_responses
from llm_kd.models import Backbone
from llm_kd.models.save import save_student as save_language_student
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher import CacheHeader, CacheWriter, TeacherCache
from spec_decode.data.corpus import corpus, write_corpus
from spec_decode.data.features import FeatureStore
from spec_decode.decoding.sampling import Sampling
from spec_decode.drafters import Eagle3, save_drafter
from spec_decode.export import export as export_drafter
from spec_decode.models import CausalLM
from vision_kd.detection.evaluation import write_results
from vision_kd.models import ModelSpec, build_classifier, save_student

ROOM = 2000  # bytes a file may have


def training_checkpoint(folder, target):
    return lambda: AtomicCheckpointIO().save_checkpoint({"w": torch.rand(5000)}, folder / "last.ckpt")


def image_student(folder, target):
    data_spec = {"num_classes": 4, "in_channels": 1, "mean": (0.4,), "std": (0.3,)}

    def write():
        save_student(folder / "student.pt", build_classifier(ModelSpec("resnet8"), **data_spec), ModelSpec("resnet8"))

    return write


def language_student(folder, target):
    backbone, tokenizer = Backbone(load_causal_lm(str(target))), load_tokenizer(str(target))

    def write():
        with torch.no_grad():
            next(backbone.parameters()).add_(1)
        save_language_student(backbone, tokenizer, folder / "student_best")

    return write


def drafter(folder, target):
    runner = CausalLM.from_transformers(load_causal_lm(str(target)))

    def write():
        save_drafter(Eagle3().bind(runner), folder / "drafter", {"target": str(target)})

    return write


def exported_drafter(folder, target):
    source, deep = folder.parent / "source", folder.parent / "deep"
    shutil.copytree(target, deep)
    config = load_config(str(target))
    config.num_hidden_layers = 7  # engines read three different layers
    AutoModelForCausalLM.from_config(config).save_pretrained(deep)
    runner = CausalLM.from_transformers(load_causal_lm(str(deep)))
    save_drafter(Eagle3().bind(runner), source, {"target": str(deep)})
    return lambda: export_drafter(str(source), str(folder))


def detections(folder, target):
    return lambda: write_results(folder / "detections.json", torch.rand(200, 7))


class Run(ComparedRun):
    headline = "done"

    @classmethod
    def train(cls, args, **place):
        return cls(args=args, history=["x" * 1500], parameters={}, **place)


def comparison(folder, target):
    """The second call has a run more to write, whose row is larger than the room."""
    rows = iter("ab")

    def write():
        variants = dict.fromkeys("ab"[: "ab".index(next(rows)) + 1], ())
        run_matrix(
            Run,
            base=[],
            variants=variants,
            output=folder,
            seeds=[0],
        )

    return write


REPLACED = [training_checkpoint, image_student, language_student, drafter, exported_drafter, detections, comparison]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", REPLACED, ids=lambda writer: writer.__name__)
def test_what_is_replaced_stays_as_it_was(writer, tmp_path, target, full_disk):
    folder = tmp_path / "run"
    folder.mkdir()
    write = writer(folder, target)
    write()
    before = content(folder)
    assert before
    with full_disk(ROOM), pytest.raises((OSError, UserError), match=str(folder)) as caught:
        write()
    assert "unchanged" in str(caught.value)
    assert content(folder) == before


def texts(folder, target):
    runner = CausalLM.from_transformers(load_causal_lm(str(target)))
    asked = [[n % 50 + 1] * (5 + n) for n in range(12)]
    sampling = Sampling(0.0, max_new_tokens=30)
    cache = corpus(folder, runner, asked, sampling, stops=(257,), seed=0, batch_size=3)
    written = partial(write_corpus, cache, runner, sampling, stops=(257,), seed=0, progress=False)
    return written, cache.path.with_suffix(".partial")


def features(folder, target):
    runner = CausalLM.from_transformers(load_causal_lm(str(target)))
    store = FeatureStore(folder / "text", [[n + 1] * (3 + n) for n in range(5)], 32)
    return lambda: store.write(runner, batch_size=1, progress=False), folder / "text/features.bin"


def teachers_responses(folder, target):
    model, tokenizer = load_causal_lm(str(target)), load_tokenizer(str(target))
    asked = [[n + 1] * 5 for n in range(12)]
    settings = {"eos_ids": (257,), "pad_id": 257, "seed": 0, "batch_size": 2, "progress_bar": False}
    return lambda: write_responses(
        model, asked, SamplingParams(max_new_tokens=30), tokenizer=tokenizer, **settings
    ), "partial"


def teacher_cache(folder, target):
    def write():
        header = CacheHeader("model", "w" * 64, "t" * 64, 300, 4, "float16")
        with CacheWriter(folder / "cache", header, shard_bytes=900) as writer:
            for number in range(12):
                if (key := f"{number:064x}") not in writer:
                    rows = torch.randn(4 * number + 4, 300, generator=torch.Generator().manual_seed(number))
                    tokens = torch.arange(len(rows))
                    writer.add([key], [len(rows)], tokens, TruncatedDistribution.from_logits(rows, 4))
        TeacherCache(folder / "cache").read([f"{number:064x}" for number in range(12)])

    return write, folder / "cache"


@pytest.mark.parametrize("writer", [texts, features, teachers_responses, teacher_cache], ids=lambda w: w.__name__)
def test_what_is_continued_ends_as_if_there_had_been_room(writer, tmp_path, target, full_disk, monkeypatch):
    found = []
    for name, room in (("whole", None), ("short", ROOM)):
        folder = tmp_path / name
        monkeypatch.setenv("KD_CACHE", str(folder))
        write, place = writer(folder, target)
        if room is not None:
            with full_disk(room), pytest.raises(OSError, match=str(place)) as caught:
                write()
            assert caught.value.filename.startswith(str(folder))
        write()
        kept = {
            path: data for path, data in content(folder).items() if path.suffix in (".jsonl", ".bin", ".safetensors")
        }
        found.append(kept)
    assert found[0] == found[1] or writer is teacher_cache  # its shards are cut elsewhere; its content was read


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_run_stops_with_the_name_of_its_checkpoint(tmp_path, full_disk):
    """Through Lightning: the last checkpoint stays readable, and the training that failed says which file it was."""

    class Small(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(40, 40)

        def training_step(self, batch, _):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def trainer(epochs):
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[AtomicCheckpointIO()],
            callbacks=[pl.callbacks.ModelCheckpoint(tmp_path, "last", enable_version_counter=False)],
        )
        return trainer, Small(), torch.utils.data.DataLoader(torch.rand(4, 40))

    fit, model, data = trainer(1)
    fit.fit(model, data)
    path = tmp_path / "last.ckpt"
    before = path.read_bytes()
    fit, model, data = trainer(2)
    with full_disk(ROOM), pytest.raises(OSError, match=rf"unchanged: '{path}'"):
        fit.fit(model, data, ckpt_path=str(path), weights_only=True)
    assert path.read_bytes() == before
    check_resumable(path)
    assert list(tmp_path.iterdir()) == [path]
