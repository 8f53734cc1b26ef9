"""DeepKD's momenta (arXiv 2505.15133) as settings of the component optimizers."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch.optim.optimizer import ParamsT

from kd_common.checks import one_of
from kd_common.errors import UserError
from kd_common.optim.adamw import DecoupledAdamW
from kd_common.optim.sgd import WEIGHT_DECAY, DecoupledSGD

Preset = Literal["paper", "released"]
COMPONENTS = ("task", "target", "nontarget")


def deepkd_momenta(
    base_momentum: float = 0.9, delta: float | Mapping[str, float] = 0.075, preset: Preset = "paper"
) -> dict[str, float]:
    """Return the momentum of the task, the target-class and the non-target-class gradient.

    Args:
        base_momentum: Momentum mu of the baseline, in [0, 1).
        delta: Distance d from it; one number, or one for each of "task", "target" and "nontarget".
        preset: "paper" uses mu + d, mu - d, mu + d. "released" uses mu - d_target, mu - d_target, mu + d_nontarget, as
            in the published optimizer: its task buffer decays with the target's momentum.

    Returns:
        Momentum per component; extend it for further components.

    Raises:
        UserError: If the preset is unknown, `delta` names other components, or a momentum leaves [0, 1).
    """
    one_of("preset", preset, ("paper", "released"))
    deltas = dict(delta) if isinstance(delta, Mapping) else dict.fromkeys(COMPONENTS, delta)
    if deltas.keys() != set(COMPONENTS):
        raise UserError(f"delta must name exactly {list(COMPONENTS)}, got {list(deltas)}")
    momenta = {
        "task": base_momentum + deltas["task"],
        "target": base_momentum - deltas["target"],
        "nontarget": base_momentum + deltas["nontarget"],
    }
    if preset == "released":
        momenta["task"] = momenta["target"]
    for name, momentum in momenta.items():
        if not 0 <= momentum < 1:
            raise UserError(
                f"the momentum of '{name}' is {momentum:g}, outside [0, 1): lower delta ({delta}) or change the base "
                f"({base_momentum})"
            )
    return momenta


def deepkd_sgd(
    params: ParamsT,
    *,
    preset: Preset = "paper",
    lr: float,
    base_momentum: float = 0.9,
    delta: float | Mapping[str, float] = 0.075,
    weight_decay: float = 0.0,
    decay_component: str | None = None,
    components: Sequence[str] = COMPONENTS,
    aliases: Mapping[str, str] | None = None,
) -> DecoupledSGD:
    """Return DeepKD's SGD.

    "paper": the weight decay is a separate component with momentum mu, so it acts exactly as in an SGD baseline of
    momentum mu. Two of the three gradients share a momentum: three buffers with weight decay, two backward passes.

    "released" reproduces the published optimizer step for step. The decay is part of the target-class gradient and
    reads the parameters after the task and the non-target gradients have moved them. This takes three buffers and three
    backward passes.

    Args:
        params: Parameters or parameter groups.
        preset: "paper" or "released".
        lr: Learning rate, >= 0.
        base_momentum: Momentum mu of the baseline.
        delta: Distance from mu, one number or one per component, as in `deepkd_momenta`.
        weight_decay: L2 coefficient, >= 0.
        decay_component: Component that carries the weight decay; None for the preset's own: "weight_decay" in the
            paper's, "target" in the released one.
        components: Components of the loss among "task", "target" and "nontarget".
        aliases: Further components, each with the component that has its momentum, as in `{"relation": "nontarget"}`.

    Returns:
        The optimizer; `DecoupledSGD.step` takes the gradients of `components` and `aliases`.

    Raises:
        UserError: If a momentum leaves [0, 1), a component is unknown, or the released preset is asked for another
            decay component.
    """
    default = WEIGHT_DECAY if preset == "paper" else "target"
    decay_component = default if decay_component is None else decay_component
    if preset == "released" and decay_component != default:
        raise UserError(f"preset 'released' decays within '{default}', got decay_component='{decay_component}'")
    momenta = _select(deepkd_momenta(base_momentum, delta, preset), components, aliases or {})
    if decay_component == WEIGHT_DECAY:
        momenta[WEIGHT_DECAY] = base_momentum
    return DecoupledSGD(
        params, lr, momenta, weight_decay, decay_component=decay_component, decay_last=preset == "released"
    )


def deepkd_adamw(
    params: ParamsT,
    *,
    lr: float,
    base_beta1: float = 0.9,
    delta: float | Mapping[str, float] = 0.075,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    components: Sequence[str] = COMPONENTS,
    aliases: Mapping[str, str] | None = None,
) -> DecoupledAdamW:
    """Return AdamW with the paper's rule applied to beta1: mu + d, mu - d, mu + d; two backward passes.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, >= 0.
        base_beta1: beta1 of the baseline.
        delta: Distance from the base, one number or one per component, as in `deepkd_momenta`.
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the square root of the second moment, >= 0.
        weight_decay: Decoupled weight decay, >= 0.
        components: Components of the loss, as in `deepkd_sgd`.
        aliases: Further components, as in `deepkd_sgd`.

    Returns:
        The optimizer; `DecoupledAdamW.step` takes the gradients of `components` and `aliases`.

    Raises:
        UserError: If a beta1 leaves [0, 1) or a component is unknown.
    """
    beta1s = _select(deepkd_momenta(base_beta1, delta), components, aliases or {})
    return DecoupledAdamW(params, lr, beta1s, beta2, eps, weight_decay)


def _select(
    coefficients: Mapping[str, float], components: Sequence[str], aliases: Mapping[str, str]
) -> dict[str, float]:
    """Return the coefficients of the components in use and of the aliases."""
    if unknown := sorted({*components, *aliases.values()} - coefficients.keys()):
        raise UserError(f"unknown components {unknown}: known are {list(coefficients)}; name others in aliases")
    if clashes := sorted(aliases.keys() & {*coefficients, WEIGHT_DECAY}):
        raise UserError(f"aliases {clashes} are names with a momentum of their own")
    return {name: coefficients[name] for name in components} | {
        name: coefficients[like] for name, like in aliases.items()
    }
