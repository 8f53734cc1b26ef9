"""Generation against a plain loop without batches, padding or cache; what it must leave as it was."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import softmax
from transformers import AutoModelForCausalLM, GenerationConfig

from kd_common.sampling import SamplingParams
from llm_kd.models.generation import generate

V, PAD = 24, 0
CONFIGS = {
    "Llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mistral": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": 4,
    },
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5, 8, 9, 7, 9, 3], [2, 3], [8, 4, 6]]


def model(family="Llama", **settings):
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": V, "eos_token_id": None, **CONFIGS[family], **settings}
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for weight in made.parameters():
        weight.data.mul_(8 if weight.ndim > 1 else 1)  # far from uniform, so that greedy choices are clear
    return made.eval()


def respond(model, prompts=PROMPTS, sampling=GREEDY, **settings):
    options = {"eos_ids": (), "pad_id": PAD, "seed": 0, "batch_size": 3} | settings
    return generate(model, prompts, sampling, **options)


@torch.no_grad()
def plain_greedy(model, prompt, steps=12, eos_ids=(), vocab_size=V):
    """One token after the other from whole forward passes."""
    ids = list(prompt)
    for _ in range(steps):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :vocab_size]
        ids.append(int(logits.argmax()))
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batched_greedy_equals_a_plain_loop(family, batch_size):
    network = model(family)
    expected = [plain_greedy(network, prompt) for prompt in PROMPTS]
    assert len({tuple(response) for response in expected}) > 2
    assert respond(network, batch_size=batch_size) == expected


@pytest.mark.parametrize("pad_id", ["eos", PAD])
def test_responses_end_with_the_token_that_ended_them_and_hold_no_padding(pad_id):
    network = model()
    free = [plain_greedy(network, prompt) for prompt in PROMPTS]
    eos_ids = (free[0][3], free[1][1])
    expected = [plain_greedy(network, prompt, eos_ids=eos_ids) for prompt in PROMPTS]
    found = respond(network, eos_ids=eos_ids, pad_id=eos_ids[0] if pad_id == "eos" else pad_id)
    assert found == expected
    assert len({len(response) for response in found}) > 1
    for response in found:
        assert not set(response[:-1]) & set(eos_ids)
        assert response[-1] in eos_ids or len(response) == 12


def test_a_padding_token_that_the_model_writes_is_kept():
    network = model()
    free = respond(network)
    assert respond(network, pad_id=free[0][2]) == free


def test_the_same_seed_gives_the_same_responses():
    network, sampling = model(), SamplingParams(max_new_tokens=12)
    first = respond(network, sampling=sampling, seed=1)
    torch.manual_seed(77)
    assert respond(network, sampling=sampling, seed=1) == first
    assert respond(network, sampling=sampling, seed=2) != first


def test_the_random_state_stays():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    respond(model_ := model(), sampling=SamplingParams(max_new_tokens=2))
    torch.manual_seed(11)
    respond(model_, sampling=SamplingParams(max_new_tokens=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("sampling", "temperature", "kept"),
    [
        (SamplingParams(max_new_tokens=1), 1, V),
        (SamplingParams(max_new_tokens=1, temperature=2.5), 2.5, V),
        (SamplingParams(max_new_tokens=1, top_k=3), 1, 3),
    ],
)
def test_tokens_are_drawn_from_the_models_distribution(sampling, temperature, kept):
    network = model()
    for weight in network.lm_head.parameters():
        weight.data.mul_(0.1)
    draws = 4000
    found = respond(network, [PROMPTS[0]] * draws, sampling, batch_size=draws)
    with torch.no_grad():
        logits = network(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature
    top = logits.topk(kept).indices
    expected = torch.zeros(V, dtype=torch.float64).scatter(0, top, softmax(logits[top], dim=0))
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=V)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 5 * deviation).all()
    assert (expected > 0.02).sum() > 2


def test_top_p_keeps_the_smallest_set_of_that_probability():
    network = model()
    for weight in network.lm_head.parameters():
        weight.data.mul_(0.1)
    with torch.no_grad():
        probs = softmax(network(torch.tensor([PROMPTS[0]])).logits[0, -1], dim=0)
    ordered, tokens = probs.sort(descending=True)
    size = int((ordered.cumsum(0) < 0.6).sum()) + 1
    found = respond(network, [PROMPTS[0]] * 2000, SamplingParams(max_new_tokens=1, top_p=0.6), batch_size=2000)
    assert {token for (token,) in found} == set(tokens[:size].tolist())
    assert 1 < size < V


def test_no_ngram_occurs_twice():
    network = model()
    repeating = respond(network, sampling=SamplingParams(max_new_tokens=30, temperature=0))
    assert any(_repeats(p + r, 2) for p, r in zip(PROMPTS, repeating, strict=True))
    found = respond(network, sampling=SamplingParams(max_new_tokens=30, temperature=0, no_repeat_ngram_size=2))
    assert not any(_repeats(p + r, 2) for p, r in zip(PROMPTS, found, strict=True) if not _repeats(p, 2))


def _repeats(tokens, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)


def test_padding_of_the_head_is_never_generated():
    network = model()
    free = respond(network)
    limit = max(token for response in free for token in response)
    found = respond(network, vocab_size=limit)
    assert found == [plain_greedy(network, prompt, vocab_size=limit) for prompt in PROMPTS]
    drawn = respond(
        network, [PROMPTS[0]] * 500, SamplingParams(max_new_tokens=1, temperature=50), vocab_size=5, batch_size=500
    )
    assert {token for (token,) in drawn} == set(range(5))


def test_the_checkpoints_own_settings_are_neither_used_nor_lost():
    network = model()
    expected = respond(network)
    first = expected[0][0]
    own = GenerationConfig(
        repetition_penalty=50.0, suppress_tokens=[first], begin_suppress_tokens=[first], min_new_tokens=5, top_k=1,
        forced_bos_token_id=7, forced_eos_token_id=7, sequence_bias={(first,): -100.0}, max_length=3, num_beams=2,
    )  # fmt: skip
    network.generation_config = own
    assert respond(network) == expected
    assert network.generation_config is own


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_ends_of_the_models_own_settings_are_those_of_transformers(place):
    network = model()
    free = [plain_greedy(network, prompt) for prompt in PROMPTS]
    ends = [free[0][3], free[1][1]]
    getattr(network, place).eos_token_id = ends
    expected = [plain_greedy(network, prompt, eos_ids=ends) for prompt in PROMPTS]
    assert respond(network) == expected != free
    more = free[2][0]
    assert respond(network, eos_ids=[more]) == [plain_greedy(network, p, eos_ids=[*ends, more]) for p in PROMPTS]
    if place == "generation_config":
        ids = torch.tensor([PROMPTS[0]])
        reference = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert reference[0, len(PROMPTS[0]) :].tolist() == expected[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.parametrize("wrap", ["plain", "lora"])
def test_a_checkpointing_model_in_training_generates_with_a_cache_and_goes_on_training(wrap):
    network = model(attention_dropout=0.5)
    expected = respond(network)
    owner = network
    if wrap == "lora":
        network = get_peft_model(network, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    network.activation_checkpointing_enable()
    owner.config.use_cache = False  # what training with checkpoints sets
    network.train()
    owner.model.norm.eval()  # a part that stays frozen
    modes = [module.training for module in network.modules()]
    lengths = []
    hook = owner.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert respond(network, batch_size=6) == expected
    assert lengths == [8] + [1] * 11  # the prompt once, then one token at a time
    hook.remove()
    assert [module.training for module in network.modules()] == modes
    assert owner.is_activation_checkpointing
    assert owner.config.use_cache is False


def test_modes_are_restored_after_a_failure():
    network = model().train()
    own = network.generation_config

    def fail(*_):
        raise KeyError("no memory")

    network.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="no memory"):
        respond(network)
    assert network.training
    assert network.generation_config is own


def test_no_prompts_give_no_responses():
    assert respond(model(), []) == []


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a prompt holds no token"):
        respond(model(), [[1], []])
    with pytest.raises(
        ValueError, match=r"a prompt of 60 tokens and max_new_tokens=12 exceed the model's 64 positions"
    ):
        respond(model("GPT2"), [[1] * 60, [2]])
    assert len(respond(model("GPT2"), [[1] * 52])[0]) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0}, "top_p must lie in"),
        ({"top_p": 1.1}, r"top_p must lie in"),
        ({"top_k": -1}, "top_k must be"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)
