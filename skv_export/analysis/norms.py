"""Norms of projections: Frobenius, spectral, stable rank and the top of the spectrum, whole and per head.

Nothing here decomposes a large matrix. A wide matrix (keys and values under grouped-query attention) has a small Gram
matrix, whose diagonal blocks are the heads' Gram matrices; all but the smallest get Lanczos steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skv_export.errors import SkvError

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]

SPECTRUM = 16
"""Singular values kept of each projection."""
GRAM_LIMIT = 1024
"""Rows up to which the Gram matrix is formed; above, its product with vectors is enough."""
_BLOCK_BYTES = 1 << 20
"""Rows that stay in a core's cache between their two products of a Lanczos step."""
FULL_LIMIT = 96
"""Rows of a Gram matrix up to which all its eigenvalues are computed, which then is as fast as Lanczos steps."""
LANCZOS_STEPS = 160
LANCZOS_STRIDE = 6
LANCZOS_TOLERANCE = 3e-5
"""Lanczos stops when the largest eigenvalue grew by no more than this in a stride of steps."""


@dataclass(frozen=True)
class Norms:
    """Norms of one projection ``[heads * head_dim, hidden]``.

    Attributes:
        frobenius: Of the whole matrix.
        spectral: Its largest singular value.
        spectrum: Its largest singular values, descending, at most ``SPECTRUM``; after the first, lower bounds.
        head_frobenius: ``[heads]``.
        head_spectral: ``[heads]``.
    """

    frobenius: float
    spectral: float
    spectrum: tuple[float, ...]
    head_frobenius: tuple[float, ...]
    head_spectral: tuple[float, ...]

    @property
    def stable_rank(self) -> float:
        """``frobenius^2 / spectral^2``: how many directions carry the matrix."""
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0

    @property
    def head_stable_rank(self) -> tuple[float, ...]:
        """``[heads]``."""
        return tuple((f / s) ** 2 if s else 0.0 for f, s in zip(self.head_frobenius, self.head_spectral, strict=True))


def norms(weight: Float, heads: int, name: str) -> Norms:
    """Computes the norms of one projection.

    Args:
        weight: ``[heads * head_dim, hidden]``.
        heads: Heads that the rows belong to.
        name: For the message.

    Raises:
        SkvError: NaN or infinite weights.
    """
    rows = weight.shape[0]
    if rows <= GRAM_LIMIT:
        gram = weight @ weight.T
        blocks = _diagonal_blocks(gram, heads)
        squares = top_eigenvalues(gram) if np.isfinite(gram.trace()) else np.zeros(0)
    else:
        by_head = weight.reshape(heads, rows // heads, -1)
        blocks = np.stack([head @ head.T for head in by_head])
        squares = lanczos(_by_blocks(weight), weight.shape[1]) if np.isfinite(blocks).all() else np.zeros(0)
    energy = blocks.trace(axis1=1, axis2=2, dtype=np.float64)
    _check_finite(energy, weight, name)
    head_top = [top_eigenvalues(block)[0] for block in blocks]
    return Norms(
        frobenius=float(np.sqrt(energy.sum())),
        spectral=float(np.sqrt(squares[0])),
        spectrum=tuple(np.sqrt(squares[:SPECTRUM]).tolist()),
        head_frobenius=tuple(np.sqrt(energy).tolist()),
        head_spectral=tuple(np.sqrt(np.maximum(head_top, 0)).tolist()),
    )


def frobenius_norm(weight: Float, name: str) -> float:
    """Computes the Frobenius norm alone, in one pass: of queries, which no rule weighs.

    Args:
        weight: ``[rows, hidden]``.
        name: For the message.

    Raises:
        SkvError: NaN or infinite weights.
    """
    energy = np.einsum("ij,ij->i", weight, weight).astype(np.float64)
    _check_finite(energy, weight, name)
    return float(np.sqrt(energy.sum()))


def _check_finite(energy: Double, weight: Float, name: str) -> None:
    if not np.isfinite(energy).all():
        bad = int(np.count_nonzero(~np.isfinite(weight)))
        raise SkvError(
            f"{name}: NaN or infinite weights",
            got=f"{bad} of {weight.size} elements",
            expected="finite weights",
            fix="The checkpoint is damaged: download or save it again.",
        )


def _by_blocks(weight: Float) -> Callable[[Float], Float]:
    """Returns the product of ``weight.T @ weight`` with a vector, which goes through the weight once and not twice."""
    height = max(1, _BLOCK_BYTES // (4 * weight.shape[1]))
    blocks = [weight[start : start + height] for start in range(0, len(weight), height)]

    def multiply(x: Float) -> Float:
        total = np.zeros_like(x)
        for block in blocks:
            total += (block @ x) @ block
        return total

    return multiply


def _diagonal_blocks(gram: Float, heads: int) -> Float:
    d = gram.shape[0] // heads
    i = np.arange(heads)
    return gram.reshape(heads, d, heads, d)[i, :, i, :]


def top_eigenvalues(gram: Float) -> Double:
    """Returns the largest eigenvalues of a Gram matrix, descending, negative rounding errors cut off."""
    if len(gram) > FULL_LIMIT:
        return lanczos(lambda x: np.asarray(gram @ x, np.float32), len(gram))
    return np.maximum(np.linalg.eigvalsh(gram.astype(np.float64)), 0)[::-1]


def lanczos(multiply: Callable[[Float], Float], rows: int) -> Double:
    """Returns the largest eigenvalues of a symmetric positive semidefinite matrix, descending.

    Lanczos with full reorthogonalization (Golub and Van Loan, Matrix Computations, 10.1 and 10.3), stopped when the
    largest Ritz value stands still; it converges from below, so the others are lower bounds.

    Args:
        multiply: The matrix's product with a vector ``[rows]``.
        rows: Of the matrix.
    """
    steps = min(LANCZOS_STEPS, rows)
    basis = np.zeros((steps, rows), np.float32)
    alpha: Double = np.zeros(steps)
    beta: Double = np.zeros(steps)
    start = np.random.default_rng(0).standard_normal((rows,), dtype=np.float32)
    basis[0] = start / np.linalg.norm(start)
    ritz: Double = np.zeros(1)
    for j in range(steps):
        product = multiply(basis[j])
        alpha[j] = product @ basis[j]
        for _ in range(2):
            product -= (basis[: j + 1] @ product) @ basis[: j + 1]
        beta[j] = float(np.linalg.norm(product))
        exhausted = j + 1 == steps or beta[j] <= 1e-6 * alpha.max()
        if exhausted or j % LANCZOS_STRIDE == LANCZOS_STRIDE - 1:
            tridiagonal = np.diag(alpha[: j + 1]) + np.diag(beta[:j], 1) + np.diag(beta[:j], -1)
            before, ritz = ritz[-1], np.asarray(np.linalg.eigvalsh(tridiagonal), np.float64)
            if exhausted or ritz[-1] - before <= LANCZOS_TOLERANCE * ritz[-1]:
                break
        basis[j + 1] = product / np.float32(beta[j])
    return np.asarray(np.maximum(ritz, 0)[::-1], np.float64)
