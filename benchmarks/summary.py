"""The tables and the figure of docs/speed.md, from the results of benchmarks.models.

python -m benchmarks.summary

Prints the tables in Markdown and draws the first to docs/speed.png. Reads the files in
RESULTS, which hold rows of --peers.
"""

import pathlib

from matplotlib.figure import Figure

import benchmarks
from benchmarks.models import NETS

RATIO = "of_pytorch"
RESULTS = {  # by the widest instructions of the processor
    "AVX-512": "models-x86_64-2cores-jax*.csv",
    "AVX2": "models-x86_64-avx2-2cores-jax*.csv",
}
FIGURE = pathlib.Path(__file__).parents[1] / "docs/speed.png"
HEADER = (
    *("variant", "batch", "images/s: ours", "regular twin", "PyTorch"),
    *("of PyTorch", "floor, aim", "of the twin", "floor, aim"),
    *("MiB: ours", "PyTorch"),
)


def main() -> None:
    nets = {instructions: read(instructions) for instructions in RESULTS}
    for instructions, found in nets.items():
        print(f"{instructions}\n\n{markdown(found)}\n")
    draw(nets["AVX-512"])
    print(f"drew {FIGURE}")


def read(instructions: str) -> dict[str, dict[str, dict]]:
    """Returns the rows by variant, in the order of NETS, and framework."""
    (path,) = benchmarks.RESULTS.glob(RESULTS[instructions])
    nets = {}
    for row in benchmarks.read(path):
        nets.setdefault(row["variant"], {})[row["framework"]] = row
    return {variant: nets[variant] for variant in NETS if variant in nets}


def markdown(nets: dict[str, dict[str, dict]]) -> str:
    """Returns one line per variant. A ratio is bold if it meets its floor."""
    table = [HEADER, ["---"] * len(HEADER)]
    for variant, rows in nets.items():
        ours, twin, pytorch = (rows.get(x, {}) for x in ("ours", "twin", "pytorch"))
        speeds = [x.get("images_per_second", "") for x in (ours, twin, pytorch)]
        ratios = _ratio(ours[RATIO], NETS[variant].of_pytorch)
        ratios += _ratio(ours["of_twin"], NETS[variant].of_twin)
        memory = [ours["live_mib"], pytorch["live_mib"]]
        table.append([variant, ours["batch_size"], *speeds, *ratios, *memory])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _ratio(ratio: str, goals: tuple[float, float] | None) -> list[str]:
    if not ratio:
        return ["", ""]
    shown = f"{float(ratio):.2f}"
    if goals is None:
        return [shown, ""]
    met = float(ratio) >= goals[0]
    return [f"**{shown}**" if met else shown, ", ".join(map(str, goals))]


def draw(nets: dict[str, dict[str, dict]]) -> None:
    """Draws the speeds relative to PyTorch's to FIGURE, one group of bars per net."""
    figure = Figure(figsize=(8, 0.38 * len(nets) + 1.2))
    axes = figure.subplots()
    styles = {
        "ours": ("ours", "#1f5fa8", -0.19),
        "twin": ("our regular twin", "#9dbfe0", 0.19),
    }
    for framework, (label, color, offset) in styles.items():
        found = [
            (i + (offset if "twin" in rows else 0), float(rows[framework][RATIO]))
            for i, rows in enumerate(nets.values())
            if framework in rows
        ]
        bars = axes.barh(*zip(*found, strict=True), 0.36, label=label, color=color)
        background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7, bbox=background)
    axes.axvline(1, color="#d1495b", label="PyTorch, the same net")
    axes.set_yticks(range(len(nets)), nets)
    axes.invert_yaxis()
    axes.set_xlim(right=1.1 * axes.get_xlim()[1])
    axes.set_xlabel("images/s, divided by PyTorch's (AVX-512)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    main()
