"""Print the tables of the recipe `small` from the raw numbers: they stand in README and RESULTS.md.

python assets/tables.py
"""

import json
import random
import statistics
from pathlib import Path

RAW = Path(__file__).parent / "results"
SEEDS = [int(file.stem.removeprefix("seed-")) for file in sorted(RAW.glob("small/seed-?.json"))]
DATA = ["cranfield", "cisi", "cacm"]


def read(file):
    """{(data, system): result}."""
    results = json.loads((RAW / file).read_text())["results"]
    return {(r["data"], r["system"]): r for r in results}


def interval(differences, resamples=10_000):
    """Mean, and its 95 % interval by resampling the queries (a bootstrap; seed 0)."""
    rng, n = random.Random(0), len(differences)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(resamples))
    low, high = means[resamples // 40], means[-resamples // 40]
    return f"{sum(differences) / n:+.3f} ({low:+.3f} to {high:+.3f})"


def span(values):
    """Mean (lowest to highest)."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def correlation(pairs):
    """Spearman's: of ranks, equal numbers having the mean of theirs."""
    ranks = []
    for x in zip(*pairs):
        ranks.append([sum(y < value for y in x) + x.count(value) / 2 for value in x])
    return statistics.correlation(*ranks)


EOS, START = read("small/eos.json"), read("small/untrained.json")
PLAIN, ENGLISH = read("bm25.json"), read("bm25-english.json")
TRAINED = [read(f"small/seed-{seed}.json") for seed in SEEDS]


def mean(table, system, names):
    return sum(table[name, system]["ndcg@10"] for name in names) / len(names)


def recipe():
    """What is reached, and where it starts; the last row is the mean of those above but adi."""
    yield (
        "| | EOS, untrained | mean, untrained | **trained** | BM25 | BM25 `--english` "
        "| trained + the latter |"
    )
    yield "| --- " * 7 + "|"
    for title, names in [*((name, [name]) for name in ("adi", *DATA)), ("mean of three", DATA)]:
        cells = [f"{mean(table, 'dense', names):.3f}" for table in (EOS, START)]
        cells.append(span([mean(table, "dense", names) for table in TRAINED]))
        cells += [f"{mean(table, 'bm25', names):.3f}" for table in (PLAIN, ENGLISH)]
        cells.append(span([mean(table, "fused", names) for table in TRAINED]))
        yield f"| {title} | " + " | ".join(cells) + " |"


def gains():
    """What training, and what the sum with BM25 is worth: paired over queries, mean over seeds."""
    yield "| | trained - mean, untrained | trained - BM25 | both - BM25 `--english` |"
    yield "| --- " * 4 + "|"
    pairs = [("dense", START, "dense"), ("dense", PLAIN, "bm25"), ("fused", ENGLISH, "bm25")]
    for name in ("adi", *DATA):
        cells = []
        for system, table, other in pairs:
            before = table[name, other]["per_query"]
            after = [table[name, system]["per_query"] for table in TRAINED]
            differences = []
            for qid, values in before.items():
                trained = sum(run[qid]["ndcg@10"] for run in after) / len(after)
                differences.append(trained - values["ndcg@10"])
            cells.append(interval(differences))
        yield f"| {name} | " + " | ".join(cells) + " |"


RUNS = json.loads((RAW / "small/pilots.json").read_text())
PILOTS = {
    "b-noeos": "documents alike by BM25 (`--similar`)",
    "b-sim-s1": "the same",
    "f-rand4": "documents at random, with 4 passages or more",
    "b-rand4-s1": "the same",
    "f-hard": "documents alike by the untrained retriever",
    "f-tfidf": "documents alike by tf-idf",
    "f-hard-clip": "alike by the retriever; the two models' gradients clipped apart",
    "b-lr3e-4": "alike by BM25; `--learning_rate 3e-4`",
    "b-lr1.2e-3": "alike by BM25; `--learning_rate 1.2e-3`",
    "b-rf.3": "alike by BM25; the retriever's rate times 0.3",
    "b-s.4": "alike by BM25; `--inbatch_scale 0.4`",
}


def pilots():
    """60 updates each, by what differs."""
    rows = {row["run"]: row for row in RUNS if row["update"] == 60}
    yield "| run | | seed | adi | med | held-out gain |"
    yield "| --- " * 6 + "|"
    for run, what in PILOTS.items():
        row = rows[run]
        values = f"{row['adi']:.3f} | {row['med']:.3f} | {row['gain']:.3f}"
        yield f"| `{run}` | {what} | {row['seed']} | {values} |"


def claims():
    """Of documents alike against random ones, and of the held-out loss against nDCG."""
    rows = {row["run"]: row.get("per_query") for row in RUNS if row["update"] == 60}
    for data in ("med", "adi"):
        pairs = [(rows["b-noeos"], rows["f-rand4"]), (rows["b-sim-s1"], rows["b-rand4-s1"])]
        pairs = [(alike[data], other[data]) for alike, other in pairs]
        queries = pairs[0][0]
        yield f"{data}: alike - random: " + interval(
            [sum(alike[q] - other[q] for alike, other in pairs) / 2 for q in queries]
        )
    trained = [row for row in RUNS if row["update"] >= 30]
    for what in ("gain", "sib_map"):
        found = [correlation([(r[what], r[data]) for r in trained]) for data in ("adi", "med")]
        yield f"{what}, {len(trained)} evaluations: adi {found[0]:.2f}, med {found[1]:.2f}"
    lines = (RAW / "toy-weights-metrics.jsonl").read_text().splitlines()
    toy = [row for row in map(json.loads, lines) if "heldout_loss" in row]
    loss = [row["heldout_loss"] for row in toy]
    pairs = [(x["uniform"] - x["retriever"], row["ndcg@10"]) for x, row in zip(loss, toy)]
    yield f"toy world, {len(toy)} evaluations: {correlation(pairs):.2f}"


if __name__ == "__main__":
    print("\n".join([*recipe(), "", *gains(), "", *pilots(), "", *claims()]))
