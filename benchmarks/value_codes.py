"""Better codes of two bits for values: what a lattice and a trellis would save, decode style.

    python benchmarks/value_codes.py [CHECKPOINT] [--calibration FILE] [--windows 4] [--codes e8,trellis-8]

Keys are the op's own, with ``--calibration`` calibrated ones. Values are rotated and grouped as the op's, a scale per
token and group, and each group of numbers is then

- ``uniform``: the op's four levels, through the reference;
- ``e8``: eight numbers at a time the nearest of 65,536 points of the lattice E8 (E8P of QuIP#, arXiv 2402.04396);
- ``trellis-L``: each number one of 2^L levels, named by its own two bits and the L - 2 before them, the sequence found
  by Viterbi's algorithm, tail-biting (as QTIP's bitshift trellis, arXiv 2406.11235; its levels are fitted here);
- ``trellis-8-sum``: the same with levels that are sums of two tables of 16, which a byte shuffle can look up.

All have two bits per number and the same scales. What they lose is measured here; what reading them costs, in
``value_codes_read.cc``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from skv_export.calibration.file import Calibration
from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.evaluation import comparison
from skv_export.evaluation.candidates import Candidate, Simulated
from skv_export.evaluation.decode_simulation import LayoutCache, Simulation, TensorCache
from skv_export.evaluation.text import read_text
from skv_export.spec.key_basis import KeyBasis, can_be_calibrated
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import rotate
from skv_export.spec.recipe import Recipe

Code = Callable[[torch.Tensor], torch.Tensor]
"""Groups ``[n, G]`` of numbers with a mean square of about 1 to what is read of them."""


# The lattice.


@functools.cache
def e8_magnitudes() -> torch.Tensor:
    """``[256, 8]``: magnitudes of points of D8 shifted by 1/2: the 227 of squared length up to 10, and 29 of 12."""
    halves = torch.tensor(list(itertools.product((0.5, 1.5, 2.5), repeat=8)))
    length = halves.square().sum(1)
    return torch.cat([halves[length <= 10], halves[length == 12][:29]])


def e8(x: torch.Tensor) -> torch.Tensor:
    """The nearest points: a magnitude, seven signs (the eighth makes the sum even), and a shift by +-1/4."""
    vectors = 1.03 * x.reshape(-1, 8)
    best, read = x.new_full((len(vectors),), torch.inf), torch.empty_like(vectors)
    magnitudes = e8_magnitudes()
    odd = magnitudes.sum(1) % 2 == 1
    for shift in (0.25, -0.25):
        moved = vectors - shift
        # A sign that is not the number's own costs four times the product with it, so the smallest one is turned.
        turned, where = (moved.abs()[:, None] * magnitudes).min(2)
        wrong = ((moved < 0).sum(1) % 2 == 1)[:, None] != odd
        distance = magnitudes.square().sum(1) - 2 * moved.abs() @ magnitudes.mT + 4 * turned * wrong
        least, chosen = distance.min(1)
        row = torch.arange(len(moved))
        signs = torch.where(moved < 0, -1.0, 1.0)
        signs[row, where[row, chosen]] *= 1 - 2 * wrong[row, chosen].float()
        found = least + moved.square().sum(1)
        better = found < best
        read[better] = (magnitudes[chosen] * signs + shift)[better]
        best = torch.minimum(best, found)
    return read.reshape(x.shape) / 1.03


# The trellis.


def viterbi(x: torch.Tensor, levels: torch.Tensor, before: torch.Tensor, closed: bool) -> torch.Tensor:
    """The states ``[n, G]`` whose levels are nearest to the numbers.

    Args:
        x: ``[n, G]``.
        levels: ``[2**L]``, by state. A state is its predecessor's lower bits and two more.
        before: ``[n]``, the state before the first number.
        closed: Whether the last state has the lower bits of ``before``, so that the sequence is a ring.
    """
    states, kept = len(levels), len(levels) // 4
    reached = ((before[:, None] << 2) | torch.arange(4)) % states
    cost = x.new_full((len(x), states), 1e9).scatter(1, reached, (x[:, :1] - levels[reached]).square())
    came: list[torch.Tensor] = []
    for number in x.T[1:]:
        cheapest, top = cost.view(-1, 4, kept).min(1)
        came.append(top.to(torch.uint8))
        cost = (cheapest[..., None] + (number[:, None, None] - levels.view(kept, 4)).square()).flatten(1)
    if closed:
        cost = cost.masked_fill(torch.arange(states) % kept != before[:, None] % kept, torch.inf)
    path = [cost.argmin(1)]
    for top in reversed(came):
        low = path[-1] >> 2
        path.append(low + kept * top.gather(1, low[:, None])[:, 0])
    return torch.stack(path[::-1], 1)


@functools.cache
def trellis_levels(bits: int, summed: bool, rounds: int = 40) -> torch.Tensor:
    """Levels ``[2**bits]`` for standard normal numbers: Lloyd's iteration on paths, from quantiles in random order.

    Args:
        bits: Of a state.
        summed: A level is the sum of two of 16: by the state's low four bits, and by ``s >> 4 ^ s >> 1``.
        rounds: Of the iteration.
    """
    generator = torch.Generator().manual_seed(1)
    states = torch.arange(2**bits)
    parts = torch.eye(2**bits)
    if summed:
        mixed = (states >> 4 ^ states >> 1) % 16
        parts = torch.nn.functional.one_hot(torch.stack([states % 16, 16 + mixed]), 32).sum(0).float()
    quantiles = torch.special.ndtri((states + 0.5) / 2**bits)
    levels = quantiles[torch.randperm(2**bits, generator=generator)]
    for _ in range(rounds):
        x = torch.randn(4000, 64, generator=generator)
        path = viterbi(x, levels, torch.zeros(len(x), dtype=torch.long), closed=False)[:, bits // 2 :].flatten()
        numbers = x[:, bits // 2 :].flatten()
        sums, counts = (torch.zeros(2**bits).scatter_add(0, path, w) for w in (numbers, torch.ones_like(numbers)))
        # The means of what each state stands for; of sums the nearest to them, each mean by its count.
        weight, mean = (counts + 1e-3).sqrt()[:, None], (sums / (counts + 1e-3))[:, None]
        levels = (parts @ torch.linalg.lstsq(weight * parts, weight * mean, driver="gelsd").solution)[:, 0]
    return levels


def trellis(x: torch.Tensor, bits: int, summed: bool) -> torch.Tensor:
    """Rings: the state at a group's begin is found by a run through it from its middle."""
    levels, half = trellis_levels(bits, summed), x.shape[1] // 2
    begin = viterbi(x.roll(half, 1), levels, torch.zeros(len(x), dtype=torch.long), closed=False)[:, half - 1]
    return levels[viterbi(x, levels, begin, closed=True)]


