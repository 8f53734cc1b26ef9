"""A causal language model in two parts: the backbone, which yields hidden states, and the head, which KDHead runs."""

import copy
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from kd_common.errors import UserError
from kd_common.hub.language_models import load_causal_lm, note_unapplied, settings_with_effect
from llm_kd.head import LMHead
from llm_kd.models.prune import decoder_layers, depth_prune
from llm_kd.models.specs import LoRASpec, StudentSpec, TeacherSpec

SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of generation without effect unless ``do_sample``."""

BEAMS_ONLY = ("early_stopping", "length_penalty")
"""Settings of generation without effect unless ``num_beams`` > 1."""


LARGE_LOGIT = 100.0
"""Size of the logits at which the head is compared: beyond the caps in use, 30 for Gemma 2."""

PROBE = 12
"""Tokens of each conversation on which packing is tried: more than the convolutions of state-space models span."""


class Backbone(nn.Module):
    """A causal language model that stops at its last hidden states.

    Args:
        model: Causal language model of transformers, or a PEFT model around one.

    Raises:
        UserError: If its logits are not finite or not what `LMHead` computes from these hidden states, or its
            head has adapters.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        _check_head(self)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """Return the transformers model itself, without PEFT's wrapper."""
        unwrap = getattr(self.model, "get_base_model", None)
        return self.model if unwrap is None else unwrap()

    @property
    def layers(self) -> nn.ModuleList:
        """Return the decoder layers."""
        return decoder_layers(self.causal_lm)[1]

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states before the head.

        Args:
            input_ids: Token ids of shape (B, S).
            position_ids: Positions of shape (B, S); a sequence starts wherever they restart at 0.

        Returns:
            Shape (B, S, H).
        """
        inner = self.causal_lm.base_model
        if inner is self.causal_lm:  # as Llama 4, whose prefix is that of its multimodal whole
            inner = self.causal_lm.model
        return inner(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def lm_head(self) -> LMHead:
        """Return the output layer: weight (V, H), bias and soft-cap."""
        layer = self.causal_lm.get_output_embeddings()
        return LMHead(layer.weight, layer.bias, getattr(self.causal_lm.config, "final_logit_softcapping", None))

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide on its output besides the weights: the configuration."""
        return settings_with_effect(self.causal_lm.config.to_dict())

    def merged(self) -> PreTrainedModel:
        """Return the model to save: a copy with its adapters merged, or the model itself without adapters."""
        if self.model is self.causal_lm:
            return self.model
        adapted: Any = copy.deepcopy(self.model)
        return adapted.merge_and_unload()


