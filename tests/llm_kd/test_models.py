"""Splitting causal language models into backbone and head, pruning, adapters and vocabularies."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kd_common.hub.language_models import ModelNotFoundError, load_tokenizer
from kd_common.hub.vocabulary import shared_vocabulary, vocabulary_size
from llm_kd.models import Backbone, LoRASpec, StudentSpec, TeacherSpec, build_student, depth_prune, load_teacher
from llm_kd.models.prune import decoder_layers, evenly_spaced

ARCHITECTURES = ["llama", "qwen2", "mistral", "gemma2", "gpt2"]
TOKENS = torch.randint(0, 258, (2, 9), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(9).expand(2, 9)


def head_logits(backbone, hidden):
    weight, bias, softcap = backbone.lm_head()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backbone_and_head_are_the_model(make_model, architecture):
    model = make_model(architecture)
    backbone = Backbone(model)
    expected = model(input_ids=TOKENS).logits
    torch.testing.assert_close(head_logits(backbone, backbone(TOKENS, POSITIONS)), expected, rtol=1e-5, atol=1e-5)
    assert len(backbone.layers) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_sequences_do_not_see_each_other(make_model, architecture):
    backbone = Backbone(make_model(architecture))
    apart = [backbone(TOKENS[:1, :5], POSITIONS[:1, :5]), backbone(TOKENS[1:, :4], POSITIONS[:1, :4])]
    packed = backbone(torch.cat([TOKENS[:1, :5], TOKENS[1:, :4]], dim=1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-5, atol=1e-5)


def test_a_model_that_scales_its_logits_otherwise_is_refused(make_model):
    model = make_model()
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="turns hidden states into logits in a way"):
        Backbone(model)


@pytest.mark.parametrize(
    ("total", "keep", "expected"), [(30, 1, [0]), (30, 2, [0, 29]), (5, 3, [0, 2, 4]), (4, 4, [0, 1, 2, 3])]
)
def test_layers_are_evenly_spaced(total, keep, expected):
    assert evenly_spaced(total, keep) == expected


@pytest.mark.parametrize("keep", range(1, 31))
def test_no_layer_is_taken_twice(keep):
    kept = evenly_spaced(30, keep)
    assert len(set(kept)) == keep
    assert kept == sorted(kept)


@pytest.mark.parametrize("keep", [0, 4])
def test_more_layers_than_there_are(make_model, keep):
    with pytest.raises(ValueError, match=r"student.layers must lie in \[1, 3\]"):
        depth_prune(make_model(), keep)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruning_equals_skipping_the_dropped_layers(make_model, architecture):
    model = make_model(architecture, layers=5)
    pruned = depth_prune(model, 3)
    skipping = copy.deepcopy(model)
    layers = decoder_layers(skipping)[1]
    kept = torch.nn.ModuleList(layers[i] for i in (0, 2, 4))
    parent = skipping.base_model
    parent.h = kept  # GPT-2's name
    parent.layers = kept
    skipping.config.num_hidden_layers = 3
    skipping.base_model.config.num_hidden_layers = 3
    if hasattr(skipping.config, "layer_types"):
        skipping.config.layer_types = [skipping.config.layer_types[i] for i in (0, 2, 4)]
    expected = skipping(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(pruned(input_ids=TOKENS).logits, expected)
    assert pruned.get_output_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    tied = model.config.tie_word_embeddings
    assert (pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight) == tied


def test_all_layers_kept_is_the_same_model(make_model):
    model = make_model()
    torch.testing.assert_close(depth_prune(model, 3)(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)


def test_a_teacher_is_frozen_and_a_student_is_not(save_model):
    folder = save_model()
    teacher, student = load_teacher(TeacherSpec(folder)), build_student(StudentSpec(layers=2), folder)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert len(student.layers) == 2
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        load_teacher(TeacherSpec("nowhere"))


def test_adapters_alone_are_trained_and_can_be_merged(save_model):
    folder = save_model()
    student = build_student(StudentSpec(lora=LoRASpec(rank=2)), folder)
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    plain = load_teacher(TeacherSpec(folder))
    torch.testing.assert_close(student(TOKENS, POSITIONS), plain(TOKENS, POSITIONS))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted = student(TOKENS, POSITIONS)
    assert not torch.allclose(adapted, plain(TOKENS, POSITIONS))
    merged = student.merged()
    torch.testing.assert_close(Backbone(merged)(TOKENS, POSITIONS), adapted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize(("setting", "match"), [({"rank": 0}, "rank"), ({"dropout": 1.0}, "dropout")])
def test_adapter_settings(setting, match):
    with pytest.raises(ValueError, match=f"student.lora.{match}"):
        LoRASpec(**setting)


def test_an_adapter_on_the_head_is_refused(save_model):
    with pytest.raises(ValueError, match=r"leave the output layer out of student\.lora\.targets"):
        build_student(StudentSpec(lora=LoRASpec(targets=["lm_head"])), save_model(tie_word_embeddings=False))


def test_padded_vocabularies_share_the_tokenizers_size(save_model, make_model):
    tokenizer = load_tokenizer(save_model())
    wide, narrow = make_model(vocab=320).config, make_model(vocab=264).config
    assert shared_vocabulary(tokenizer, tokenizer, wide, narrow) == 258
    with pytest.raises(ValueError, match="the student has 200 rows, but its tokenizer has ids up to 257"):
        shared_vocabulary(tokenizer, tokenizer, wide, make_model(vocab=200, pad_token_id=0, eos_token_id=0).config)


def test_a_vocabulary_with_holes_reaches_to_its_largest_id():
    """Its last token ends a turn; counting tokens would leave it out of the head."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "<end>": 9})), eos_token="<end>"
    )
    assert len(tokenizer) == 3
    assert vocabulary_size(tokenizer) == tokenizer.eos_token_id + 1 == 10


def test_different_tokenizers_are_named(save_model):
    teacher, student = load_tokenizer(save_model()), load_tokenizer(save_model("other"))
    student.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"1 tokens differ: '<extra>' \(None against 258\)"):
        shared_vocabulary(teacher, student, None, None)
