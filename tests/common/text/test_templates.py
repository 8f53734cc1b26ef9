"""Answers in the chat templates of model families: what is learnt is the text of the file and its end, or refused."""

import datetime
import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kd_common.hub.vocabulary import end_tokens
from kd_common.text import ChatEncoder, EncodingError, Message, Row, encode_each, read_rows, template
from kd_common.text.template import DATE

LOOP = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}"
CHATML = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + OPEN + "<|im_start|>"
    "assistant\n{% endif %}"
)
# The system's text within the user's first turn; turns alternate.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set content = system + m.content if loop.first else m.content %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# A default system turn with the date; texts are trimmed.
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = 'Be kind.' %}{% endif %}"
    "{{ '<|h|>system<|/h|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n' + s + '<|eot|>' }}" + LOOP +
    "{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    + OPEN + "{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)  # fmt: skip
# Cuts thoughts before the last question, writes empty ones into the last answer.
QWEN3 = (
    "{% set ns = namespace(last=0) %}" + LOOP + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}" + LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = '' %}{% set content = m.content %}{% if m.reasoning_content is string %}"
    "{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}"
    "{% endif %}{% for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + call.function.name + call.function.arguments | tojson + "
    "'\n</tool_call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPEN +
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
# Cuts all thoughts, and opens them in the prompt.
R1 = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1].lstrip('\n') + eos_token }}{% endif %}{% endfor %}" + OPEN +
    "{{ '<|Assistant|><think>\n' }}{% endif %}"
)  # fmt: skip
MISTRAL = (
    "{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP + "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<eot>\n' }}"
    "{% endfor %}" + OPEN + "<start>model\n{% endif %}"
)  # fmt: skip
# Closes the conversation once more behind its last turn.
PHI = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}" + OPEN + "{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
# The last answer ends otherwise than those before it, which end as users' turns do.
HARMONY = (
    LOOP + "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}" + OPEN +
    "<|start|>assistant{% endif %}"
)  # fmt: skip
ZEPHYR = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% if loop.last and add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# Writes empty thoughts into prompts and answers alike, and takes a switch out of the system's turn.
SMOLLM3 = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content.replace('/no_think', '').rstrip() if m.role == 'system' else m.content.lstrip('\n') }}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + OPEN + "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"
)
GENERATION = (
    LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPEN + "<|im_start|>"
    "assistant\n{% endif %}"
).replace("{% if m.role == 'assistant' %}{% gen", "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% gen")
UPPER = CHATML.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)")
TWICE = CHATML.replace("m.content", "m.content + m.content")
NO_SYSTEM = (
    LOOP
    + "{% if m.role != 'system' %}"
    + CHATML.removeprefix(LOOP).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
)
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|h|>", "<|/h|>", "<|eot|>", "<|end|>", "<|return|>"),
    *("<|message|>", "<|channel|>", "<|start|>", "<start>", "<eot>", "<|User|>", "<|Assistant|>"),
)


