"""The constants of calibrated keys from a layer's second moments, in double precision.

Attention sees a key's error e through the queries: to first order it costs ``e^T H e``, H the queries' second moment.
A uniform quantizer with a scale per channel makes errors in proportion to a channel's spread in a tile, so both
moments decide. With S the covariance of keys inside a tile, ``z = S^(-1/2) k`` has equal spread in all directions, and
its error costs ``e_z^T M e_z``, ``M = S^(1/2) H S^(1/2)``. Let ``M = B^T B`` (Cholesky) and ``B = Q R P^T`` with R
upper triangular and of equal diagonal: the geometric mean decomposition. In the basis ``y = P^T z`` the cost is
``|R e_y|^2``, and successive rounding with feedback from the last channel to the first makes it ``r^2`` times the sum
of what each channel rounds off, r the diagonal's number: all channels matter alike, so one bit width suits them all,
and ``r^2`` is the geometric mean of M's eigenvalues, the least that any basis reaches.

Sources: Jiang, Hager, Li, "The geometric mean decomposition", Linear Algebra and its Applications 396 (2005), for the
decomposition; Frantar et al., GPTQ (arXiv 2210.17323), for error feedback through a triangular factor of the second
moment; SQuat (arXiv 2503.24358) and SVDq (arXiv 2502.15304) for keys quantized by what queries and keys span.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.spec.key_basis import KeyBasis

Double = NDArray[np.float64]

KEY_FLOOR = 1e-3
"""Added to S over its mean diagonal: bounds how far a direction that keys hardly use is stretched."""
QUERY_FLOOR = 1e-6
"""Added to H over its mean diagonal."""
WEIGHT_FLOOR = 0.1
"""Added to M over its mean diagonal: other texts have queries in directions that these had not."""


def key_basis(queries: Double, keys: Double, padded_dim: int) -> KeyBasis:
    """Computes a layer's constants.

    Args:
        queries: H, ``[N_kv, D, D]``: sum of ``q q^T`` over the queries of a KV head's group, after RoPE.
        keys: S, ``[N_kv, D, D]``: sum of ``(k - m)(k - m)^T`` over the tokens of tiles, m the tile's mean.
        padded_dim: D as the cache pads it; the added channels pass unchanged.

    Raises:
        SkvError: A moment is not finite, or all zeros.
    """
    heads, dim = queries.shape[:2]
    matrices = np.zeros((3, heads, padded_dim, padded_dim))
    matrices[:2] = np.eye(padded_dim)
    for head in range(heads):
        basis, inverse, feedback = _one_head(queries[head], keys[head])
        matrices[0, head, :dim, :dim] = basis.T
        matrices[1, head, :dim, :dim] = inverse
        matrices[2, head, :dim, :dim] = feedback.T
    return KeyBasis(*matrices.astype(np.float32))


def _one_head(queries: Double, keys: Double) -> tuple[Double, Double, Double]:
    """Returns ``A = P^T S^(-1/2)``, its inverse, and ``W = R / diag(R)`` without its diagonal."""
    spread = _normalized(keys, KEY_FLOOR)
    root, inverse_root = _power(spread, 0.5), _power(spread, -0.5)
    weight = _normalized(root @ _normalized(queries, QUERY_FLOOR) @ root, WEIGHT_FLOOR)
    right, triangular = geometric_mean_decomposition(np.linalg.cholesky(weight).T.astype(np.float64))
    feedback = np.triu(triangular / np.diag(triangular)[:, None], 1)
    return right.T @ inverse_root, root @ right, feedback


def _normalized(moment: Double, floor: float) -> Double:
    """A moment over its mean diagonal, symmetric to the last bit, with ``floor`` added to the diagonal."""
    mean = np.trace(moment) / len(moment)
    if not np.isfinite(moment).all() or not mean > 0:
        raise SkvError("calibration: a second moment", got=f"a mean of {mean}", expected="finite, above 0")
    return (moment + moment.T) / (2 * mean) + floor * np.eye(len(moment))


def _power(matrix: Double, exponent: float) -> Double:
    """A symmetric positive definite matrix to a power."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def geometric_mean_decomposition(matrix: Double) -> tuple[Double, Double]:
    """Decomposes ``B = Q R P^T``: Q and P orthogonal, R upper triangular with one number on its diagonal.

    That number is the geometric mean of B's singular values. Starting from the singular value decomposition, each step
    exchanges and turns two rows and columns so that the next diagonal entry becomes the mean (Jiang, Hager, Li 2005,
    section 3).

    Args:
        matrix: ``[D, D]``, of full rank.

    Returns:
        P and R, ``[D, D]`` each.
    """
    _, values, right = np.linalg.svd(matrix)
    mean = math.exp(np.log(values).mean())
    triangular, right = np.diag(values), right.T.copy()
    for k in range(len(values) - 1):
        ahead = np.diag(triangular)[k + 1 :]
        # One entry at or above the mean and one at or below it: a plane rotation can give the first of them the mean.
        partner = k + 1 + int(ahead.argmin() if triangular[k, k] >= mean else ahead.argmax())
        _exchange(triangular, right, k + 1, partner)
        first, second = triangular[k, k], triangular[k + 1, k + 1]
        if math.isclose(first, second, rel_tol=1e-14):
            continue
        cosine = math.sqrt(min(1.0, max(0.0, (mean**2 - second**2) / (first**2 - second**2))))
        sine = math.sqrt(1 - cosine**2)
        pair = [k, k + 1]
        on_columns = np.array([[cosine, -sine], [sine, cosine]])
        on_rows = np.array([[cosine * first, sine * second], [-sine * second, cosine * first]]) / mean
        triangular[:, pair] = triangular[:, pair] @ on_columns
        right[:, pair] = right[:, pair] @ on_columns
        triangular[pair] = on_rows @ triangular[pair]
    return right, np.triu(triangular)


def _exchange(triangular: Double, right: Double, i: int, j: int) -> None:
    """Exchanges two diagonal entries of a matrix that is still diagonal there, and the columns that go with them."""
    if i == j:
        return
    triangular[[i, j]] = triangular[[j, i]]
    triangular[:, [i, j]] = triangular[:, [j, i]]
    right[:, [i, j]] = right[:, [j, i]]
