"""The evaluate command against dense float64 logits and plain loops; its protocol, its output, its refusals."""

import json
import shutil
import statistics

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from kd_common.errors import UserError
from kd_common.hub.language_models import ModelNotFoundError, load_causal_lm, load_tokenizer
from kd_common.sampling import SamplingParams
from kd_common.text import EncodingError
from llm_kd import evaluate, fit
from llm_kd.data import TextDataModule, responses
from llm_kd.evaluate import main, token_means
from llm_kd.evaluation import answers
from llm_kd.evaluation.answers import answer_prompts, questions
from llm_kd.models import Backbone, TeacherSpec, load_teacher
from llm_kd.models.generation import generate

EOS = 257
PAIRS = [("Name a fruit.", "An apple is a fruit."), ("Add 2 and 3.", "5"), ("Say hello!", "Hello there, friend.")]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def student(save_model):
    return save_model("student", layers=2, seed=1)


@pytest.fixture
def teacher(save_model):
    return save_model("teacher", vocab=272)  # with padding rows in its head, as Qwen's larger models have


@pytest.fixture
def val(tmp_path):
    return write(tmp_path / "val.jsonl", *[{"instruction": text, "output": answer} for text, answer in PAIRS])


@pytest.fixture
def arguments(student, val):
    def make(*extra):
        return ["--student", student, "--data.val", val, "--device", "cpu", *extra]

    return make


def dataset(folder, val, **settings):
    data = TextDataModule(folder, val=val, **{"responses": "dataset", **settings})
    data.setup("validate")
    return data


def prompt_text(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def dense_log_probs(folder, tokenizer):
    """Float64 log-probabilities of one model for the tokens of all answers, (N, V), and these tokens."""
    model, rows, labels = load_causal_lm(folder, "float64"), [], []
    for text, answer in PAIRS:
        prompt, response = ids(tokenizer, prompt_text(text)), [*ids(tokenizer, answer), EOS]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, :, :258]
        rows.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
        labels += response
    return torch.cat(rows), torch.tensor(labels)


@pytest.mark.parametrize("k", [3, 60])
def test_token_means_against_dense_logits(arguments, student, teacher, tokenizer, k):
    found = main(arguments("--teacher", teacher, "--k", str(k), "--seeds", "[]", "--data.val_batch_size", "2"))
    log_q, labels = dense_log_probs(student, tokenizer)
    log_p, _ = dense_log_probs(teacher, tokenizer)
    accepted = (log_p.topk(k).indices == log_q.argmax(-1, keepdim=True)).any(-1)
    expected = {
        "nll": -log_q.gather(-1, labels[:, None]).mean(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "agreement": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean(),
        "tar": accepted.double().mean(),
        "teacher_nll": -log_p.gather(-1, labels[:, None]).mean(),
    }
    assert found["tokens"] == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)
    assert found["data"] == {"rows": 3, "dropped": 0, "max_tokens": 512, "supervised_tokens": len(labels)}
    assert not {"rouge_l", "harness"} & set(found)


def test_a_student_equal_to_its_teacher(arguments, student):
    found = main(arguments("--teacher", student, "--seeds", "[]"))["tokens"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert (found["agreement"], found["tar"]) == (1, 1)
    assert found["nll"] == found["teacher_nll"]


def test_likelihood_without_a_teacher(arguments, student, tokenizer):
    log_q, labels = dense_log_probs(student, tokenizer)
    found = main(arguments("--seeds", "[]"))["tokens"]
    assert found == {"nll": pytest.approx(-float(log_q.gather(-1, labels[:, None]).mean()), rel=1e-4)}


def test_settings_of_generation_that_are_not_applied_are_named(student, tmp_path, capsys):
    folder = shutil.copytree(student, tmp_path / "model")
    settings = folder / "generation_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"repetition_penalty": 1.3, "stop_strings": ["."]})
    )
    load_teacher(TeacherSpec(str(folder)))
    assert "repetition_penalty 1.3, stop_strings ['.']" in capsys.readouterr().err


def test_measuring_leaves_the_student_trainable(student, val):
    backbone = Backbone(load_causal_lm(student))
    token_means(backbone, None, dataset(student, val), vocab_size=258)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


DRAWING = ["--temperature", "0.7", "--top_p", "0.9", "--top_k", "50", "--no_repeat_ngram_size", "3"]


