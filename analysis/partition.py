"""Finds the best partitions (L, M) of interleaved nets for a budget.

python -m analysis.partition --budget=269722                     (RegConv-W16, depth 20)
python -m analysis.partition --budget=50e6 --count=macs --grow=L --depth=38

Candidates are plain nets (nets/plain.py). L is the number of primary partitions in the
first stage and M the number of channels in each. A pair of layers with G = L M channels
has T = G (9 M + L) weights, and is widest for its T if L = 9 M (IGCNets, arXiv
1707.02725).
"""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from nets import cost

KERNEL_AREA = 9
STAGE_WIDTHS = (1, 2, 4)  # relative to the first stage
HEADER = "    L     M  width   parameters          MACs  regular  L / (9 M) by stage"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A pair (L, M) and the counts of its net. macs: multiply-adds for one image.

    balance: L / (9 M) in each stage, 1 where a pair is widest for its weights.
    """

    primary: int
    secondary: int
    parameters: int
    macs: int
    balance: tuple[float, ...]

    @property
    def width(self) -> int:
        return self.primary * self.secondary

    @property
    def block_weights(self) -> int:
        """Weights T of a pair in the first stage."""
        return self.width * (KERNEL_AREA * self.secondary + self.primary)

    @property
    def regular_width(self) -> float:
        """Width of the regular convolution with as many weights as the pair."""
        return math.sqrt(self.block_weights / KERNEL_AREA)

    @property
    def imbalance(self) -> float:
        """Mean of |log balance| over the stages, 0 if all are widest."""
        return sum(abs(math.log(b)) for b in self.balance) / len(self.balance)


def best_partitions(
    budget: float,
    *,
    objective: str = "width",
    count: str = "parameters",
    min_secondary: int = 2,
    grow: str = "M",
    **net: int,
) -> list[Plan]:
    """Returns the plans within a budget of `count` ("parameters", "macs"), best first.

    objective: "width", then the smaller count; or "balance", then width, among the
      widest nets of each M.
    min_secondary: smallest M; 1 admits depthwise-separable pairs.
    grow, net: see plan.
    """
    if min_secondary < 1 or not math.isfinite(budget):
        raise ValueError(
            "min_secondary must be at least 1 and the budget finite, got "
            f"{min_secondary} and {budget}"
        )
    step = 2 if grow == "L" else 1  # see plan
    plans = []
    for secondary in itertools.count(math.ceil(min_secondary / step) * step, step):
        candidates = (plan(i, secondary, grow=grow, **net) for i in itertools.count(1))
        # The counts grow with both L and M.
        fitting = itertools.takewhile(lambda p: getattr(p, count) <= budget, candidates)
        if not (found := list(fitting)):
            break
        plans += found
    if objective == "width":
        return sorted(plans, key=lambda p: (-p.width, getattr(p, count)))
    widest = {plan.secondary: plan for plan in plans}  # L increases
    return sorted(widest.values(), key=lambda p: (p.imbalance, -p.width))


def plan(primary: int, secondary: int, *, grow: str = "M", **net: int) -> Plan:
    """Returns the plan of a pair (L, M). Raises ValueError if no net has these groups.

    grow: whether "M" (IGCNets for CIFAR) or "L" doubles with the width. If L grows, M
      must be even: the block that doubles L still has the narrow input.
    net: `depth` and `num_classes` of the net.
    """
    if grow == "L" and secondary % 2:
        raise ValueError(
            f"{2 * primary} partitions do not divide {primary * secondary} channels"
        )
    counts = _terms(primary, secondary) @ _coefficients(grow, **net)
    first = primary / (KERNEL_AREA * secondary)
    balance = tuple(first * x if grow == "L" else first / x for x in STAGE_WIDTHS)
    return Plan(primary, secondary, *counts.tolist(), balance)


@functools.cache
def _coefficients(grow: str, depth: int = 20, num_classes: int = 10) -> np.ndarray:
    """Returns the coefficients (4, 2) of _terms in the parameters and macs of a net.

    Counting a net takes a second, too long for a search. But the counts of each layer
    are linear in the four terms, so four nets determine all others.
    """
    pairs = [(2, 2), (4, 2), (2, 4), (4, 4)]
    counts = []
    for primary, secondary in pairs:
        groups = {"primary_groups": primary}
        if grow == "L":
            groups = {"primary_groups": 0, "secondary_groups": secondary}
        net = {"name": "plain", "depth": depth, "width": primary * secondary}
        net |= {"wiring": {"kind": "interleaved"} | groups, "num_classes": num_classes}
        total = cost.total(cost.of(net, (32, 32, 3)))
        counts.append((total.parameters, total.macs))
    solution = np.linalg.solve([_terms(*pair) for pair in pairs], counts)
    return np.rint(solution).astype(int)


def _terms(primary: int, secondary: int) -> np.ndarray:
    width = primary * secondary
    return np.array([1, width, width * secondary, width * primary])


def table(plans: Sequence[Plan]) -> str:
    """Returns a header and one line of text per plan."""
    lines = [HEADER]
    for p in plans:
        balance = " ".join(f"{value:.2f}" for value in p.balance)
        lines.append(
            f"{p.primary:5} {p.secondary:5} {p.width:6} {p.parameters:12,} "
            f"{p.macs:13,} {p.regular_width:8.1f}  {balance}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--budget", type=float, required=True, help="for the whole net, of --count")
    add("--count", choices=("parameters", "macs"), default="parameters")
    add("--objective", choices=("width", "balance"), default="width")
    add("--grow", choices=("M", "L"), default="M", help="what doubles with the width")
    add("--depth", type=int, default=20, help="3 n + 2 for n blocks per stage")
    add("--num_classes", type=int, default=10)
    add("--min_secondary", type=int, default=2, help="smallest M")
    add("--top", type=int, default=10, help="number of plans to print")
    options = vars(parser.parse_args())
    top = options.pop("top")
    try:
        plans = best_partitions(**options)
    except ValueError as error:
        parser.error(str(error))
    if not plans:
        parser.error(f"no net fits --budget={options['budget']:,.0f}; raise it")
    print(table(plans[:top]))
    print("regular: width of the regular convolution with as many weights as the pair")


if __name__ == "__main__":
    main()
