"""Batches: alignment of what is predicted, packing that changes nothing a model computes, and moving."""

import pytest
import torch
import transformers
from lightning.fabric.utilities import move_data_to_device
from transformers import AutoModelForCausalLM
from transformers.masking_utils import find_packed_sequence_indices

from llm_kd.data.batch import collate, pack
from llm_kd.data.example import Example, padding_example, prompt_response_example

PAD = 0
SHAPE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "Llama": LLAMA_LIKE,
    "Qwen2": LLAMA_LIKE,
    "Mistral": LLAMA_LIKE | {"sliding_window": 4},
    "Gemma2": LLAMA_LIKE | {"head_dim": 8, "sliding_window": 4},
    "GPT2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def example(length, seed, prompt=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (length,), generator=generator).tolist()
    return Example(ids, [False] * prompt + [True] * (length - prompt), prompt, f"reference {seed}")


A, B, C, D = example(5, 1), example(7, 2), example(3, 3), example(9, 4, prompt=8)


def backbone(family):
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family])
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().base_model


def hidden(model, batch):
    with torch.no_grad():
        return model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state


def test_every_field_of_a_packed_batch():
    first = Example([5, 6, 7, 8], [False, False, True, True], 2)
    second = Example([9, 10, 11], [False, True, False], 1)
    third = Example([12, 13], [False, True], 1)
    batch = collate([[first, second], [third]], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11], [12, 13, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.predict.int().tolist() == [[0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    x = -100
    assert batch.labels.tolist() == [[x, 7, 8, x, 10, x, x], [13, x, x, x, x, x, x]]
    assert batch.keys == [first.key, second.key, third.key]
    assert batch.prompts == [[5, 6], [9], [12]]
    assert [t.dtype for t in (batch.input_ids, batch.position_ids, batch.labels)] == [torch.int64] * 3
    assert batch.predict.dtype == torch.bool


def test_transformers_needs_no_mask_unless_a_row_is_packed():
    assert find_packed_sequence_indices(collate([[A], [B], [C]], PAD).position_ids) is None
    assert find_packed_sequence_indices(collate([[A, B], [C]], PAD).position_ids) is not None


def test_rows_of_hidden_states_follow_the_keys():
    examples = {e.key: e for e in (A, B, C, D)}
    batch = collate([[B, C], [D, A]], PAD)
    expected = [
        token
        for key in batch.keys
        for token, loss in zip(examples[key].input_ids, examples[key].loss_mask, strict=True)
        if loss
    ]
    assert batch.labels[batch.predict].tolist() == expected
    assert len(expected) == sum(e.num_supervised for e in examples.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_and_padded_hidden_states_equal_those_of_each_sequence_alone(family):
    model = backbone(family)
    alone = torch.cat([hidden(model, batch)[batch.predict] for e in (A, B, C, D) for batch in [collate([[e]], PAD)]])
    # Gemma normalises in float32, whatever the model's precision.
    for rows in ([[A], [B], [C], [D]], [[A, B], [C, D]], [[A, B, C, D]]):
        batch = collate(rows, PAD)
        torch.testing.assert_close(hidden(model, batch)[batch.predict], alone, rtol=0, atol=2e-6)
    one_sequence = collate([[A, B, C, D]], PAD)
    one_sequence.position_ids[:] = torch.arange(one_sequence.input_ids.shape[1])
    mixed = hidden(model, one_sequence)[one_sequence.predict]
    assert not torch.allclose(mixed, alone, rtol=1e-3)  # the positions do keep them apart


def test_an_example_without_a_loss_stands_in_its_row_alone():
    batch = collate([[padding_example(7)], [prompt_response_example([8, 9], [], "")], [A]], PAD)
    assert batch.input_ids[:2].tolist() == [[7, 0, 0, 0, 0], [8, 9, 0, 0, 0]]
    assert not batch.predict[:2].any()
    assert (batch.keys, batch.prompts) == ([A.key], [[8, 9], A.input_ids[:2]])


def test_lightning_moves_a_batch():
    batch = collate([[A], [B]], PAD)
    moved = move_data_to_device(batch, torch.device("meta"))
    tensors = (moved.input_ids, moved.position_ids, moved.predict, moved.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.keys, moved.prompts) == (batch.keys, batch.prompts)
    assert batch.input_ids.device.type == "cpu"


def first_fit(lengths, order, capacity):
    """The definition, without the search over arrays."""
    rows = []
    for number in order:
        for row in rows:
            if sum(lengths[n] for n in row) + lengths[number] <= capacity:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


def test_packing_is_first_fit_in_the_order_given():
    assert pack([5, 6, 4, 3, 2], [0, 1, 2, 3, 4], 10) == [[0, 2], [1, 3], [4]]
    lengths = torch.randint(1, 30, (200,)).tolist()
    order = torch.randperm(200).tolist()
    rows = pack(lengths, order, 64)
    assert rows == first_fit(lengths, order, 64)
    assert sorted(n for row in rows for n in row) == list(range(200))
    assert max(sum(lengths[n] for n in row) for row in rows) <= 64
