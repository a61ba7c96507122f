"""Ramanujan graphs between the channels of two layers: explicit, without randomness.

A bipartite graph whose inputs have degree d1 and whose outputs have degree d2 is
Ramanujan if its second singular value is at most sqrt(d1 - 1) + sqrt(d2 - 1). Large
graphs cannot do better by a fixed margin (Feng and Li, 1996).

Ours are lifts: take the complete graph between d2 inputs and d1 outputs, replace each
channel by c copies, and each edge by a permutation of copies. Ramanujan lifts exist for
every c (Hall, Puder and Sawin, arXiv 1506.02335). Here, the permutation of edge (i, j)
is a shift in an Abelian group of c elements, computed in a field of q elements:

- by the product of the field's elements i and j, projected to the first k of its r
  digits, if c = p^k and q = p^r. For c = q = p, these are parts of the array codes
  that Burnwal, Sinha and Vidyasagar (arXiv 1910.03937) prove to be Ramanujan.
- by the logarithm of i - j modulo c, for distinct i and j, if c divides q - 1. For
  c = 2, these are signs of Paley's matrix.

The singular values of such a lift are those of the matrices X(shift of (i, j)), for all
characters X of the group (for c = 2: Bilu and Linial, 2006). The trivial character
contributes sqrt(d1 d2). Any other contributes a part of a q x q matrix with M M* = q I
or M M* = q I - J, where J is all ones, and therefore values of at most sqrt(q). If that
meets the bound and is less than sqrt(d1 d2), the graph is Ramanujan and connected.
"""

import functools
import itertools
import math

import numpy as np


def check(in_channels: int, out_channels: int, degree: int, block: int = 1) -> None:
    """Raises ValueError, with the possible degrees, if there is no construction.

    block: channels in each of the blocks that replace channels, for the message.
    """
    copies, rest = divmod(in_channels, degree)
    if not rest and _field(copies, in_channels, out_channels):
        return
    common = math.gcd(in_channels, out_channels)
    degrees = [
        f"{in_channels // c} (compress={c})"
        for c in range(1, common + 1)
        if common % c == 0 and _field(c, in_channels, out_channels)
    ]
    raise ValueError(
        f"no construction of a Ramanujan graph between {in_channels} input and "
        f"{out_channels} output "
        f"{'channels' if block == 1 else f'blocks of {block} channels'} with "
        f"{degree} inputs for each output: choose {', '.join(degrees)}, or another "
        "sampling"
    )


def connect(in_channels: int, out_channels: int, degree: int) -> np.ndarray:
    """Returns the edges (E,) int32 of the graph whose outputs have `degree` inputs.

    An output reads exactly one of every in_channels / degree consecutive inputs. Raises
    ValueError like `check`.
    """
    check(in_channels, out_channels, degree)
    c = in_channels // degree
    shifts, add = _shifts(c, degree, out_channels // c)
    copies = np.arange(c)
    inputs = np.arange(degree)[:, None] * c + copies  # (d2, c)
    targets = add[copies[:, None], shifts[:, None]]  # (d2, c, d1)
    outputs = np.arange(out_channels // c) * c + targets
    return (inputs[..., None] * out_channels + outputs).ravel().astype(np.int32)


def _field(c: int, in_channels: int, out_channels: int) -> tuple[int, int, bool] | None:
    """Returns p and r of the smallest field for a c-lift, or None.

    Also returns whether to shift by products instead of logarithms.
    """
    if in_channels % c or out_channels % c:
        return None
    d1, d2 = out_channels // c, in_channels // c
    if c == 1:  # the complete graph, without shifts
        return 2, 1, True
    if min(d1, d2) < 2:
        return None
    # sqrt(q) <= sqrt(d1 - 1) + sqrt(d2 - 1), and q < d1 d2, in whole numbers
    most = d1 + d2 - 2 + math.isqrt(4 * (d1 - 1) * (d2 - 1))
    most = min(most, d1 * d2 - 1)
    lifted = _prime_power(c)
    for q in range(max(d1, d2, c), most + 1) if lifted else ():
        found = _prime_power(q)
        if found and found[0] == lifted[0]:
            return *found, True
    for q in range(d1 + d2, most + 1):
        if q % c == 1 and (found := _prime_power(q)):
            return *found, False
    return None


def _prime_power(n: int) -> tuple[int, int] | None:
    """Returns p and r with n = p^r, or None; n > 1."""
    p = next((x for x in range(2, math.isqrt(n) + 1) if n % x == 0), n)
    r = round(math.log(n, p))
    return (p, r) if p**r == n else None


def _shifts(c: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shift (inputs, outputs) of each edge, and the group's sums (c, c)."""
    if c == 1:
        return np.zeros((inputs, outputs), int), np.zeros((1, 1), int)
    p, r, products = _field(c, c * inputs, c * outputs)
    digits = np.array(list(itertools.product(range(p), repeat=r)))[:, ::-1]
    powers = _powers(p, r) @ p ** np.arange(r)
    logarithms = np.zeros(p**r, int)
    logarithms[powers] = np.arange(len(powers))
    if products:
        i, j = np.arange(inputs)[:, None], np.arange(outputs)
        product = powers[(logarithms[i] + logarithms[j]) % len(powers)]
        shifts = np.where(i * j, product, 0) % c
        return shifts, _sums(digits[:c], digits[:c], p)
    j = np.arange(inputs, inputs + outputs)
    difference = _sums(digits[:inputs], -digits[j], p)
    copies = np.arange(c)
    return logarithms[difference] % c, (copies[:, None] + copies) % c


def _sums(a: np.ndarray, b: np.ndarray, p: int) -> np.ndarray:
    """Adds elements given by digits (m, r) and (n, r); returns their numbers (m, n)."""
    return (a[:, None] + b) % p @ p ** np.arange(a.shape[1])


@functools.cache
def _powers(p: int, r: int) -> np.ndarray:
    """Returns the digits (q - 1, r) of the powers 1, x, x^2, ... of a generator.

    x satisfies x^r = a_0 + a_1 x + ... with the first coefficients for which its powers
    are all elements but 0.
    """
    one = (1, *[0] * (r - 1))
    for coefficients in itertools.product(range(p), repeat=r):
        coefficients = coefficients[::-1]
        if coefficients[0] == 0:
            continue
        powers, power = [], one
        while power != one or not powers:
            powers.append(power)
            terms = zip((0, *power), coefficients, strict=False)
            power = tuple((low + power[-1] * a) % p for low, a in terms)
        if len(powers) == p**r - 1:
            return np.array(powers)
    raise AssertionError(f"GF({p}^{r}) has no generator")
