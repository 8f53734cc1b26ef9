"""A causal language model in two parts: the body, which yields hidden states, and the head, which KDHead runs."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_common.hub import load_causal_lm
from llm_kd.head import LMHead
from llm_kd.models.prune import decoder_layers, depth_prune
from llm_kd.models.specs import LoRASpec, StudentSpec, TeacherSpec


class Body(nn.Module):
    """A causal language model that stops at its last hidden states.

    Args:
        model: Causal language model of transformers, or a PEFT model around one.

    Raises:
        ValueError: If its logits are not finite or not what :class:`LMHead` computes from these hidden states, or its
            head has adapters.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        _check_head(self)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model itself, without PEFT's wrapper."""
        unwrap = getattr(self.model, "get_base_model", None)
        return self.model if unwrap is None else unwrap()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
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
        return inner(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def lm_head(self) -> LMHead:
        """The output layer: weight (V, H), bias and soft-cap."""
        layer = self.causal_lm.get_output_embeddings()
        return LMHead(layer.weight, layer.bias, getattr(self.causal_lm.config, "final_logit_softcapping", None))

    def merged(self) -> PreTrainedModel:
        """The model to save: adapters merged into a copy of the weights; the model itself when there are none."""
        if self.model is self.causal_lm:
            return self.model
        adapted: Any = copy.deepcopy(self.model)
        return adapted.merge_and_unload()


@torch.no_grad()
def _check_head(body: Body) -> None:
    """Compare the head with the model's own logits on a few tokens: some architectures scale theirs."""
    model = body.causal_lm
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{type(model).__name__}: the output layer is a {type(layer).__name__}, which the distillation head cannot "
            "run; leave the output layer out of student.lora.targets"
        )
    tokens = torch.arange(4, device=layer.weight.device)[None]
    head = body.lm_head()
    logits = nn.functional.linear(body(tokens, tokens), head.weight, head.bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    expected = model(input_ids=tokens, position_ids=tokens, use_cache=False).logits.float()
    if not expected.isfinite().all():
        raise ValueError(
            f"{model.config.name_or_path}: the logits are not finite: the weights hold NaN or infinity, or overflow in "
            f"{model.dtype}; try float32"
        )
    if not torch.allclose(logits, expected, atol=0.05 * float(expected.abs().max()), rtol=0):
        raise ValueError(
            f"{type(model).__name__} turns hidden states into logits in a way the distillation head does not know; "
            "supported are a linear layer with an optional bias and soft-cap"
        )


def load_teacher(spec: TeacherSpec) -> Body:
    """The teacher of a run, frozen and in evaluation mode.

    Raises:
        ModelNotFoundError: If the model cannot be found.
        ValueError: If it cannot be used.
    """
    return Body(load_causal_lm(spec.name, spec.dtype, attention=spec.attention)).eval().requires_grad_(False)


def build_student(spec: StudentSpec, teacher_name: str) -> Body:
    """The student of a run before training.

    Args:
        spec: The student.
        teacher_name: What it starts from when it has no name of its own.

    Raises:
        ModelNotFoundError: If the model cannot be found.
        ValueError: If it cannot be used or has too few layers.
    """
    model = load_causal_lm(spec.name or teacher_name, spec.dtype, attention=spec.attention)
    if spec.layers != "all":
        model = depth_prune(model, spec.layers)
    if spec.lora is not None:
        model = add_adapters(model, spec.lora)
    return Body(model)


def add_adapters(model: PreTrainedModel, spec: LoRASpec) -> PreTrainedModel:
    """The model with low-rank adapters; everything else is frozen.

    Raises:
        ModuleNotFoundError: If ``peft`` is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("student.lora needs peft: install llm-kd[lora] or `pip install peft`") from error
    targets: str | list[str] = spec.targets[0] if spec.targets == ["all-linear"] else spec.targets
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return cast(PreTrainedModel, get_peft_model(model, config))  # passes on everything used here
