"""Print the tables of the recipe `small` from the raw numbers: they stand in README and RESULTS.md.

python assets/tables.py
"""

import json
import random
from pathlib import Path

RAW = Path(__file__).parent / "results"
SEEDS = [int(file.stem.removeprefix("seed-")) for file in sorted(RAW.glob("small/seed-?.json"))]
DATA = ["cranfield", "cisi", "cacm"]


def read(file):
    """{(data, system): nDCG@10}."""
    results = json.loads((RAW / file).read_text())["results"]
    return {(r["data"], r["system"]): r["ndcg@10"] for r in results}


def queries(file, system, data):
    """{query id: nDCG@10}."""
    for r in json.loads((RAW / file).read_text())["results"]:
        if (r["data"], r["system"]) == (data, system):
            return {qid: values["ndcg@10"] for qid, values in r["per_query"].items()}


def interval(differences, resamples=10_000):
    """Mean, and its 95 % interval by resampling the queries (a bootstrap; seed 0)."""
    rng, n = random.Random(0), len(differences)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(resamples))
    low, high = means[resamples // 40], means[-resamples // 40]
    return f"{sum(differences) / n:+.3f} ({low:+.3f} to {high:+.3f})"


def span(values):
    """Mean (lowest to highest)."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def recipe():
    """What is reached, and where it starts; the last row is the mean of those above but adi."""
    eos, start = read("small/eos.json"), read("small/untrained.json")
    plain, english = read("bm25.json"), read("bm25-english.json")
    seeds = [read(f"small/seed-{seed}.json") for seed in SEEDS]
    yield (
        "| | EOS, untrained | mean, untrained | **trained** | BM25 | BM25 `--english` "
        "| trained + the latter |"
    )
    yield "| --- " * 7 + "|"
    for name in ("adi", *DATA, "mean of three"):

        def value(table, system, names=(name,) if name in ("adi", *DATA) else DATA):
            return sum(table[n, system] for n in names) / len(names)

        trained = span([value(seed, "dense") for seed in seeds])
        both = span([value(seed, "fused") for seed in seeds])
        row = [value(eos, "dense"), value(start, "dense"), value(plain, "bm25")]
        row = [f"{x:.3f}" for x in (*row, value(english, "bm25"))]
        yield f"| {name} | {row[0]} | {row[1]} | {trained} | {row[2]} | {row[3]} | {both} |"


def gains():
    """What training, and what the sum with BM25 is worth: paired over queries, mean over seeds."""
    yield "| | trained - mean, untrained | trained - BM25 | both - BM25 `--english` |"
    yield "| --- " * 4 + "|"
    for name in ("adi", *DATA):
        pairs = [("dense", "small/untrained.json", "dense"), ("dense", "bm25.json", "bm25")]
        cells = []
        for system, file, other in [*pairs, ("fused", "bm25-english.json", "bm25")]:
            before = queries(file, other, name)
            after = [queries(f"small/seed-{seed}.json", system, name) for seed in SEEDS]
            means = {qid: sum(run[qid] for run in after) / len(after) for qid in before}
            cells.append(interval([means[qid] - before[qid] for qid in before]))
        yield f"| {name} | " + " | ".join(cells) + " |"


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
    rows = json.loads((RAW / "small/pilots.json").read_text())
    rows = {row["run"]: row for row in rows if row["update"] == 60}
    yield "| | seed | adi | med | held-out gain |"
    yield "| --- " * 5 + "|"
    for run, what in PILOTS.items():
        row = rows[run]
        values = f"{row['adi']:.3f} | {row['med']:.3f} | {row['gain']:.3f}"
        yield f"| {what} | {row['seed']} | {values} |"


if __name__ == "__main__":
    print("\n".join([*recipe(), "", *gains(), "", *pilots()]))
