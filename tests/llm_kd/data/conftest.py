"""A small byte-level tokenizer and the chat templates of well-known model families."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_common.text import Message, Row

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Header and end-of-turn tokens and a BOS, as Llama 3 has them; the content is trimmed, the date is printed.
LLAMA3 = (
    "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') + '\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# No special tokens around the turns but the EOS, and another name for the assistant; no system turn.
PLAIN_HEADINGS = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system turn, please') }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% else %}{{ ' MODEL: ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' MODEL:' }}{% endif %}"
)
# Qwen 3 opens the thoughts of the last answer only.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "headings": PLAIN_HEADINGS, "thinking": THINKING}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<s>", "<pad>"]
CORPUS = [
    "assistant\n\nThe answer to the question is the sum of the numbers.\n\n\n",
    "### Instruction:\nHello there, name the capital.\n\n### Response:\nuser system assistant",
]


class Text:
    """What the tests of the data share; every method is a plain function of its arguments."""

    templates = TEMPLATES

    @staticmethod
    def tokenizer(template=CHATML, eos="<|im_end|>", pad="<|im_end|>"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS * 3, trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=pad)
        made.chat_template = template
        made.name_or_path = "tiny"
        return made

    @staticmethod
    def row(*contents, system=None):
        """Turns of user and assistant by turns, the user first."""
        turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
        return Row((*([Message("system", system)] if system else []), *turns), "file.jsonl, line 7")


@pytest.fixture
def text():
    return Text


@pytest.fixture
def teacher(text):
    """A tiny model with random weights over the tokenizer's vocabulary."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(text.tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()
