"""The one rule by which a kernel counts as right, with no tolerance to tune.

Inputs are drawn in the low dtype. The oracle promotes them to float64; *eager* computes the same thing in the low dtype
the obvious way. A kernel may be twice as far from the oracle as eager is, plus one rounding of the largest value:

    err(kernel, oracle) <= 2 * err(eager, oracle) + eps(low dtype) * max|oracle|

once with the largest absolute error and once with the Frobenius norm, which a few large values cannot hide behind.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_oracle(
    got: Tensor, oracle_fp64: Tensor, eager_low: Tensor, name: str, *, eps: float | None = None
) -> None:
    """Assert that ``got`` is as close to the oracle as the low dtype lets eager PyTorch be.

    Infinities (the LSE of a row without keys) must stand at exactly the oracle's places; NaN anywhere fails.

    Args:
        got: What the kernel under test computed.
        oracle_fp64: The same in float64 from the same (promoted) inputs.
        eager_low: The same computed by plain PyTorch in the low dtype.
        name: What is compared, for the message: "o", "dq", ...
        eps: Unit of rounding; default that of ``eager_low``'s dtype.

    Raises:
        AssertionError: The rule is broken; the message has both errors, their bound and the worst element.
    """
    assert got.shape == oracle_fp64.shape == eager_low.shape, (
        f"{name}: shapes differ: got {tuple(got.shape)}, oracle {tuple(oracle_fp64.shape)}, "
        f"eager {tuple(eager_low.shape)}"
    )
    assert oracle_fp64.dtype == torch.float64, f"{name}: the oracle is {oracle_fp64.dtype}, not float64"
    eps = torch.finfo(eager_low.dtype).eps if eps is None else eps
    got, oracle, eager = (t.detach().to("cpu", torch.float64) for t in (got, oracle_fp64, eager_low))
    assert not oracle.isnan().any(), f"{name}: the oracle itself has NaN"
    assert not got.isnan().any(), f"{name}: {_places(got.isnan())} are NaN"
    infinite = oracle.isinf()
    wrong = (got.isinf() != infinite) | (infinite & (got != oracle))
    assert not wrong.any(), (
        f"{name}: {_places(wrong)} are infinite in one of kernel and oracle only, or of another sign"
    )
    got, oracle, eager = (t.masked_fill(infinite, 0.0) for t in (got, oracle, eager))
    if got.numel() == 0:
        return

    error, allowed = (got - oracle).abs(), (eager - oracle).abs()
    limit = 2 * allowed.max() + eps * oracle.abs().max()
    worst = int(error.argmax())
    assert error.max() <= limit, (
        f"{name}: largest error {error.max():.3e} > {limit:.3e} = 2 * {allowed.max():.3e} (eager's) + "
        f"{eps:.1e} * {oracle.abs().max():.3e} (largest value); worst at {_index(worst, got.shape)}: "
        f"got {got.flatten()[worst]:.6g}, oracle {oracle.flatten()[worst]:.6g}, eager {eager.flatten()[worst]:.6g}; "
        f"{int((error > limit).sum())} of {got.numel()} elements are past the limit"
    )
    size = oracle.norm()
    limit = 2 * (eager - oracle).norm() + eps * size
    assert (got - oracle).norm() <= limit, (
        f"{name}: Frobenius error {(got - oracle).norm():.3e} > {limit:.3e} = 2 * {(eager - oracle).norm():.3e} "
        f"(eager's) + {eps:.1e} * {size:.3e} (norm)"
    )


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


def _places(where: Tensor) -> str:
    first = tuple(where.nonzero()[0].tolist())
    return f"{int(where.sum())} of {where.numel()} elements (the first at {first})"