@torch.no_grad()
def _check_head(backbone: Backbone) -> None:
    """Compare the head with the model's own logits on a few tokens: some architectures scale or cap theirs.

    The second row enters the output layer so large that a cap shows, whatever its name.
    """
    model = backbone.causal_lm
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{type(model).__name__}: the output layer is a {type(layer).__name__}, which the distillation head cannot "
            "run; leave the output layer out of student.lora.targets"
        )
    tokens = torch.arange(4, device=layer.weight.device).expand(2, -1)
    head = backbone.lm_head()
    hidden = backbone(tokens, tokens).to(head.weight.dtype)
    plain = nn.functional.linear(hidden[1], head.weight, head.bias)
    factor = torch.ones_like(hidden[:, :1, :1])
    factor[1] = LARGE_LOGIT / plain.abs().max().clamp(min=torch.finfo(plain.dtype).tiny)
    with layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:])):
        expected = model(input_ids=tokens, position_ids=tokens, use_cache=False).logits.float()
    logits = nn.functional.linear(hidden * factor, head.weight, head.bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if not expected.isfinite().all():
        raise UserError(
            f"{model.config.name_or_path}: the logits are not finite: the weights hold NaN or infinity, or overflow in "
            f"{model.dtype}; try float32"
        )
    # Of the same operations in another order, for one may compute in float32 what the other rounds to its precision.
    tolerance = 8 * torch.finfo(model.dtype).eps
    for found, wanted in zip(logits, expected, strict=True):
        if not torch.allclose(found, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0):
            raise UserError(
                f"{type(model).__name__} turns hidden states into logits in a way the distillation head does not know; "
                "supported are a linear layer with an optional bias and soft-cap"
            )


@torch.no_grad()
def check_packing(backbone: Backbone, role: str) -> None:
    """Refuse to pack conversations for a model that lets them see each other, found out on a few tokens.

    Args:
        backbone: The model.
        role: What it is called in the message.

    Raises:
        UserError: If its hidden states in a packed row are not those of the conversations on their own.
    """
    weight = backbone.lm_head().weight
    first, second, other = (torch.arange(3 * PROBE, device=weight.device) % len(weight)).split(PROBE)
    places = torch.arange(PROBE, device=weight.device)
    was_training = backbone.training
    backbone.eval()
    rows = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
    one, another = backbone.forward(rows, places.repeat(2).expand(2, -1))[:, PROBE:].double()
    alone = backbone.forward(second[None], places[None])[0].double()
    backbone.train(was_training)
    # Medians: rounding may send a token to other experts of a mixture.
    moved, shifted = (
        float(((one - states).norm(dim=1) / alone.norm(dim=1).clamp(min=1e-30)).median()) for states in (another, alone)
    )
    eps = torch.finfo(backbone.causal_lm.dtype).eps
    # Behind another conversation the same is computed in the same order; on its own, in another one.
    if moved > 8 * eps or shifted > eps**0.5:
        raise UserError(
            f"data.packing: in the {role}, {type(backbone.causal_lm).__name__}, the conversations of a packed row "
            "would see each other; set data.packing to false"
        )


def load_teacher(spec: TeacherSpec) -> Backbone:
    """Load the teacher of a run, frozen and in evaluation mode.

    Raises:
        ModelNotFoundError: If the model cannot be found.
        UserError: If it cannot be used.
    """
    rank_zero_only(note_unapplied)(spec.name)
    return Backbone(load_causal_lm(spec.name, spec.dtype, attention=spec.attention)).eval().requires_grad_(False)


def build_student(spec: StudentSpec, teacher_name: str) -> Backbone:
    """Build the student of a run before training.

    Args:
        spec: The student.
        teacher_name: What it starts from when it has no name of its own.

    Raises:
        ModelNotFoundError: If the model cannot be found.
        UserError: If it cannot be used or has too few layers.
    """
    name = spec.name or teacher_name
    model = load_causal_lm(name, spec.dtype, attention=spec.attention)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"student {name}: its weights are quantised and cannot be trained; give an unquantised model")
    make_savable(model.generation_config, name)
    if spec.layers != "all":
        model = depth_prune(model, spec.layers)
    if spec.lora is not None:
        model = add_adapters(model, spec.lora)
    return Backbone(model)


def make_savable(settings: GenerationConfig, name: str) -> None:
    """Leave out what settings of generation say of modes that they do not choose: transformers refuses to save that.

    Args:
        settings: Changed in place; they generate as before.
        name: The model's, for messages.

    Raises:
        UserError: If they contradict themselves in another way.
    """
    unused = {} if settings.do_sample is True else dict.fromkeys(SAMPLING_ONLY)
    if settings.num_beams in (None, 1):
        unused |= dict.fromkeys(BEAMS_ONLY)
    dropped = {key: value for key in unused if (value := getattr(settings, key, None)) is not None}
    if _fault(settings) is None:
        return
    for key in dropped:
        setattr(settings, key, None)
    if (fault := _fault(settings)) is not None:
        raise UserError(f"{name}: generation_config.json cannot be saved again: {fault}. Mend it first")
    listed = ", ".join(f"{key} {value}" for key, value in dropped.items())
    rank_zero_info(f"{name}: generation_config.json sets {listed} without effect; the student is saved without")


def _fault(settings: GenerationConfig) -> str | None:
    """Why settings of generation would not be saved; None if they would."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def add_adapters(model: PreTrainedModel, spec: LoRASpec) -> PreTrainedModel:
    """Return the model with low-rank adapters; everything else is frozen.

    Raises:
        UserError: If `peft` is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise UserError("student.lora needs peft: install llm-kd[lora] or `pip install peft`") from error
    targets: str | list[str] = spec.targets[0] if spec.targets == ["all-linear"] else spec.targets
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return cast(PreTrainedModel, get_peft_model(model, config))  # passes on everything used here
