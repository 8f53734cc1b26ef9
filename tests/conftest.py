"""Shared fixtures: every test starts from the same seed and leaves global state as it found it."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; processes that tests start inherit it
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a parametrised test that is marked `quick(*cases)`, the other cases are slow."""
    for item in items:
        if (mark := item.get_closest_marker("quick")) and item.callspec.id not in mark.args:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _clean_global_state():
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    environ = dict(os.environ)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    for key in set(os.environ) - set(environ):
        del os.environ[key]
    os.environ.update(environ)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def byte_tokenizer():
    """258 tokens: every byte, and ChatML's two marks; the end of a turn is also the padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chatml = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=chatml
    )


@pytest.fixture(scope="session")
def save_llama(byte_tokenizer):
    """Save a tiny random Llama with the byte tokenizer in a folder; keywords are further settings of LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd_common.hub.language_models import quiet

    def save(folder, **settings):
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.3,
            **settings,
        )
        with quiet():
            LlamaForCausalLM(config).save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def _converted_models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch, _converted_models):
    """Keep what tests cache out of the user's cache; the embedded model, slow to convert, is converted once for all."""
    cache = tmp_path_factory.mktemp("kd_cache")
    (cache / "models").symlink_to(_converted_models)
    monkeypatch.setenv("KD_CACHE", str(cache))


@pytest.fixture
def assert_live():
    """Check that a run's TensorBoard file holds every value its report reads, and these figures besides."""

    def check(folder, figures):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        from kd_common.run.report import read_metrics

        board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for name, (steps, values) in read_metrics(folder).items():
            events = {event.step: event.value for event in board.Scalars(name)}
            assert events == pytest.approx(dict(zip(steps.tolist(), values.tolist(), strict=True)), rel=1e-5), name
        assert set(board.Tags()["images"]) == {f"figures/{figure}" for figure in figures}

    return check
