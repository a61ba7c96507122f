"""Plans interleaved nets: the best partitions (L, M) for a budget.

python -m analysis.partition --budget=269722                     (RegConv-W16, depth 20)
python -m analysis.partition --budget=50e6 --count=macs --grow=L --depth=38

Candidates are whole plain nets (nets/plain.py): stem, three stages, classifier, all
counted exactly. L: primary partitions, M: channels of each, both of the first stage.
A pair of G = L M channels has T = G (k^2 M + L) weights, k the side of the kernel, and
is widest for its T where L = k^2 M (IGCNets, arXiv 1707.02725).
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

STAGES = ((1, 32), (2, 16), (4, 8))  # width in first widths, side of the map


@dataclasses.dataclass(frozen=True)
class Plan:
    """A pair (L, M) and the whole net that it makes.

    width: L M. parameters, macs: of the net; macs are those of one image.
    block_weights: T, the weights of a first-stage pair. balance: L / (k^2 M) in each
    stage, 1 where a pair is widest for its weights.
    """

    primary: int
    secondary: int
    width: int
    parameters: int
    macs: int
    block_weights: int
    balance: tuple[float, ...]
    kernel: int

    @property
    def regular_width(self) -> float:
        """Width of the regular convolution with as many weights as the pair."""
        return math.sqrt(self.block_weights) / self.kernel

    @property
    def imbalance(self) -> float:
        """Mean of |log balance| over the stages; 0 would be widest in all."""
        return sum(abs(math.log(b)) for b in self.balance) / len(self.balance)


def best_partitions(
    budget: float,
    *,
    kernel: int = 3,
    stages: Sequence[tuple[int, int]] = STAGES,
    blocks: int = 6,
    num_classes: int = 10,
    grow: str = "M",
    objective: str = "width",
    count: str = "parameters",
    min_secondary: int = 2,
) -> list[Plan]:
    """Plans within a budget of `count` ("parameters" or "macs"), the best first.

    stages: (width relative to the first, side of the map). blocks: of each stage.
    grow: what doubles with the width, "M" (as IGCNets for CIFAR) or "L".
    objective: "width" (then fewer of what is counted), or "balance" (then width) among
      the widest nets of each M.
    min_secondary: smallest M; 1 admits depthwise-separable pairs.
    """
    for name, given, choices in (
        ("grow", grow, ("M", "L")),
        ("objective", objective, ("width", "balance")),
        ("count", count, ("parameters", "macs")),
    ):
        if given not in choices:
            raise ValueError(f"unknown {name} {given!r}: choose from {choices}")
    if min_secondary < 1 or not math.isfinite(budget):
        raise ValueError("min_secondary must be at least 1, and the budget finite")
    net = dict(kernel=kernel, stages=stages, blocks=blocks, num_classes=num_classes)
    plans = list(_within(budget, count, min_secondary, dict(grow=grow, **net)))
    if objective == "width":
        return sorted(plans, key=lambda p: (-p.width, getattr(p, count)))
    widest = {plan.secondary: plan for plan in plans}  # L increases
    return sorted(widest.values(), key=lambda p: (p.imbalance, -p.width))


def plan(
    primary: int,
    secondary: int,
    *,
    kernel: int = 3,
    stages: Sequence[tuple[int, int]] = STAGES,
    blocks: int = 6,
    num_classes: int = 10,
    grow: str = "M",
) -> Plan:
    """The exact counts of one pair (L, M); ValueError where a stage has no groups."""
    width, area = primary * secondary, kernel**2
    side, channels = stages[0][1], width
    weights = area * 3 * width
    parameters, macs = weights + 2 * width, weights * side**2
    balance = []
    for factor, side in stages:
        groups, members = primary, secondary * factor
        if grow == "L":
            groups, members = primary * factor, secondary
        balance.append(groups / (area * members))
        out = groups * members
        for inputs in [channels] + [out] * (blocks - 1):
            if inputs % groups:
                raise ValueError(f"{groups} partitions do not divide {inputs} channels")
            weights = area * inputs * members + out * groups
            parameters += weights + 2 * out
            macs += weights * side**2
        channels = out
    parameters += (channels + 1) * num_classes
    macs += channels * num_classes
    block_weights = width * (area * secondary + primary)
    counts = dict(parameters=parameters, macs=macs, block_weights=block_weights)
    return Plan(
        primary, secondary, width, balance=tuple(balance), kernel=kernel, **counts
    )


def _within(budget, count: str, min_secondary: int, net: dict) -> Iterator[Plan]:
    """All plans within the budget, L increasing for each M: counts grow with both."""
    step = 1
    if net["grow"] == "L":  # a block that widens has M / step inputs in a partition
        factors = [factor for factor, _ in net["stages"]]
        step = math.lcm(*(b // a for a, b in itertools.pairwise(factors)))
    for secondary in itertools.count(-(-min_secondary // step) * step, step):
        for primary in itertools.count(1):
            found = plan(primary, secondary, **net)
            if getattr(found, count) > budget:
                break
            yield found
        if primary == 1:
            return


def table(plans: Sequence[Plan]) -> str:
    """Lines of text, one a plan, under a header."""
    lines = [
        "    L     M  width   parameters          MACs  regular  L / (k^2 M) by stage"
    ]
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
    add("--budget", type=float, required=True, help="of the whole net, see --count")
    add("--count", choices=("parameters", "macs"), default="parameters")
    add("--objective", choices=("width", "balance"), default="width")
    add("--grow", choices=("M", "L"), default="M", help="what doubles with the width")
    add("--depth", type=int, default=20, help="3 n + 2, as of nets/plain.py")
    add("--num_classes", type=int, default=10)
    add("--min_secondary", type=int, default=2, help="smallest M")
    add("--top", type=int, default=10, help="how many plans to print")
    options = vars(parser.parse_args())
    depth, top = options.pop("depth"), options.pop("top")
    if depth < 5 or (depth - 2) % 3:
        parser.error(f"--depth {depth}: a plain net has depth 3 n + 2")
    try:
        plans = best_partitions(**options, blocks=(depth - 2) // 3)
    except ValueError as error:
        parser.error(str(error))
    if not plans:
        parser.error(f"--budget {options['budget']:,.0f}: no net is as small as that")
    print(table(plans[:top]))
    print("regular: width of the regular convolution with as many weights as the pair")


if __name__ == "__main__":
    main()