def test_answers_and_rouge_against_a_plain_loop(arguments, student, tokenizer):
    lengths = ["--max_prompt", "100", "--data.max_length", "120"]
    found = main(arguments("--seeds", "[3, 4, 5]", "--data.generation_batch_size", "2", *DRAWING, *lengths))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    sampling = SamplingParams(max_new_tokens=20, temperature=0.7, top_p=0.9, top_k=50, no_repeat_ngram_size=3)
    expected, means = [], []
    for seed in (3, 4, 5):
        responses = generate(
            load_causal_lm(student),
            [ids(tokenizer, prompt_text(text)) for text, _ in PAIRS],
            sampling,
            eos_ids=[EOS],
            pad_id=EOS,
            seed=seed,
            batch_size=2,
        )
        for (text, answer), tokens in zip(PAIRS, responses, strict=True):
            response = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            score = 100 * scorer.score(answer, response)["rougeL"].fmeasure
            answered = {"prompt": text, "response": response, "references": [answer], "rouge_l": score}
            expected.append({"seed": seed, **answered})
        means.append(statistics.fmean(row["rouge_l"] for row in expected[-3:]))
    assert found["answers"] == expected
    assert found["rouge_l"] == {
        "mean": pytest.approx(statistics.fmean(means)),
        "std": pytest.approx(statistics.stdev(means)),
        "seeds": pytest.approx(dict(zip("345", means, strict=True))),
        "prompts": 3,
        "left_out": 0,
    }


@pytest.fixture
def speaker(monkeypatch, tokenizer):
    """Every answer is the third response of PAIRS; the calls are kept."""
    calls = []

    def fixed(model, prompts, sampling, **settings):
        calls.append({"prompts": prompts, "sampling": sampling, **settings})
        return [[*ids(tokenizer, PAIRS[2][1]), EOS] for _ in prompts]

    monkeypatch.setattr(answers, "generate", fixed)
    return calls


def test_the_default_is_the_minillm_protocol(arguments, speaker):
    found = main(arguments())
    assert [call["seed"] for call in speaker] == [10, 20, 30, 40, 50]
    expected = SamplingParams(max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=6)
    assert all(call["sampling"] == expected for call in speaker)
    # The third answer is right; the others have no word in common with their references.
    assert found["rouge_l"]["mean"] == pytest.approx(100 / 3)
    assert found["rouge_l"]["std"] == 0


def test_prompts_up_to_the_limit_are_asked(arguments, speaker, student, tmp_path, tokenizer):
    frame = len(ids(tokenizer, prompt_text("")))
    texts = ["x" * (40 - frame), "y" * (41 - frame), "z"]
    val = write(tmp_path / "lengths.jsonl", *[{"instruction": text, "output": "Hello"} for text in texts])
    found = main(arguments("--data.val", val, "--max_prompt", "40", "--seeds", "[0]", "--data.max_length", "60"))
    assert [len(prompt) for prompt in speaker[0]["prompts"]] == [40, frame + 1]
    assert [answer["prompt"] for answer in found["answers"]] == [texts[0], "z"]
    assert found["rouge_l"]["prompts"] == 2
    assert found["rouge_l"]["left_out"] == 1
    assert found["rouge_l"]["std"] is None
    assert speaker[0]["sampling"].max_new_tokens == 20
    main(arguments("--data.val", val, "--limit", "1", "--seeds", "[0]"))
    assert [len(prompt) for prompt in speaker[1]["prompts"]] == [40]


def test_a_long_reference_is_still_a_reference(arguments, speaker, tmp_path):
    """A row too long for the token metrics, and so dropped there, can be asked."""
    rows = [{"instruction": "Short", "output": "Yes"}, {"instruction": "Long", "output": "word " * 150}]
    found = main(arguments("--data.val", write(tmp_path / "long.jsonl", *rows), "--seeds", "[0]"))
    assert found["data"]["dropped"] == 1
    assert [answer["prompt"] for answer in found["answers"]] == ["Short", "Long"]


def test_rows_with_one_prompt_are_references_of_one_question(arguments, speaker, tmp_path):
    outputs = ["Goodbye", "Hello there, friend.", "Hello"]
    rows = [{"instruction": "Greet", "output": output} for output in outputs]
    found = main(arguments("--data.val", write(tmp_path / "many.jsonl", *rows), "--seeds", "[0]"))
    assert [answer["references"] for answer in found["answers"]] == [outputs]
    assert found["rouge_l"]["mean"] == 100


