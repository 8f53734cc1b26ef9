"""The generate command: the template, standard input, what is printed, refusals."""

import io
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kd_common.hub.language_models import ModelNotFoundError, load_causal_lm
from kd_common.sampling import SamplingParams
from kd_common.terminal import printable
from llm_kd.generate import main
from llm_kd.models.generation import generate

EOS = 257
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def folder(save_model):
    return save_model()


def answer(folder, tokenizer, text=PROMPT, seed=0, vocab_size=None, **sampling):
    """The tokens of the answer, by the library call that has tests of its own."""
    prompts = [tokenizer(text, add_special_tokens=False).input_ids]
    settings = {"eos_ids": [EOS], "pad_id": EOS, "seed": seed, "batch_size": 1, "vocab_size": vocab_size}
    return generate(load_causal_lm(folder), prompts, SamplingParams(**sampling), **settings)[0]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--temperature", "0", "--max_new_tokens", "12"], {"temperature": 0.0, "max_new_tokens": 12}),
        (["--max_new_tokens", "20", "--seed", "3"], {"max_new_tokens": 20, "seed": 3}),
        (["--top_p", "0.5", "--top_k", "7", "--max_new_tokens", "9"], {"top_p": 0.5, "top_k": 7, "max_new_tokens": 9}),
    ],
)
def test_answers_and_prints_them(folder, tokenizer, capsys, flags, settings):
    found = main(["--model", folder, "--prompt", "Hello", "--device", "cpu", *flags])
    text = tokenizer.decode(answer(folder, tokenizer, **settings), skip_special_tokens=True)
    assert found == text.strip()
    assert found
    assert capsys.readouterr().out == printable(text) + "\n"


def test_control_characters_of_an_answer_are_spelled_out(save_model, make_model, tokenizer, capsys):
    """The terminal would obey them; the text itself is returned as it is."""
    folder = save_model()
    model = make_model()
    [escape] = tokenizer("\x1b", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight[escape, 0] = 1.0
        model.model.embed_tokens.weight[:, 0] = 100.0
    model.save_pretrained(folder)
    flags = ["--temperature", "0", "--max_new_tokens", "3", "--device", "cpu"]
    assert main(["--model", folder, "--prompt", "Hello", *flags]) == "\x1b" * 3
    assert capsys.readouterr().out == r"\x1b\x1b\x1b" + "\n"


def test_the_seed_decides(folder):
    found = [
        main(["--model", folder, "--prompt", "Hello", "--device", "cpu", "--max_new_tokens", "16", "--seed", seed])
        for seed in "010"
    ]
    assert found[0] == found[2] != found[1]


def test_prompt_from_standard_input(folder, monkeypatch, capsys):
    greedy = ["--model", folder, "--temperature", "0", "--max_new_tokens", "8", "--device", "cpu"]
    expected = main([*greedy, "--prompt", "Hello"])
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main([*greedy, "--prompt", "-"]) == expected


def test_the_end_of_the_turn_ends_the_answer(save_model, make_model, tokenizer, capsys):
    folder = save_model()
    model = make_model()
    with torch.no_grad():
        ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids
        last = model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = last  # the one positive logit
    model.save_pretrained(folder)
    assert main(["--model", folder, "--prompt", "Hello", "--device", "cpu", "--temperature", "0"]) == ""
    assert capsys.readouterr().out == "\n"


def test_an_answer_without_text_is_described(folder, monkeypatch, capsys):
    monkeypatch.setattr("llm_kd.generate.generate", lambda *args, **kwargs: [[EOS]])
    assert main(["--model", folder, "--prompt", PROMPT, "--device", "cpu"]) == ""
    assert capsys.readouterr() == ("", "(no text, only '<|im_end|>')\n")


def test_without_a_chat_template_the_instruction_layout_is_used(save_model, tokenizer):
    folder = save_model("plain")
    plain = AutoTokenizer.from_pretrained(folder)
    plain.chat_template = None
    (Path(folder) / "chat_template.jinja").unlink()
    plain.save_pretrained(folder)
    greedy = {"temperature": 0.0, "max_new_tokens": 8}
    expected = answer(folder, tokenizer, "Be brief.\n\n### Instruction:\nHello\n\n### Response:\n", **greedy)
    flags = ["--temperature", "0", "--max_new_tokens", "8", "--system", "Be brief.", "--device", "cpu"]
    found = main(["--model", folder, "--prompt", "Hello", *flags])
    assert found == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_rows_beyond_the_vocabulary_are_never_written(save_model, make_model, tokenizer):
    folder = save_model("padded", vocab=400)
    model = make_model(vocab=400)
    model.lm_head.weight.data[258:] *= 100  # padding of the head that would win every draw
    model.save_pretrained(folder)
    found = main(["--model", folder, "--prompt", "Hello", "--device", "cpu", "--max_new_tokens", "9"])
    expected = answer(folder, tokenizer, max_new_tokens=9)
    assert max(expected) >= 258
    expected = answer(folder, tokenizer, max_new_tokens=9, vocab_size=258)
    assert found == tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_prompt(folder, monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    for prompt in (text, "-"):
        with pytest.raises(ValueError, match="the prompt is empty; give --prompt TEXT"):
            main(["--model", folder, "--prompt", prompt])


def test_other_refusals(folder, capsys):
    with pytest.raises(ModelNotFoundError, match="nowhere: no such folder"):
        main(["--model", "nowhere", "--prompt", "Hello"])
    with pytest.raises(ValueError, match=r"=600 exceed the model's 512 positions: lower .*, or give shorter prompts"):
        main(["--model", folder, "--prompt", "Hello", "--max_new_tokens", "600", "--device", "cpu"])
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\]"):
        main(["--model", folder, "--prompt", "Hello", "--top_p", "2"])
    with pytest.raises(SystemExit):
        main(["--model", folder])
    assert "--prompt" in capsys.readouterr().err


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(save_model, monkeypatch):
    folder = save_model(vocab=200, pad_token_id=0, eos_token_id=1)
    monkeypatch.setattr("llm_kd.generate.load_causal_lm", lambda *args, **more: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="model has 200 rows, but its tokenizer has ids up to 257"):
        main(["--model", folder, "--prompt", "Hello", "--device", "cpu"])
