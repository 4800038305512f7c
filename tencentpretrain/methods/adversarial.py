"""Adversarial training of embeddings: gradients that also hold for the worst nearby weights.

Perturbed is every trainable parameter whose name contains "embedding", position and segment tables and norms included,
each by its own norm, as in the published fine-tuning scripts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

Backward = Callable[[], object]
"""Runs forward and backward once on the current batch, adding to the gradients."""


class AdversarialMethod(ABC):
    """Adds gradients at perturbed weights to those already there; the weights are afterwards what they were."""

    @abstractmethod
    def add_gradients(self, model: nn.Module, backward: Backward) -> None:
        """Runs after the ordinary backward pass and before the update."""


class FastGradient(AdversarialMethod):
    """One step of length epsilon along the gradient (Miyato et al., 2017, arXiv:1605.07725, equation 5)."""

    def __init__(self, *, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon

    def add_gradients(self, model: nn.Module, backward: Backward) -> None:
        """Adds the gradients at the perturbed weights to those already there."""
        weights = _perturbed(model)
        originals = _copies(weights)
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(_direction(weight), alpha=self.epsilon)
        try:
            backward()
        finally:
            _restore(weights, originals)


class ProjectedGradient(AdversarialMethod):
    """K steps of length alpha within a ball (Madry et al., 2018, arXiv:1706.06083, section 2.1, with the L2 norm).

    The gradients of the steps before the last only steer; those of the ordinary pass and of the last step add up.
    """

    def __init__(self, *, steps: int = 3, epsilon: float = 1.0, alpha: float = 0.3) -> None:
        self.steps = steps
        self.epsilon = epsilon
        self.alpha = alpha

    def add_gradients(self, model: nn.Module, backward: Backward) -> None:
        """Adds the gradients at the last perturbed weights to those of the ordinary pass."""
        weights = _perturbed(model)
        originals = _copies(weights)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        try:
            for step in range(self.steps):
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.add_(_direction(weight), alpha=self.alpha)
                        weight.copy_(_project(weight, originals[name], self.epsilon))
                last = step == self.steps - 1
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient if last else None
                backward()
        finally:
            _restore(weights, originals)


def _perturbed(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "embedding" in name and parameter.grad is not None
    }


def _copies(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _restore(weights: dict[str, nn.Parameter], originals: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(originals[name])


def _direction(weight: nn.Parameter) -> Tensor:
    """Returns the gradient at length 1; nothing where it is zero or not finite."""
    if weight.grad is None:
        return torch.zeros_like(weight)
    norm = weight.grad.norm()
    usable = torch.isfinite(norm) & (norm > 0)
    return torch.where(usable, weight.grad / norm, torch.zeros_like(weight.grad))


def _project(weight: Tensor, original: Tensor, radius: float) -> Tensor:
    """Returns the point nearest to `weight` within `radius` around `original`."""
    shift = weight - original
    inside: Tensor = shift * (radius / shift.norm().clamp(min=radius))
    return original + inside
