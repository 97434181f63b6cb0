"""Conjugate gradients for the normal equations of weighted least squares (Hestenes and Stiefel 1952)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_TOLERANCE = 1e-12  # of the squared norm of the right side


def conjugate_gradients(apply: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, steps: int) -> Tensor:
    """At most `steps` steps from `start` towards the solution of `apply(X) = target`, `apply` symmetric and not negative.

    Every step lowers the error that `apply` and `target` are the derivative of.
    """
    X, residual = start, target - apply(start)
    direction, norm = residual, float((residual * residual).sum())
    stop = _TOLERANCE * float((target * target).sum())
    for _ in range(steps):
        image = apply(direction)
        curvature = float((direction * image).sum())
        if norm <= stop or curvature <= 0:
            break
        step = norm / curvature
        X, residual = X + step * direction, residual - step * image
        fresh = float((residual * residual).sum())
        direction, norm = residual + (fresh / norm) * direction, fresh
    return X