def code(name: str) -> Code:
    """By name."""
    if name == "e8":
        return e8
    _, bits, *summed = name.split("-")
    return functools.partial(trellis, bits=int(bits), summed=bool(summed))


# Values that have it.


@dataclass(frozen=True)
class CodedValues(LayoutCache):
    """The op's values, with other codes.

    Attributes:
        code: What takes the place of four levels.
    """

    code: Code = field(default=e8)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """Rotated, scaled by group, coded, and back."""
        layout = self.layout
        rows = torch.from_numpy(rotate(x.cpu().numpy(), layout.rotation_dim)).reshape(-1, layout.group_size)
        energy = rows.square().sum(1, keepdim=True)
        scale = (energy / layout.group_size).sqrt().clamp(min=1e-20)
        read = self.code(rows / scale)
        scale = (rows * read).sum(1, keepdim=True) / read.square().sum(1, keepdim=True)  # least squares, once
        read = self.code(rows / scale.clamp(min=1e-20))
        unbiased = (energy / (rows * read).sum(1, keepdim=True)).half().float()  # as the op's: spec/quantizer.py
        return self._to_model((read * unbiased).reshape(x.shape).numpy(), x)


def candidate(pair: str, name: str, bases: Mapping[int, KeyBasis] | None) -> Candidate:
    """Keys of a pair such as K4V2, and its values with a code; ``uniform`` is the op's."""
    k_bits, v_bits = int(pair[1]), int(pair[3])
    recipe = Recipe().with_options(k_bits=k_bits, v_bits=v_bits, k_parameter_bits=8)

    def make(index: int, head_dim: int, window: int) -> tuple[TensorCache, TensorCache]:
        key, value = CacheLayout.pair(recipe.layer(index), head_dim, window)
        basis = bases.get(index) if bases and can_be_calibrated(key) else None
        values = LayoutCache(value) if name == "uniform" else CodedValues(value, code=code(name))
        return LayoutCache(key, basis=basis), values

    digests = [bases[layer].digest for layer in sorted(bases)] if bases else []
    return Simulated(f"{pair} {name}", " ".join([pair, name, *digests]), "", Simulation(make))


def main() -> None:
    """Prints the codes' squared error on normal numbers, then a table of what models lose with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--pairs", default="K4V2,K2V2")
    parser.add_argument("--codes", default="e8,trellis-8,trellis-8-sum")
    parser.add_argument("--windows", type=int, default=16, help="That the text is cut into.")
    parser.add_argument("--first", type=int, default=4, help="Of these, how many are measured.")
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    names = given.codes.split(",")
    normal = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    for name in names:
        print(f"{name}: squared error {(code(name)(normal) - normal).square().mean():.4f}", flush=True)
    bases = Calibration.load(given.calibration).bases if given.calibration else None
    pairs = given.pairs.split(",")
    found = [candidate(pair, name, bases) for pair in pairs for name in ("uniform", *names)]
    found += [candidate(f"{pair[:3]}3", "uniform", bases) for pair in pairs]
    checkpoint = resolve(given.checkpoint or demo_checkpoint())
    result = comparison.run(
        checkpoint,
        found,
        read_text(None),
        windows=given.windows,
        first=given.first,
        state=given.state,
        progress=lambda name, done, total: print(f"{done}/{total} {name}", file=sys.stderr, flush=True),
    )
    print(result.table())


if __name__ == "__main__":
    main()
