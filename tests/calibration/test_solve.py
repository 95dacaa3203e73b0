"""The constants of calibrated keys: what defines the decomposition, and that scores of calibrated keys err less."""

from __future__ import annotations

import numpy as np
import pytest

from skv_export.calibration.solve import geometric_mean_decomposition, key_basis
from skv_export.errors import SkvError
from skv_export.spec.key_basis import KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import decode_tile, dequantize, encode_tile, quantize
from skv_export.spec.recipe import LayerConfig


def spectrum(dim: int, spread: float, seed: int) -> np.ndarray:
    """A random matrix whose singular values lie ``spread`` powers of e apart."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    right, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    return (left * np.exp(spread * rng.standard_normal(dim))) @ right


@pytest.mark.parametrize(("dim", "spread"), [(1, 1.0), (2, 3.0), (16, 0.0), (64, 1.0), (128, 3.0)])
def test_the_decomposition_is_orthogonal_triangular_and_of_equal_diagonal(dim: int, spread: float) -> None:
    matrix = spectrum(dim, spread, dim)
    right, triangular = geometric_mean_decomposition(matrix)
    assert np.allclose(right.T @ right, np.eye(dim), atol=1e-12)
    assert np.array_equal(triangular, np.triu(triangular))
    mean = np.exp(np.linalg.slogdet(matrix)[1] / dim)
    assert np.allclose(np.diag(triangular), mean, rtol=1e-9)
    # B = Q R P^T with Q orthogonal: both sides have the same Gram matrix.
    gram = right @ (triangular.T @ triangular) @ right.T
    assert np.allclose(gram, matrix.T @ matrix, atol=1e-9 * np.abs(gram).max())


def moments(dim: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys ``[tokens, D]`` of unlike spectra, and their second moments ``[1, D, D]``."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((4000, dim)) @ spectrum(dim, 1.0, seed)
    tokens = rng.standard_normal((4096, dim)) @ spectrum(dim, 0.7, seed + 1)
    return queries, tokens, (queries.T @ queries)[None], (tokens.T @ tokens)[None]


def test_query_and_key_basis_are_each_others_inverse_transposed() -> None:
    _, _, h, s = moments(64, 0)
    basis = key_basis(h, s, 64)
    product = basis.key[0].astype(np.float64) @ basis.query[0].T.astype(np.float64)
    assert np.abs(product - np.eye(64)).max() < 1e-5
    assert np.array_equal(basis.feedback, np.tril(basis.feedback, -1))


@pytest.mark.parametrize("bits", [2, 3])
def test_scores_of_calibrated_keys_err_less_than_half_as_much(bits: int) -> None:
    """The squared error of query times key, measured by quantizing, on keys and queries that were not fitted to."""
    dim = 64
    _, _, h, s = moments(dim, 3)
    layout = CacheLayout.pair(LayerConfig(k_bits=bits), dim)[0]
    rng = np.random.default_rng(9)
    queries = rng.standard_normal((500, dim)) @ spectrum(dim, 1.0, 3)
    tokens = (rng.standard_normal((1, 16, 64, dim)) @ spectrum(dim, 0.7, 4)).astype(np.float16)

    def error(basis) -> float:  # type: ignore[no-untyped-def]
        read = decode_tile(layout, encode_tile(layout, tokens, basis), basis)
        return float(np.square((read - tokens.astype(np.float32)).reshape(-1, dim) @ queries.T).mean())

    assert error(key_basis(h, s, dim)) < 0.5 * error(None)


def test_padding_passes_unchanged() -> None:
    _, _, h, s = moments(80, 1)
    basis = key_basis(h, s, 96)
    assert basis.key.shape == (1, 96, 96)
    for matrix, corner in ((basis.key, np.eye(16)), (basis.query, np.eye(16)), (basis.feedback, np.zeros((16, 16)))):
        assert np.array_equal(matrix[0, 80:, 80:], corner)
        assert not matrix[0, 80:, :80].any() and not matrix[0, :80, 80:].any()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_moments_that_say_nothing_are_refused(value: float) -> None:
    good = np.eye(32)[None]
    with pytest.raises(SkvError, match="second moment"):
        key_basis(good, good * value, 32)


def test_directions_that_were_never_seen_stay_bounded() -> None:
    """A calibration text of a few tokens: moments of low rank."""
    rng = np.random.default_rng(0)
    few = rng.standard_normal((5, 64))
    basis = key_basis((few.T @ few)[None], (few.T @ few)[None], 64)
    assert np.abs(basis.key).max() < 100 and np.abs(basis.query).max() < 100


def test_constants_of_keys_cost_little() -> None:
    """A bias reaches every channel of the basis; offsets carry it, in 8 bits coarsely (docs/methods.md)."""
    rng = np.random.default_rng(0)
    mixed, read = (rng.standard_normal((64, 64)) * np.exp(0.7 * rng.standard_normal(64)) / 8 for _ in range(2))
    keys = rng.standard_normal((1, 16, 64, 64)) @ mixed
    around = keys - keys.mean(2, keepdims=True)
    queries = (read.T @ read)[None]
    basis = key_basis(queries, np.einsum("htsd,htse->hde", around, around), 64)

    def loss(constant: float, parameter_bits: int, basis: KeyBasis | None) -> float:
        layout = CacheLayout.pair(LayerConfig(k_bits=2, k_parameter_bits=parameter_bits), 64)[0]
        tiles = keys.copy()
        tiles[..., [5, 37, 50]] += constant * keys.std() * np.array([1, -1, 0.7])
        tiles = tiles.astype(np.float32)
        back = dequantize(layout, *quantize(layout, tiles, basis))
        error = ((back if basis is None else basis.from_tile(back)) - tiles).reshape(-1, 64).astype(np.float64)
        return float(np.einsum("ti,ij,tj->", error, queries[0], error))

    without = loss(0, 16, basis)
    assert loss(100, 16, basis) < 1.05 * without
    assert loss(30, 8, basis) < 1.3 * without
    assert loss(100, 8, basis) < loss(100, 8, None) / 3
