"""Draw every picture of the README and of RESULTS.md. Needs matplotlib: pip install matplotlib

python assets/plot.py updates curves.svg runs/smol-0 runs/smol-1
python assets/plot.py weights weights.svg runs/small-0 --at 0 20 60 100
python assets/plot.py minutes minutes.svg
"""

import argparse
import json
import re
import sys
from pathlib import Path

from tables import AVERAGES, DATA, MINUTES, last_gains, ndcg

try:
    from matplotlib import cycler, figure, rcParams
except ImportError:
    sys.exit("plot.py needs the package matplotlib: pip install matplotlib")

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]  # Okabe and Ito's
STYLE = {
    "axes.prop_cycle": cycler(color=COLORS, marker=list("os^Dv")),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 13,
    "svg.fonttype": "none",
    "svg.hashsalt": "0",  # the same numbers make the same file
}
PANELS = {"ndcg@10": "nDCG@10", "loss": "loss", "max_weight": "mean largest weight"}
PANELS["gain"] = "held-out gain"  # only where it was logged


def read_log(run):
    file = run / "metrics.jsonl" if run.is_dir() else run
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if losses := row.get("heldout_loss"):
            row["gain"] = losses["uniform"] - losses["retriever"]
    return rows


def updates(runs):
    logs = {run: read_log(run) for run in map(Path, runs)}
    found = {key for rows in logs.values() for row in rows for key in row}
    keys = [key for key in PANELS if key in found]
    picture = figure.Figure(figsize=(6, 3 * len(keys)), layout="tight")
    panels = picture.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    for run, rows in logs.items():
        name = run.name.removesuffix("-metrics.jsonl")
        for axes, key in zip(panels, keys):
            x = [row["step"] for row in rows if key in row]
            y = [row[key] for row in rows if key in row]
            axes.plot(x, y, markersize=4, label=name)
            axes.set_ylabel(PANELS[key])
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("updates")
    return picture


def minutes():
    """One run of `small`, and averages of several, against the minutes that they took."""
    picture = figure.Figure(figsize=(6, 6), layout="tight")
    panels = picture.subplots(2, sharex=True)
    means = [], []
    for n, runs in AVERAGES.items():
        x, values = n * MINUTES, (ndcg(runs, "dense", *DATA), last_gains(runs))
        for axes, y, mean in zip(panels, values, means):
            axes.plot([x] * len(y), y, "o", color=COLORS[0], alpha=0.5)
            mean.append((x, sum(y) / len(y)))
    for axes, mean, title in zip(panels, means, ("nDCG@10, mean of three", "held-out gain")):
        axes.plot(*zip(*mean), marker="", color=COLORS[0])
        axes.set_ylabel(title)
    panels[-1].set_xlabel("minutes")
    return picture


def weights(run, at):
    """The weights w of a run's first held-out group as squares, at the updates `at`."""
    run = Path(run)
    config = json.loads((run / "config.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = {row["step"]: row for row in rows if "weights" in row}
    order = range(config["train_group_size"])
    if config["recipe"] == "toy":  # whose groups are shuffled: put a person's passages together
        groups = Path(config["data"]).read_text().splitlines()
        texts = json.loads(groups[-config["heldout_groups"]])
        names = [re.search("[A-Z][a-z]+ [A-Z][a-z]+", text)[0] for text in texts]
        order = sorted(order, key=names.__getitem__)
    picture = figure.Figure(figsize=(3 * len(at), 3.6), layout="constrained")
    for axes, step in zip(picture.subplots(1, len(at), squeeze=False)[0], at):
        w = [[rows[step]["weights"][i][j] for j in order] for i in order]
        axes.imshow(w, cmap="Blues", vmin=0, vmax=1)
        ndcg = f"\nnDCG@10 {rows[step]['ndcg@10']:.2f}" if "ndcg@10" in rows[step] else ""
        axes.set_title(f"update {step}{ndcg}", fontsize=13)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    return picture


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw training runs.")
    add = parser.add_argument
    add("kind", choices=("updates", "weights", "minutes"))
    add("out", help="picture to write (.svg, .png); must not exist")
    add("runs", nargs="*", help="run folders or metrics.jsonl files; minutes: none")
    add("--at", type=int, nargs="+", default=[0, 20, 60, 100], help="weights: which updates")
    args = parser.parse_args(argv)
    if bool(args.runs) == (args.kind == "minutes"):
        parser.error("updates and weights need runs, minutes has none")
    if Path(args.out).exists():
        parser.error(f"{args.out} exists already; remove it or choose another name")
    rcParams.update(STYLE)
    if args.kind == "updates":
        picture = updates(args.runs)
    elif args.kind == "weights":
        picture = weights(args.runs[0], args.at)
    else:
        picture = minutes()
    picture.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