def tokenizer(chat_template, eos="<|im_end|>"):
    """Byte-level, one token a byte beside the special ones, of which thoughts and calls are none, as Qwen's."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos)
    made.chat_template = chat_template
    made.name_or_path = "tiny"
    return made


def row(*contents, system=None, **learnt):
    turns = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)]
    return Row((*([Message("system", system)] if system else []), *turns), "file.jsonl, line 7")


def learnt(encoder, one):
    found = encoder.encoded(one)
    assert [text for *_, text in found.answers] == [
        m.content for m in one.messages if m.role == "assistant" and m.learnt
    ]
    assert found.answers[-1][1] == len(found.ids)
    return [encoder.tokenizer.decode(found.ids[start:end]) for start, end, _ in found.answers]


THOUGHT = "<think>\nIt is 4.\n</think>\n\nFour."
ONE, TWO = ("Capital of Peru?", "Lima."), ("Capital of Peru?", "Lima.", "SECRET?", "Quito.\nYes")
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>", "{}<|im_end|>"),
    "llama2": (LLAMA2, "</s>", " {} </s>"),
    "llama3": (LLAMA3, "<|eot|>", "{}<|eot|>"),
    "qwen3": (QWEN3, "<|im_end|>", "{}<|im_end|>"),
    "mistral": (MISTRAL, "</s>", " {}</s>"),
    "gemma": (GEMMA, "</s>", "{}<eot>"),
    "phi": (PHI, "</s>", "{}<|end|>"),
    "zephyr": (ZEPHYR, "</s>", "{}</s>"),
    "smollm3": (SMOLLM3, "<|im_end|>", "{}<|im_end|>"),
    "generation": (GENERATION, "<|im_end|>", "{}<|im_end|>"),
    "none": (None, "</s>", "{}</s>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_learnt_as_they_stand_in_the_file(family):
    chat_template, eos, shown = FAMILIES[family]
    encoder = ChatEncoder(tokenizer(chat_template, eos))
    encoder.check_learnable()
    for contents in (ONE, TWO):
        one = row(*contents)
        expected = [shown.format(text) for text in contents[1::2]]
        if family == "qwen3":  # as the template has the last answer, and the model writes it
            expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
        assert learnt(encoder, one) == expected
        found = encoder.encoded(one)
        prompt = encoder.prompt(one)
        assert found.ids[: len(prompt)] == prompt
        assert len(prompt) == found.answers[-1][0]


@pytest.mark.parametrize(
    "content", ["\n a \n", "[INST] not [/INST]", "Lima.Lima.", "{{ x }} {% y %}", "a\u2028b\x00", "Ä𝄞"]
)
def test_odd_texts(content):
    for family, (chat_template, eos, _) in FAMILIES.items():
        [answer] = learnt(ChatEncoder(tokenizer(chat_template, eos)), row("Q", content))
        assert content.strip() in answer, family


@pytest.mark.parametrize("chat_template", [QWEN3, R1])
def test_thoughts_of_the_last_answer_are_learnt_and_those_before_it_refused(chat_template):
    encoder = ChatEncoder(tokenizer(chat_template, "</s>" if chat_template is R1 else "<|im_end|>"))
    ending = THOUGHT.removeprefix("<think>\n") + "</s>" if chat_template is R1 else THOUGHT + "<|im_end|>"
    assert learnt(encoder, row("2+2?", THOUGHT)) == [ending]
    with pytest.raises(EncodingError, match=r"line 7: .*tiny rewrites turn 2, .* weight 0"):
        encoder.encoded(row("2+2?", THOUGHT, "3+1?", THOUGHT))
    turns = row("2+2?", THOUGHT, "3+1?", THOUGHT).messages
    alone = Row((turns[0], Message("assistant", THOUGHT, learnt=False), *turns[2:]), "file.jsonl, line 7")
    assert learnt(encoder, alone) == [ending]
    prompt = encoder.tokenizer.decode(encoder.prompt(alone))  # as the model is asked
    assert "It is" not in prompt
    assert encoder.encoded(alone).ids[: len(encoder.prompt(alone))] == encoder.prompt(alone)


def test_an_answer_without_the_thoughts_that_its_prompt_opens_is_refused():
    with pytest.raises(EncodingError, match=r"line 7: .* behind '<think>\\n', with which turn 2 does not start"):
        ChatEncoder(tokenizer(R1, "</s>")).encoded(row(*ONE))


def test_reasoning_beside_the_content_is_learnt_or_refused():
    def thinking(key):
        return Row((Message("user", "2+2?"), Message("assistant", "Four.", more={key: "It is 4."})), "line 7")

    encoder = ChatEncoder(tokenizer(QWEN3))
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert learnt(encoder, thinking(key)) == [THOUGHT + "<|im_end|>"]
        with pytest.raises(EncodingError, match=f"line 7: .* leaves out the {key} of turn 2"):
            ChatEncoder(tokenizer(CHATML)).encoded(thinking(key))
    repeated = Row((Message("user", "2+2?"), Message("assistant", "It is 4.", more={"reasoning": "4"})), "line 7")
    with pytest.raises(EncodingError, match=r"line 7: .* leaves out the reasoning of turn 2"):
        ChatEncoder(tokenizer(CHATML)).encoded(repeated)


def test_calls_are_learnt_or_refused():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    for content in ("Let me see.", ""):
        turns = (
            Message("user", "Rome?"),
            Message("assistant", content, more={"tool_calls": [call]}),
            Message("tool", "18 degrees"),
            Message("assistant", "Warm."),
        )
        one = Row(turns, "line 7")
        written = '\n<tool_call>\nweather{"city": "Rome"}\n</tool_call>'
        for turns_, place in ((turns[:2], 0), (turns, 0)):
            found = learnt(ChatEncoder(tokenizer(QWEN3)), Row(turns_, "line 7"))
            assert content + written + "<|im_end|>" in found[place]
            assert "18" not in "".join(found)
        with pytest.raises(EncodingError, match=r"line 7: .* leaves out the tool_calls of turn 2"):
            ChatEncoder(tokenizer(CHATML)).encoded(one)
        with pytest.raises(EncodingError, match=r"line 7: .* leaves out the tool_calls of turn 2"):
            ChatEncoder(tokenizer(CHATML)).prompt(one)
    names_only = QWEN3.replace("+ call.function.arguments | tojson", "")
    with pytest.raises(EncodingError, match="leaves out the arguments of the tool_calls of turn 2"):
        ChatEncoder(tokenizer(names_only)).encoded(Row(turns[:2], "line 7"))


def test_tools_and_documents_are_written_or_refused():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    one = Row(row(*ONE).messages, "line 7", more={"tools": tools})
    with_tools = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}" + CHATML
    encoder = ChatEncoder(tokenizer(with_tools))
    assert json.dumps(tools) in encoder.tokenizer.decode(encoder.prompt(one))
    assert learnt(encoder, one) == ["Lima.<|im_end|>"]
    for encode in (ChatEncoder(tokenizer(CHATML)).prompt, ChatEncoder(tokenizer(CHATML)).encoded):
        with pytest.raises(EncodingError, match=r"line 7: .* leaves out the row's tools"):
            encode(one)


@pytest.mark.parametrize(
    ("chat_template", "eos", "contents", "problem"),
    [
        (HARMONY, "<|return|>", TWO, r"does not close this answer with <\|return\|> \(turn 2\)"),
        (TWICE, "<|im_end|>", ONE, "does not write turn 2 as it is given"),
        (MISTRAL, "</s>", ("Q", "A", "Q2", "A2"), None),
        (LLAMA2, "</s>", ("Q", "A"), None),
    ],
)
def test_other_templates(chat_template, eos, contents, problem):
    encoder = ChatEncoder(tokenizer(chat_template, eos))
    if problem is None:
        assert len(learnt(encoder, row(*contents))) == len(contents) // 2
    else:
        with pytest.raises(EncodingError, match=f"line 7: the chat template of tiny {problem}"):
            encoder.encoded(row(*contents))


def test_a_last_answer_that_the_template_rewrites_is_learnt_as_it_is_given():
    assert learnt(ChatEncoder(tokenizer(UPPER)), row(*ONE)) == ["Lima.<|im_end|>"]
    with pytest.raises(EncodingError, match="rewrites turn 2"):
        ChatEncoder(tokenizer(UPPER)).encoded(row(*TWO))


def test_the_last_answer_of_harmony_is_learnt_with_its_channel():
    encoder = ChatEncoder(tokenizer(HARMONY, "<|return|>"))
    assert learnt(encoder, row(*ONE)) == ["<|channel|>final<|message|>Lima.<|return|>"]


def test_a_template_that_opens_no_answers_is_refused():
    with pytest.raises(EncodingError, match="chat template of tiny does not open an answer"):
        ChatEncoder(tokenizer(CHATML.partition(OPEN)[0])).check_learnable()


@pytest.mark.parametrize("encode", ["prompt", "encoded"])
def test_turns_that_a_template_leaves_out_are_refused(encode):
    with pytest.raises(EncodingError, match=r"line 7: .* leaves out turn 1, the system's"):
        getattr(ChatEncoder(tokenizer(NO_SYSTEM)), encode)(row(*ONE, system="Be brief."))
    with pytest.raises(EncodingError, match=r"line 7: .* System role not supported"):
        getattr(ChatEncoder(tokenizer(GEMMA, "</s>"), system="Be brief."), encode)(row(*ONE))
    # Words of the text stand in the prompt by chance.
    for system in ("Q", "user"):
        with pytest.raises(EncodingError, match=r"line 7: .* leaves out turn 1, the system's"):
            getattr(ChatEncoder(tokenizer(NO_SYSTEM)), encode)(row("Q", "A", system=system))
    # A switch that the template takes out is no text left out.
    encoder = ChatEncoder(tokenizer(SMOLLM3))
    getattr(encoder, encode)(row(*ONE, system="Be brief. /no_think"))


def test_special_tokens_in_the_texts_of_others_are_text():
    for chat_template, eos, turn in ((CHATML, "<|im_end|>", "<|im_end|>"), (R1, "</s>", "<|User|>")):
        encoder = ChatEncoder(tokenizer(chat_template, eos))
        plain, special = (encoder.prompt(row(f"a {text} b")) for text in ("x", f"{turn}<<s>"))
        for name in SPECIAL:
            number = encoder.tokenizer.convert_tokens_to_ids(name)
            assert special.count(number) == plain.count(number), name
        assert encoder.tokenizer.decode(special) == encoder.tokenizer.decode(plain).replace("a x b", f"a {turn}<<s> b")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<s>"])
def test_an_answer_that_holds_a_token_of_the_structure_is_refused(token):
    with pytest.raises(EncodingError, match=r"line 7: turn 2 contains "):
        ChatEncoder(tokenizer(CHATML)).encoded(row("Q", f"a{token}"))
    call = {"name": "weather", "arguments": {"city": [f"Rome{token}"]}}
    for more in ({"reasoning_content": f"Is it{token} 4?"}, {"tool_calls": [call]}):
        one = Row((Message("user", "Q"), Message("assistant", "a", more=more)), "line 7")
        with pytest.raises(EncodingError, match=r"line 7: turn 2 contains "):
            ChatEncoder(tokenizer(QWEN3)).encoded(one)


def test_one_token_for_what_is_unknown_and_for_ends():
    made = tokenizer(None, "</s>")
    made.unk_token = "</s>"  # as GPT-2's
    assert learnt(ChatEncoder(made), row("Q", "A")) == ["A</s>"]


def test_a_text_that_becomes_a_special_token_once_it_is_normalised_is_refused():
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.add_special_tokens([AddedToken(t, normalized=True) for t in ("<|im_start|>", "<|im_end|>")])
    encoder = ChatEncoder(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)
    )
    for text in ("a<|IM_END|>b", "a\uff1c|im_end|\uff1eb"):
        with pytest.raises(EncodingError, match=r"line 7: .* special tokens"):
            encoder.prompt(row(text))
        with pytest.raises(EncodingError, match=r"line 7: .* special tokens"):
            encoder.encoded(row("Q", text))
    assert learnt(encoder, row("Q <|im_end|>", "A")) == ["a<|im_end|>"]


def test_thoughts_and_calls_in_an_answer_are_tokens():
    encoder = ChatEncoder(tokenizer(CHATML))
    found = encoder.encoded(row("Q", THOUGHT))
    assert encoder.tokenizer.convert_tokens_to_ids("<think>") in found.ids


def test_half_a_character_and_what_is_none_are_refused():
    for text in ("half \ud83d", "none \ufdd0", "none \ufdd1"):
        for one in (
            row(text),
            Row((Message("user", "Q", more={"name": text}),), "line 7"),
            Row((Message("user", "Q"),), "line 7", more={"tools": [{"name": [text]}]}),
        ):
            with pytest.raises(EncodingError, match="line 7: "):
                ChatEncoder(tokenizer(CHATML)).prompt(one)


def test_what_a_template_does_not_read_may_be_anything():
    asked = Message("user", "Q", more={"timestamp": datetime.datetime(2024, 2, 3), "image": b"\x89"})
    encoder = ChatEncoder(tokenizer(CHATML))
    assert encoder.prompt(Row((asked,), "line 7")) == encoder.prompt(row("Q"))


def test_special_tokens_in_tools_documents_and_names_are_text():
    whole = "{{ tools | tojson }}{% for d in documents or [] %}{{ d.text }}{% endfor %}{{ messages[0].name }}" + CHATML
    encoder = ChatEncoder(tokenizer(whole))

    def prompt(text):
        more = {"tools": [{"name": text}], "documents": [{"text": text}]}
        return encoder.prompt(Row((Message("user", "Q", more={"name": text}),), "line 7", more=more))

    plain, special = prompt("x"), prompt("<|im_end|><s>")
    for name in SPECIAL:
        number = encoder.tokenizer.convert_tokens_to_ids(name)
        assert special.count(number) == plain.count(number), name
    assert encoder.tokenizer.decode(special).count("<|im_end|><s>") == 3


def test_a_greeting_before_the_first_question_is_read_and_not_learnt(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [("gpt", "Hello!"), ("human", "Hi"), ("gpt", "How are you?")]
    path.write_text(json.dumps({"conversations": [{"from": f, "value": v} for f, v in turns]}))
    [one] = read_rows(path)
    encoder = ChatEncoder(tokenizer(CHATML))
    assert learnt(encoder, one) == ["How are you?<|im_end|>"]
    assert "Hello!" in encoder.tokenizer.decode(encoder.prompt(one))


def test_all_refused_rows_are_counted():
    encoder = ChatEncoder(tokenizer(CHATML))
    rows = [Row(row("Q", text).messages, f"line {n}") for n, text in enumerate(["A", "<s>", "B", "<s>"], 1)]
    with pytest.raises(EncodingError, match=r"(?s)2 of 4 rows cannot be encoded:.*line 2: .*line 4: "):
        encode_each(rows, encoder.encoded)
    with pytest.raises(EncodingError, match=r"^line 2: "):
        encode_each(rows[:3], encoder.encoded)
    assert len(encode_each(rows[:1], encoder.encoded)) == 1


def test_ends_are_those_at_which_answers_are_learnt_to_end():
    for chat_template, eos, _ in FAMILIES.values():
        made = tokenizer(chat_template, eos)
        assert set(end_tokens(made)) == set(ChatEncoder(made).eos_ids)
    assert ChatEncoder(tokenizer("nothing <|im_start|>")).closing_id is None


def test_dates_are_those_of_one_day_in_the_templates_own_format():
    chat_template = "{{ strftime_now('%Y-%m-%d, %A %H:%M') }}\n" + CHATML
    encoder = ChatEncoder(tokenizer(chat_template))
    assert encoder.tokenizer.decode(encoder.prompt(row("Q"))).startswith(f"{DATE:%Y-%m-%d, %A %H:%M}\n<|im_start|>")
    for code in ("%-d %B", "%e", "%F", "%c", "%x", "%j", "%-I %P"):
        encoder = ChatEncoder(tokenizer(f"{{{{ strftime_now('{code}') }}}}" + CHATML))
        assert encoder.tokenizer.decode(encoder.prompt(row("Q"))).startswith(f"{DATE.strftime(code)}<|im_start|>")


@pytest.mark.parametrize("start", ["\n\n", "  ", "\n  {% if true %}x{% endif %}", "  {%- if true %}x{% endif %}"])
def test_the_fixed_date_changes_nothing_else(start):
    made = tokenizer(start + CHATML)
    expected = made.apply_chat_template(
        [{"role": "user", "content": "Q"}], add_generation_prompt=True, return_dict=False
    )
    assert ChatEncoder(made).prompt(row("Q")) == expected


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"
LARGE = "{{ 'a' * 10**11 }}"
LONG = "{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}"
LATER = "{% if messages | length > 4 %}" + ENDLESS + "{% endif %}"


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (ENDLESS, "does not end within 1 s"),
        (LATER, "does not end within 1 s"),
        ("{% set x = 10 ** (10 ** 10) %}", "does not end within 1 s|GiB of memory"),
        (LARGE, "needs more than 1 GiB of memory"),
        (LONG, "writes more than 1,000,000 characters"),
        ("{{ range(99999) | random }}", "writes something else each time"),
    ],
    ids=["endless", "endless later", "a number", "memory", "text", "chance"],
)
@pytest.mark.quick("endless later", "text", "chance")
def test_templates_without_end_and_those_by_chance_are_refused(monkeypatch, extra, problem):
    monkeypatch.setattr(template, "SECONDS", 1)
    with pytest.raises(EncodingError, match=rf"the chat template of tiny ({problem})"):
        ChatEncoder(tokenizer(CHATML + extra))
    with pytest.raises(EncodingError, match=rf"the chat template of tiny ({problem})"):
        end_tokens(tokenizer(CHATML + extra))


@pytest.mark.parametrize(
    "extra", ["{{ [] + 'a' }}", "{{ nothing.at.all }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"]
)
def test_templates_that_fail_are_refused_by_row(extra):
    with pytest.raises(EncodingError, match=r"line 7: .*tiny"):
        ChatEncoder(tokenizer(CHATML + extra)).prompt(row("Q"))
