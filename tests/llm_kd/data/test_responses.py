"""Responses of a teacher: what they are, what determines them, and that they are written once."""

import pytest
import torch
from tokenizers import decoders

from kd_common.files import cache_root
from kd_common.sampling import SamplingParams
from llm_kd.data import responses as module
from llm_kd.data.responses import write_responses
from llm_kd.models.fingerprint import tensors_fingerprint
from llm_kd.models.generation import generate

PROMPTS = [[10 + i] * (1 + i % 4) for i in range(11)]
SAMPLING = SamplingParams(max_new_tokens=5)


@pytest.fixture
def write(text, teacher):
    tokenizer = text.tokenizer()

    def write(
        model=teacher, prompts=PROMPTS, sampling=SAMPLING, eos_ids=(1,), seed=0, batch_size=4, tokenizer=tokenizer
    ):
        return write_responses(
            model,
            prompts,
            sampling,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            pad_id=1,
            seed=seed,
            batch_size=batch_size,
            progress_bar=False,
        )

    return write


@pytest.fixture
def files():
    """Files of responses in the cache, without locks."""
    folder = cache_root() / "responses"
    return lambda: sorted(path for path in folder.glob("*") if path.suffix != ".lock")


@pytest.fixture
def no_generation(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the teacher was asked again")

    return lambda: monkeypatch.setattr(module, "generate", forbidden)


def test_responses_stand_in_the_order_of_the_prompts(write, text, teacher):
    greedy = SamplingParams(max_new_tokens=5, temperature=0)
    tokenizer = text.tokenizer()
    alone = [generate(teacher, [p], greedy, eos_ids=(1,), pad_id=1, seed=0, batch_size=1)[0] for p in PROMPTS]
    found = write(sampling=greedy)
    assert [response.tokens for response in found] == alone
    assert [r.text for r in found] == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in alone]
    assert len({tuple(tokens) for tokens in alone}) > 3


def test_they_are_written_once(write, files, teacher, no_generation):
    teacher.config._name_or_path = "owner/some-model"
    first = write()
    (path,) = files()
    assert path.name.startswith("some-model-")
    no_generation()
    assert write() == first


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": PROMPTS[1:]},
        {"prompts": PROMPTS[::-1]},
        {"sampling": SamplingParams(max_new_tokens=5, top_k=2)},
        {"seed": 1},
        {"eos_ids": (1, 2)},
    ],
)
def test_whatever_determines_them_has_its_own_file(write, files, changed):
    write()
    write(**changed)
    assert len(files()) == 2


def test_only_new_prompts_are_answered(write, files, monkeypatch):
    first = write()
    asked = []
    monkeypatch.setattr(module, "generate", lambda m, p, *a, **k: asked.extend(p) or generate(m, p, *a, **k))
    new = [[30, 31], [32]]
    again = write(prompts=[*PROMPTS[::-1], *new, PROMPTS[0]])
    assert again[: len(PROMPTS)] == first[::-1]
    assert sorted(asked) == sorted([*new, PROMPTS[0]])  # one that occurs once more is drawn once more
    assert len(files()) == 2
    asked.clear()
    write(seed=1)
    write(sampling=SamplingParams(max_new_tokens=6))
    assert len(asked) == 2 * len(PROMPTS)


def change_a_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


def change_the_configuration(model):
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("change", [change_a_weight, change_the_configuration])
def test_another_model_has_its_own_file(write, files, teacher, change):
    write()
    change(teacher)
    write()
    assert len(files()) == 2


def test_ends_that_the_model_names_are_ends(write, files, teacher):
    free = write(sampling=SamplingParams(max_new_tokens=5, temperature=0))
    end = free[0].tokens[1]
    teacher.generation_config.eos_token_id = [end]
    ended = write(sampling=SamplingParams(max_new_tokens=5, temperature=0))
    assert ended[0].tokens == free[0].tokens[: free[0].tokens.index(end) + 1]
    assert len(files()) == 2


def test_the_text_is_that_of_the_tokenizer_at_hand(write, text):
    first = write()
    tokenizer = text.tokenizer()
    tokenizer._tokenizer.decoder = decoders.Sequence([tokenizer._tokenizer.decoder, decoders.Replace("a", "A")])
    again = write(tokenizer=tokenizer)
    assert [response.tokens for response in again] == [response.tokens for response in first]
    texts = [tokenizer.decode(response.tokens, skip_special_tokens=True) for response in first]
    assert [response.text for response in again] == texts


def test_a_fingerprint_depends_on_names_shapes_precisions_and_values():
    a = torch.arange(6.0)
    variants = [{"x": a}, {"y": a}, {"x": a.view(2, 3)}, {"x": a.double()}, {"x": -a}, {"x": a, "y": a}]
    made = [*map(tensors_fingerprint, variants), tensors_fingerprint({"x": a}, "note")]
    assert len(set(made)) == len(made)
    assert tensors_fingerprint({"x": a, "none": None}) == tensors_fingerprint({"x": a.clone()})
    # scalars, bfloat16 and transposed tensors, too
    odd = [{"x": a.bfloat16()}, {"x": torch.tensor(3)}, {"x": torch.tensor(4)}, {"x": a.view(2, 3).T}]
    assert len(set(map(tensors_fingerprint, odd))) == 4