def test_conversations_are_asked_up_to_their_last_answer(student, tmp_path, tokenizer):
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hey"), ("user", "Bye"), ("assistant", "See you")]
    chat = [{"role": role, "content": content} for role, content in turns]
    material = {"instruction": "Sum up", "input": "A text.", "output": ["Text", "A text", "Words"]}
    again = material | {"output": "It is text"}
    bad = {"role": "assistant", "content": "Bad", "weight": 0}
    later = [{"role": "user", "content": "unanswered"}, bad, {"role": "user", "content": "unanswered, too"}]
    rows = [{"messages": chat}, {"messages": [*chat[:3], *later]}, material, again]
    whole, cut, instruction = questions(dataset(student, write(tmp_path / "chat.jsonl", *rows)))
    assert (whole.text, whole.references) == ("Bye", ["See you"])
    before = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns[:4])
    assert tokenizer.decode(whole.tokens) == before + "<|im_start|>assistant\n"
    assert (cut.text, cut.references) == ("Hi", ["Hey"])
    assert (instruction.text, instruction.references) == (
        "Sum up\n\nA text.",
        ["Text", "A text", "Words", "It is text"],
    )


def test_the_teachers_responses_as_references(arguments, student, teacher, tmp_path, tokenizer):
    """Rows without an answer are compared with the teacher's; the token metrics lie on its responses for all rows."""
    rows = [{"instruction": "Prompt alone"}, {"instruction": "Answered", "output": "Yes"}]
    flags = ["--data.responses", "teacher", "--teacher", teacher, "--data.sampling.max_new_tokens", "7"]
    val = write(tmp_path / "prompts.jsonl", *rows)
    found = main(arguments("--data.val", val, "--seeds", "[0]", "--max_prompt", "500", *flags))
    data = TextDataModule(
        student, val=val, responses="teacher", sampling=SamplingParams(max_new_tokens=7, temperature=0.0)
    )
    data.write_responses(load_teacher(TeacherSpec(teacher)).model, splits=["val"], progress_bar=False)
    assert set(data.splits) == {"val"}
    written = [example.input_ids[example.prompt_length :] for example in data.splits["val"].examples]
    assert found["data"]["supervised_tokens"] == sum(map(len, written))
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    assert [answer["references"] for answer in found["answers"]] == [[text], ["Yes"]]


def test_answers_without_sampling_are_greedy(student, val, tokenizer):
    """What fit asks for."""
    data = dataset(student, val, sampling=SamplingParams(max_new_tokens=9))
    backbone = Backbone(load_causal_lm(student))
    found = answer_prompts(backbone, data, limit=2)
    prompts = [ids(tokenizer, prompt_text(text)) for text, _ in PAIRS[:2]]
    greedy = SamplingParams(max_new_tokens=9, temperature=0.0)
    expected = generate(backbone.model, prompts, greedy, eos_ids=[EOS], pad_id=EOS, seed=0, batch_size=1)
    assert found.responses == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected]
    assert found.prompts == ["Name a fruit.", "Add 2 and 3."]
    assert found.rouge_l == statistics.fmean(found.scores)


def test_prompts_beyond_the_models_positions_are_left_out(student, tmp_path):
    rows = [{"instruction": "x" * 440, "output": "a"}, {"instruction": "y", "output": "a"}]
    data = dataset(student, write(tmp_path / "long.jsonl", *rows), sampling=SamplingParams(max_new_tokens=64))
    found = answer_prompts(Backbone(load_causal_lm(student)), data)
    assert (found.prompts, found.left_out) == (["y"], 1)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_rows_beyond_the_models_positions_are_refused(arguments, save_model, tmp_path, role):
    folders = {
        "teacher": save_model("t", max_position_embeddings=1024),
        "student": save_model("s", max_position_embeddings=1024),
    }
    folders[role] = save_model("short")
    data = write(tmp_path / "long.jsonl", {"instruction": "a", "output": 520 * "b"})
    flags = [flag for name, folder in folders.items() for flag in (f"--{name}", folder)]
    with pytest.raises(ValueError, match=f"val: .* {role}.* data.max_length to 512"):
        main(arguments(*flags, "--data.val", data, "--data.max_length", "1024"))


