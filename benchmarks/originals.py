"""The originals' own figures beside ours: seconds per epoch, memory and test error.

python -m benchmarks.originals cfmz xnets
python -m benchmarks.originals xnets --rounds 3 --steps 2

cfmz: the table of its README, by depth. xnets: the seconds per epoch of its training
logs on CIFAR-10, of dense nets and of the expanders with the same growth; "of dense" is
the time relative to the dense net. Ours are measured as in benchmarks.models, with the
recipe's batch size, without input pipeline and evaluation. An expander and its dense
net take turns, because machines are shared and noisy. Our memory is the peak of the
process. Our errors are those of the runs in results/.
"""

import argparse
import dataclasses
import importlib
import pathlib
import statistics

import benchmarks
from benchmarks.models import Player, ratio
from configs.data_sets import DATA_SETS
from runtime.workdir import read_rows


@dataclasses.dataclass(frozen=True)
class Original:
    """A published row: seconds per epoch on its GPU, and the GPU's memory in MiB."""

    variant: str
    seconds: float
    memory: int | None = None


# Groups that take turns. The first of a group is the dense net.
SYSTEMS = {
    # README of cfmz, one TITAN X.
    "cfmz": (
        (Original("cfmz:20", 11, 521),),
        (Original("cfmz:32", 18, 636),),
        (Original("cfmz:56", 30, 860),),
        (Original("cfmz:110", 60, 1277),),
    ),
    # Logs of Deep-Expander-Networks, median over epochs of the training time on one
    # GPU, which they do not name.
    "xnets": (
        (Original("xdensenet:40-24", 39.6), Original("xdensenet:40-24-2", 40.3)),
        (Original("xdensenet:40-36", 64.7), Original("xdensenet:40-36-2", 65.3)),
        (Original("xdensenet:40-48", 82.8), Original("xdensenet:40-48-2", 86.5)),
        (Original("xdensenet:40-60", 109.2), Original("xdensenet:40-60-2", 109.2)),
    ),
}
DATA = "cifar10"
IMAGES = DATA_SETS[DATA].num_train
# The runs of our test errors: files in results/.
RUNS = {"cfmz:20": "cfmz20-160of180epochs-seed*-h200-*.csv"}
HEADER = (
    *("variant", "s/epoch, published", "s/epoch, ours"),
    *("of dense, published", "of dense, ours"),
    *("MiB, published", "MiB, ours", "error in %, published", "error in %, ours"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument("--threads", type=int, default=2, help="on CPU")
    options = parser.parse_args()
    for system in options.systems:
        rows = [row for group in SYSTEMS[system] for row in measure(group, options)]
        print(markdown(rows))
        name = benchmarks.machine(rows[0]["device"], options.threads)
        benchmarks.write(f"originals-{system}-{name}-jax{rows[0]['jax']}", rows)


def measure(group: tuple[Original, ...], options: argparse.Namespace) -> list[dict]:
    """Returns a row for each net of a group; they take turns."""
    configs = [_config(original.variant) for original in group]
    players = []
    for original, config in zip(group, configs, strict=True):
        batch = argparse.Namespace(
            **vars(options) | {"batch_size": config.train.batch_size}
        )
        players.append(Player(("ours", original.variant, "auto"), batch))
    for number in range(options.rounds):
        for player in players if number % 2 == 0 else reversed(players):
            player.play()
    rows = []
    for original, config, player in zip(group, configs, players, strict=True):
        found = player.finish()
        rows.append(
            {
                "variant": original.variant,
                "published_seconds": original.seconds,
                "seconds": round(IMAGES / found["images_per_second"], 1),
                **_of_dense(original.seconds, group, player, players),
                "published_memory_mib": original.memory or "",
                "memory_mib": found["peak_memory_mb"],
                **_errors(original.variant),
                "batch_size": config.train.batch_size,
                **{name: found[name] for name in ("slowest", "fastest")},
                **{name: found[name] for name in ("compile_seconds", "device", "jax")},
                "dtype": options.dtype,
                "rounds": options.rounds,
                "steps": options.steps,
            }
        )
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def _of_dense(seconds, group, player, players) -> dict:
    """Returns the times relative to the dense net's; "" if there is no other net."""
    alone = len(group) == 1
    return {
        "published_of_dense": "" if alone else round(seconds / group[0].seconds, 3),
        "of_dense": "" if alone else round(1 / ratio(player, players[0]), 3),
    }


def _config(variant: str):
    family, _, name = variant.partition(":")
    return importlib.import_module(f"configs.{family}").get_config(f"{name},{DATA}")


def _errors(variant: str) -> dict:
    """Returns the published error and the mean of our runs, in percent."""
    family, _, name = variant.partition(":")
    row = importlib.import_module(f"configs.{family}").VARIANTS[name].published[DATA]
    found = {
        "published_error": row.error,
        "published_selection": row.selection,
        "error": "",
        "error_sd": "",
        "seeds": 0,
    }
    if variant in RUNS:
        runs = sorted(pathlib.Path(benchmarks.RESULTS).glob(RUNS[variant]))
        last = [100 * (1 - read_rows(path)[-1]["test_accuracy"]) for path in runs]
        found["error"] = round(statistics.mean(last), 2)
        found["error_sd"] = round(statistics.stdev(last), 2)
        found["seeds"] = len(last)
    return found


def markdown(rows: list[dict]) -> str:
    """Returns the rows of `measure`, or of its file, as a Markdown table."""
    table = [HEADER]
    for row in rows:
        error = f"{float(row['published_error']):.2f} ({row['published_selection']})"
        ours = f"{row['error']} ± {row['error_sd']} ({row['seeds']} seeds)"
        names = ("variant", "published_seconds", "seconds", "published_of_dense")
        names += ("of_dense", "published_memory_mib", "memory_mib")
        cells = [str(row[name]) for name in names]
        table.append([*cells, error, ours if row["error"] else ""])
    # Columns without an entry are left out.
    used = [i for i, cells in enumerate(zip(*table[1:], strict=True)) if any(cells)]
    lines = [[line[i] for i in used] for line in table]
    lines.insert(1, ["---"] * len(used))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
