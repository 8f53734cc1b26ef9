"""TextDataModule: settings to batches, with answers of a data set or of a teacher; the packaged prompts."""

import json

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from tokenizers import Tokenizer

from kd_common.sampling import SamplingParams
from kd_common.text import EncodingError
from llm_kd.data import TextDataModule, read_rows
from llm_kd.data import datamodule as module_file
from llm_kd.data.datamodule import find_data

ANSWERED = [{"instruction": f"Say {n}", "output": "the number " * (n % 3) + str(n)} for n in range(20)]
PROMPTS = [{"instruction": f"Say {n}"} for n in range(20)]


@pytest.fixture
def write(tmp_path):
    def write(records, name="data.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    return write


@pytest.fixture
def data(text, write, monkeypatch):
    """A data module on the tiny tokenizer, answers in the file unless told otherwise."""
    monkeypatch.setattr(module_file, "load_tokenizer", lambda name: text.tokenizer())

    def data(train=None, val=None, **settings):
        train = write(ANSWERED, "train.jsonl") if train is None else train
        val = write(ANSWERED[:5], "val.jsonl") if val is None else val
        return TextDataModule("tiny", train, val, **({"responses": "dataset"} | settings))

    return data


def learnt(data, split):
    tokenizer = data.encoder.tokenizer
    return [
        tokenizer.decode([t for t, m in zip(e.input_ids, e.loss_mask, strict=True) if m])
        for e in data.splits[split].examples
    ]


def test_answers_of_the_files(data):
    made = data(batch_size=6)
    made.setup("fit")
    assert learnt(made, "train") == [row["output"] + "<|im_end|>" for row in ANSWERED]
    assert [e.reference for e in made.splits["val"].examples] == [row["output"] for row in ANSWERED[:5]]
    train, val = made.train_dataloader(), made.val_dataloader()
    assert (len(train), train.left_out) == (3, 2)
    assert [len(batch.keys) for batch in val] == [5]
    assert all(batch.input_ids.shape[0] == 6 for batch in train)


def test_the_tokenizers_numbers(data, text):
    made, ids = data(), text.tokenizer().convert_tokens_to_ids
    assert made.eos_ids == (ids("<|im_end|>"),)
    assert made.pad_id == ids("<|im_end|>")
    assert made.vocab_size == len(text.tokenizer())
    made.encoder.tokenizer.pad_token = "<pad>"
    assert made.pad_id == ids("<pad>")
    made.encoder.tokenizer.pad_token = None
    assert made.pad_id == ids("<|im_end|>")


def test_a_vocabulary_with_holes_keeps_its_last_token(data, monkeypatch, text):
    content = json.loads(text.tokenizer().backend_tokenizer.to_str())
    for token in (token for token in content["added_tokens"] if token["content"] == "<|im_end|>"):
        content["model"]["vocab"][token["content"]] = token["id"] = 999
    holed = text.tokenizer()
    holed._tokenizer = Tokenizer.from_str(json.dumps(content))
    monkeypatch.setattr(module_file, "load_tokenizer", lambda name: holed)
    made = data()
    assert made.eos_ids == (999,)
    assert made.vocab_size == 1000 > len(holed)


def test_answers_of_the_teacher(data, write, teacher):
    rows = [*ANSWERED[:3], *PROMPTS[3:8]]
    made = data(write(rows), responses="teacher", sampling=SamplingParams(max_new_tokens=6, temperature=0))
    made.write_responses(teacher, progress_bar=False)
    made.setup("fit")
    examples = made.splits["train"].examples
    assert len(examples) == 8
    for row, example in zip(rows, examples, strict=True):
        prompt, response = example.input_ids[: example.prompt_length], example.input_ids[example.prompt_length :]
        rendered = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        assert made.encoder.tokenizer.decode(prompt) == rendered
        assert example.loss_mask == [False] * len(prompt) + [True] * len(response)
        assert len(response) == 6 or response[-1] in made.eos_ids
        text = made.encoder.tokenizer.decode(response, skip_special_tokens=True)
        assert example.reference == row.get("output", text)
        with torch.no_grad():
            logits = teacher(torch.tensor([example.input_ids])).logits[0, example.prompt_length - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == response


def test_the_same_responses_whatever_the_seed_of_the_order(data, teacher, monkeypatch):
    settings = {"responses": "teacher", "sampling": SamplingParams(max_new_tokens=6)}
    first, second = data(**settings, seed=0), data(**settings, seed=1)
    first.write_responses(teacher, progress_bar=False)
    monkeypatch.setattr("llm_kd.data.responses.generate", None)
    second.write_responses(teacher, progress_bar=False)
    assert first.splits == second.splits
    keys = [[key for batch in made.train_dataloader() for key in batch.keys] for made in (first, second)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("responses", ["dataset", "teacher"])
def test_prompts_alone_for_a_student_that_writes_itself(data, write, teacher, responses):
    rows = [*ANSWERED[:3], *PROMPTS[3:8], {"instruction": "long " * 200}]
    sampling = SamplingParams(max_new_tokens=6, temperature=0)
    made = data(write(rows), responses=responses, batch_size=4, sampling=sampling, max_length=128)
    made.prompts_only = True
    made.write_responses(teacher, progress_bar=False)
    made.setup("fit")
    split = made.splits["train"]
    assert (split.rows, split.dropped, split.supervised) == (9, 1, 0)
    prompts = [
        made.encoder.tokenizer(
            f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        ).input_ids
        for row in rows[:8]
    ]
    batches = list(made.train_dataloader())
    assert sorted(prompt for batch in batches for prompt in batch.prompts) == sorted(prompts)
    assert not any(batch.keys or batch.predict.any() for batch in batches)
    assert all(example.num_supervised for example in made.splits["val"].examples)


def test_without_the_teacher_its_responses_are_missed(data):
    with pytest.raises(ValueError, match=r"call write_responses\(teacher\) before training, or set responses"):
        data(responses="teacher").setup("fit")


def test_write_responses_leaves_answers_of_the_data_set(data):
    made = data()
    made.write_responses(None)
    made.setup("fit")
    assert len(made.splits["train"].examples) == 20


def test_prompts_alone_name_the_row_and_the_remedy(data, write):
    path = write([*ANSWERED[:3], PROMPTS[3]])
    with pytest.raises(EncodingError, match=rf"{path}, line 4: no assistant turn .* set responses to teacher"):
        data(path).setup("fit")


def test_long_rows_are_dropped_and_counted(data, caplog):
    whole = data()
    whole.setup("fit")
    lengths = sorted(len(e.input_ids) for e in whole.splits["train"].examples)
    limit = lengths[9]
    made = data(max_length=limit)
    with caplog.at_level("INFO"):
        made.setup("fit")
    split = made.splits["train"]
    kept = sum(length <= limit for length in lengths)
    assert (split.rows, split.dropped, len(split.examples)) == (20, 20 - kept, kept)
    assert 0 < kept < 20
    assert split.tokens == sum(length for length in lengths if length <= limit)
    assert split.supervised == sum(sum(e.loss_mask) for e in split.examples)
    assert f"train: 20 rows, {kept} examples, {split.supervised} of {split.tokens} tokens carry a loss" in caplog.text
    assert f"{20 - kept} rows of more than {limit} tokens dropped" in caplog.text


def test_long_rows_are_cut_if_asked(data):
    whole = data()
    whole.setup("fit")
    limit = sorted(len(e.input_ids) for e in whole.splits["train"].examples)[9]
    made = data(max_length=limit, truncate=True)
    made.setup("fit")
    pairs = list(zip(whole.splits["train"].examples, made.splits["train"].examples, strict=True))
    assert all(cut.input_ids == example.input_ids[:limit] for example, cut in pairs)
    assert sum(cut != example for example, cut in pairs) > 3


def test_prompts_without_room_for_a_response_are_dropped(data, write, teacher):
    path = write([*PROMPTS[:4], {"instruction": "long " * 40}])
    made = data(path, responses="teacher", max_length=60, sampling=SamplingParams(max_new_tokens=20))
    made.write_responses(teacher, progress_bar=False)
    assert (made.splits["train"].rows, made.splits["train"].dropped) == (5, 1)
    assert max(len(e.input_ids) for e in made.splits["train"].examples) <= 60


def test_nothing_left_names_the_settings(data):
    with pytest.raises(ValueError, match="train: none of the 20 rows fits max_length=3; raise it"):
        data(max_length=3).setup("fit")


def test_limits_files_and_fields(data, write):
    questions = [{"question": row["instruction"], "answer": row["output"]} for row in ANSWERED]
    files = [write(questions[:8], "a.jsonl"), write(questions[8:], "b.jsonl")]
    made = data(files, files[1], fields={"instruction": "question", "output": "answer"}, limit_train=10, limit_val=2)
    made.setup("fit")
    assert learnt(made, "train") == [row["output"] + "<|im_end|>" for row in ANSWERED[:10]]
    assert learnt(made, "val") == [row["output"] + "<|im_end|>" for row in ANSWERED[8:10]]


def test_packing_fills_training_rows_only(data):
    made = data(packing=True, max_length=128, batch_size=2)
    made.setup("fit")
    loader = made.train_dataloader()
    assert len(loader.rows) < 15
    assert max(batch.input_ids.shape[1] for batch in loader) <= 128
    assert all((batch.position_ids[:, 1:] == 0).any() for batch in loader)
    assert [len(batch.keys) for batch in made.val_dataloader()] == [5]


def test_a_system_turn_for_all(data):
    made = data(system="Be brief.")
    made.setup("fit")
    prompt = made.splits["train"].examples[0].input_ids
    assert made.encoder.tokenizer.decode(prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


class _Count(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokens = {"train": 0, "val": 0}

    def training_step(self, batch, batch_idx):
        self.tokens["train"] += int(batch.predict.sum())
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.tokens["val"] += int(batch.predict.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_sees_every_supervised_token(data, tmp_path):
    made, model = data(batch_size=5), _Count()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(model, datamodule=made)
    assert model.tokens == {split: 2 * made.splits[split].supervised for split in ("train", "val")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"limit_val": -1}, "limit_val must be at least 1"),
        ({"generation_batch_size": 0}, "generation_batch_size must be at least 1"),
        ({"responses": "student"}, "responses must be 'dataset' or 'teacher', got 'student'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule("tiny", **settings)


def test_every_setting_is_on_the_command_line():
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextDataModule, "data")
    settings = ["tokenizer=x", "train=[a, b]", "fields={instruction: question}", "limit_train=7"]
    settings += ["sampling.temperature=1", "sampling.top_p=0.9"]
    args = parser.parse_args(["--data=llm_kd.data.TextDataModule", *[f"--data.{setting}" for setting in settings]])
    made = parser.instantiate_classes(args).data
    assert made.sampling == SamplingParams(top_p=0.9)
    assert (made.files["train"], made.fields) == (["a", "b"], {"instruction": "question"})
    assert made.limits == {"train": 7, "val": None}


def test_the_packaged_prompts():
    rows = {split: read_rows(find_data(f"prompts/{split}")) for split in ("train", "val")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 256, "val": 48}
    assert not any(row.answered for found in rows.values() for row in found)
    messages = [row.messages for found in rows.values() for row in found]
    assert len(set(messages)) == 304
    assert max(len(m.content) + len(m.input) for (m,) in messages) < 300


def test_a_file_that_is_nowhere_lists_the_packaged_ones():
    with pytest.raises(ValueError, match=r"prompts/dev: no such .*\(prompts/train, prompts/val\)"):
        find_data("prompts/dev")