def test_output_and_every_setting(arguments, teacher, speaker, tmp_path, capsys):
    output = tmp_path / "new" / "result.json"
    found = main(arguments("--teacher", teacher, "--output", str(output)))
    assert json.loads(output.read_text()) == json.loads(json.dumps(found))
    printed = capsys.readouterr().out
    for name, value in found["settings"].items():
        assert f"{name} {value}" in printed
    asked = {"seeds", "limit", "max_prompt", "max_new_tokens", "temperature", "top_p", "top_k", "no_repeat_ngram_size"}
    assert asked | {"student", "teacher", "k", "dtype", "data.val", "data.max_length"} <= set(found["settings"])
    for number in (f"{found['tokens']['nll']:.3f}", f"{found['tokens']['kl']:.3f}", "33.33 ± 0.00"):
        assert number in printed


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("temperature", "0", "--seeds"),
        ("data.max_length", "256", "--max_prompt 256"),
        ("limit", "0", "--limit"),
        ("max_prompt", "0", "--max_prompt"),
        ("max_prompt", "9", "max_prompt"),
        ("top_p", "0", "top_p"),
        ("k", "0", "--k"),
        ("data.responses", "teacher", "--teacher"),
        ("data.val_batch_size", "0", "val_batch_size"),
    ],
)
def test_settings_that_cannot_be_used(arguments, monkeypatch, setting, value, named):
    monkeypatch.setattr(answers, "generate", lambda *_, **__: pytest.fail("answers were written"))
    with pytest.raises(UserError, match=named):
        main(arguments(f"--{setting}", value))


def test_rows_without_a_reference(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("a model was loaded"))
    val = write(tmp_path / "prompts.jsonl", {"instruction": "Say", "output": "Hi"}, {"instruction": "Prompt alone"})
    with pytest.raises(EncodingError, match=r"prompts\.jsonl, line 2"):
        main(arguments("--data.val", val))
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        main(arguments("--data.val", "nowhere.jsonl"))


def test_other_vocabulary(arguments, teacher):
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ValueError, match="<new>"):
        main(arguments("--teacher", teacher))


def test_an_output_that_is_a_folder_is_refused_before_models_are_loaded(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=rf"^--output {tmp_path} is a folder; name a file$"):
        main(arguments("--output", str(tmp_path)))


def test_a_missing_student_is_named_with_an_example(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    example = "python -m llm_kd.evaluate --student runs/smollm2/run_0/student_last --data.val FILE.jsonl"
    assert f"error: --student is required, as in: {example}\n" in capsys.readouterr().err


def test_missing_model(arguments):
    with pytest.raises(ModelNotFoundError, match="gone"):
        main(arguments("--teacher", "gone"))


@pytest.mark.parametrize(
    ("value", "match"), [(float("nan"), r"model\.norm\.weight"), (3e38, "the logits are not finite")]
)
def test_weights_that_are_not_finite_or_overflow(arguments, student, value, match):
    model = load_causal_lm(student)
    model.model.norm.weight.data.fill_(value)
    model.save_pretrained(student)
    with pytest.raises(ValueError, match=match):
        main(arguments())


def test_a_likelihood_that_is_not_finite(student, val):
    backbone = Backbone(load_causal_lm(student))
    backbone.causal_lm.model.embed_tokens.weight.data[EOS] = float("nan")
    with pytest.raises(ValueError, match="nll not finite"):
        token_means(backbone, None, dataset(student, val), vocab_size=258)


@pytest.mark.slow
def test_a_run_is_measured_as_in_training(teacher, tmp_path, monkeypatch):
    """The saved student of a run has the run's validation metrics, on the responses the run has cached."""
    files = {
        split: write(tmp_path / f"{split}.jsonl", *[{"instruction": f"{split} {number}"} for number in range(8)])
        for split in ("train", "val")
    }
    shared = [f"--data.val={files['val']}", "--data.sampling.max_new_tokens=6", "--data.sampling.temperature=0"]
    run = [f"--run_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--answers=0"]
    run += ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    models = [f"--model.teacher.name={teacher}", "--model.student.layers=2", "--data.batch_size=4"]
    expected = fit.main([*run, *models, f"--data.train={files['train']}", *shared])
    monkeypatch.setattr(responses, "generate", lambda *_, **__: pytest.fail("the teacher was asked again"))
    where = ["--student", str(tmp_path / "run/student_last"), "--teacher", teacher, "--device", "cpu", "--seeds", "[]"]
    found = main([*where, "--data.responses", "teacher", *shared])
    assert found["tokens"] == pytest.approx({name: expected.last[name] for name in found["tokens"]}, rel=1e-5)
    assert len(found["tokens"]) == 5
