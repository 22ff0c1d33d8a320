"""Print the tables of RESULTS.md, in its order, from the raw numbers under results/.

python assets/tables.py
"""

import json
import statistics
from pathlib import Path

import numpy as np

RAW = Path(__file__).parent / "results"
DATA = ["cranfield", "cisi", "cacm"]
ROWS = [*((name, [name]) for name in ("adi", *DATA)), ("mean of three", DATA)]
STUDY = "torch-study"
OLD = ["adi", "cranfield", "cisi"]  # of most studies of the old recipe `small`


def read(runs):
    """{(data, system): result} of each of the runs (a pattern)."""
    tables = [json.loads(file.read_text()) for file in sorted(RAW.glob(f"{runs}.json"))]
    return [{(r["data"], r["system"]): r for r in table["results"]} for table in tables]


def logged(runs, key):
    """{update: value} of each of the runs (a pattern)."""
    logs = [file.read_text().splitlines() for file in sorted(RAW.glob(f"{runs}-metrics.jsonl"))]
    logs = [[json.loads(text) for text in log] for log in logs]
    return [{row["step"]: row[key] for row in log if key in row} for log in logs]


def all_gains(runs):
    """{update: held-out loss with uniform weights, minus that with the retriever's}, of each."""
    logs = logged(runs, "heldout_loss")
    return [{step: x["uniform"] - x["retriever"] for step, x in log.items()} for log in logs]


def gain(run):
    [found] = all_gains(run)
    return found


def last_gains(runs):
    return [log[max(log)] for log in all_gains(runs)]


def config(run):
    return json.loads((RAW / f"{run}-config.json").read_text())


def rate(values):
    return f"{values['learning_rate']:.0e}".replace("e-0", "e-")


def ndcg(runs, system, *names):
    """nDCG@10, a mean over the data `names`, of each run that has them."""
    tables = [table for table in read(runs) if all((name, system) in table for name in names)]
    return [sum(t[name, system]["ndcg@10"] for name in names) / len(names) for t in tables]


def cell(runs, system, *names):
    return ", ".join(f"{x:.3f}" for x in ndcg(runs, system, *names)) or "–"


def across(runs, system):
    return [cell(runs, system, name) for name in OLD]


def line(*cells):
    return f"| {' | '.join(cells)} |"


def head(columns):
    yield columns
    yield "| --- " * (columns.count("|") - 1) + "|"


def interval(collections, resamples=10_000):
    """Mean of one side minus the other, and its 95 % interval. Over collections a mean is taken.

    collections: pairs of arrays [runs, queries]. A bootstrap with seed 0: each collection's queries
    are resampled, and the runs of either side, the same for all collections.
    """
    rng, found, differences = np.random.default_rng(0), 0, 0
    shares = []  # of each run in a resample: [resamples, runs], a side
    for side in collections[0]:
        runs = len(side)
        shares.append(rng.multinomial(runs, [1 / runs] * runs, resamples) / runs)
    for first, second in collections:
        n = first.shape[1]
        queries = rng.integers(n, size=(resamples, n))
        over_runs = shares[0] @ first - shares[1] @ second  # [resamples, queries]
        differences += np.take_along_axis(over_runs, queries, 1).mean(1) / len(collections)
        found += (first.mean() - second.mean()) / len(collections)
    low, high = np.quantile(differences, [0.025, 0.975])
    return f"{found:+.3f} ({low:+.3f} to {high:+.3f})"


def paired(names, *sides):
    """The interval of two sides, each (runs, system); {} in the name of runs is a collection's."""
    collections = []
    for name in names:
        pair = []
        for runs, system in sides:
            tables = [table[name, system]["per_query"] for table in read(runs.format(name))]
            pair.append(np.array([[t[q]["ndcg@10"] for q in sorted(t)] for t in tables]))
        collections.append(pair)
    return interval(collections)


def span(values):
    """Mean (lowest to highest); one value as it is."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def correlation(pairs):
    """Spearman's: of ranks, equal numbers having the mean of theirs."""
    ranks = []
    for x in zip(*pairs):
        ranks.append([sum(y < value for y in x) + x.count(value) / 2 for value in x])
    return statistics.correlation(*ranks)


def toy():
    yield from head("| update | 0 | 100 | 200 | 300 | 400 | 500 |")
    for title, run in {"Revela": "toy", "control, `--no_inbatch`": "toy-control"}.items():
        [found] = logged(run, "ndcg@10")
        yield line(title, *(f"{x:.4f}" for x in found.values()))


def recipe():
    """What is reached, and where it starts; the last row is the mean of those above but adi."""
    yield from head(
        "| | EOS, untrained | mean, untrained | **trained** | BM25 | BM25 `--english` "
        "| trained + the latter |"
    )
    for title, names in ROWS:
        cells = [cell(f"small/{run}", "dense", *names) for run in ("eos", "untrained")]
        cells.append(span(ndcg("small/seed-?", "dense", *names)))
        cells += [cell(run, "bm25", *names) for run in ("bm25", "bm25-english")]
        cells.append(span(ndcg("small/seed-?", "fused", *names)))
        yield line(title, *cells)


def readme():
    """What helped to choose nothing, and the study that everyone can make again."""
    yield from head(
        "| | EOS, untrained | mean, untrained | **trained on Wikipedia** | **on its own texts** "
        "| BM25 | BM25 `--english` | own texts + BM25 `--english` |"
    )
    for title, names in ROWS[1:]:
        cells = [cell(f"small/{run}", "dense", *names) for run in ("eos", "untrained")]
        cells.append(span(ndcg("small/seed-?", "dense", *names)))
        cells.append(span(own("dense", *names)))
        cells += [cell(run, "bm25", *names) for run in ("bm25", "bm25-english")]
        yield line(title, *cells, span(own("fused", *names)))
    trained = [span(ndcg(f"small/torch-{run}", "dense", STUDY)) for run in ("?", "own-?")]
    bm25 = [cell(f"small/torch-{run}", "bm25", STUDY) for run in ("bm25", "own-0")]
    both = span(ndcg("small/torch-own-?", "fused", STUDY))
    untrained = cell("small/torch-untrained", "dense", STUDY)
    yield line("torch's source", "–", untrained, *trained, *bm25, both)


def size_table(sizes, pairs):
    """sizes: {runs: a run whose config has their settings}; pairs: {title: two sides}."""
    yield from head(
        "| passages in a group | updates | adi | cranfield | cisi | cacm | mean of three "
        "| with BM25 `--english` |"
    )
    for runs, run in sizes.items():
        settings = [str(config(run)[key]) for key in ("train_group_size", "max_steps")]
        cells = [span(ndcg(runs, "dense", *names)) for _, names in ROWS]
        yield line(*settings, *cells, span(ndcg(runs, "fused", *DATA)))
    for title, sides in pairs.items():
        dense, fused = ([(runs, system) for runs in sides] for system in ("dense", "fused"))
        cells = [paired(names, *dense) for _, names in ROWS]
        yield line(title, "", *cells, paired(DATA, *fused))


def sizes():
    """Groups of 4 to 32, as many passages; then what 16 is worth more than the others."""
    names = {4: "size4", 8: "size8", 16: "seed", 32: "size32"}
    runs = {size: f"small/{name}-[0-2]" for size, name in names.items()}
    pairs = {f"16 - {size}": (runs[16], runs[size]) for size in (4, 8, 32)}
    yield from size_table({runs[size]: f"small/{names[size]}-0" for size in runs}, pairs)


def equal_updates():
    """Groups of 4 to 32, as many updates, then the recipe; texts read up to 96 tokens."""
    runs = {size: f"small/equal{size}-[0-2]" for size in (4, 8, 16, 32)}
    configs = {runs[size]: f"small/equal{size}-0" for size in (4, 8, 16)}
    configs |= {runs[32]: "small/size32-0", "small/begin-[0-2]": "small/begin-0"}
    pairs = {f"16 - {size}": (runs[16], runs[size]) for size in (4, 8, 32)}
    pairs["16: 100 updates - 50"] = ("small/begin-[0-2]", runs[16])
    yield from size_table(configs, pairs)


def own(system, *names):
    """nDCG@10 of each seed, a mean over `names`, after training on each one's own documents."""
    each = [ndcg(f"small/own-{name}-?", system, name) for name in names]
    return [sum(values) / len(values) for values in zip(*each)]


def own_texts():
    """Trained on an encyclopedia, and on the collection's own documents; last that of code."""
    yield from head(
        "| | mean, untrained | on Wikipedia | on its own texts | own texts - Wikipedia "
        "| own texts - BM25 `--english` | both - BM25 `--english` |"
    )
    classic = "small/untrained", ("small/seed-?", "dense"), ("bm25-english", "bm25")
    code = "small/pydoc-untrained", ("small/pydoc-?", "dense"), ("small/own-pydoc-0", "bm25")
    rows = [(*row, *classic) for row in ROWS[1:]] + [("pydoc", ["pydoc"], *code)]
    for title, names, untrained, wiki, bm25 in rows:
        dense, fused = (("small/own-{}-?", system) for system in ("dense", "fused"))
        cells = [cell(untrained, "dense", *names)]
        cells += [span(ndcg(*wiki, *names)), span(own("dense", *names))]
        pairs = (dense, wiki), (dense, bm25), (fused, bm25)
        yield line(title, *cells, *(paired(names, *sides) for sides in pairs))


def gains():
    """What training, and what the sum with BM25 is worth."""
    yield from head("| | trained - mean, untrained | trained - BM25 | both - BM25 `--english` |")
    trained, both = ("small/seed-?", "dense"), ("small/seed-?", "fused")
    for title, names in ROWS:
        cells = [paired(names, trained, ("small/untrained", "dense"))]
        cells.append(paired(names, trained, ("bm25", "bm25")))
        yield line(title, *cells, paired(names, both, ("bm25-english", "bm25")))


def lengths():
    """How many tokens of a text to read, chosen by adi and med."""
    yield from head("| tokens of a text | adi | med |")
    for size in ("64", "96", "128", "512"):
        cells = [cell(f"small/len{size}-?", "dense", name) for name in ("adi", "med")]
        yield line(size, *cells)


def beginnings():
    """The first 96 tokens of each text, in place of 512: four seeds."""
    yield from head("| | 512 tokens | 96 tokens | 96 - 512 | 96, with BM25 `--english` |")
    long, short = "small/seed-[0124]", "small/begin-?"
    for title, names in ROWS:
        cells = [span(ndcg(runs, "dense", *names)) for runs in (long, short)]
        cells.append(paired(names, (short, "dense"), (long, "dense")))
        yield line(title, *cells, span(ndcg(short, "fused", *names)))


MINUTES = 488 / 60  # of a run
# how many runs are averaged, and the files that have them
AVERAGES = {1: "small/begin-[0124]"} | {n: f"small/mean-{'?' * n}" for n in (2, 4, 7)}


def minutes():
    """One run, and averages of several; texts read up to 96 tokens."""
    yield from head(
        "| runs | minutes | averages | adi | mean of three | that minus one run's "
        "| with BM25 `--english` | held-out gain |"
    )
    for n, runs in AVERAGES.items():
        found = [ndcg(runs, "dense", "adi"), ndcg(runs, "dense", *DATA)]
        more = "" if n == 1 else paired(DATA, (runs, "dense"), (AVERAGES[1], "dense"))
        cells = [str(n), f"{n * MINUTES:.0f}", str(len(found[0])), *map(span, found), more]
        yield line(*cells, span(ndcg(runs, "fused", *DATA)), span(last_gains(runs)))


def hour():
    """The recipe with 800 updates for 100, on the way."""
    [found], gains = logged("small/hour-0", "per_data"), gain("small/hour-0")
    yield from head("| update | adi | med | held-out gain |")
    for step in found:
        values = (found[step]["adi"], found[step]["med"], gains[step])
        yield line(str(step), *(f"{value:.3f}" for value in values))


def hour_end():
    """And at its end, beside the 100 updates of the same seed."""
    yield from head("| | 100 updates | 800 | 100, with BM25 `--english` | 800, with it |")
    for title, names in ROWS:
        pairs = [(run, system) for system in ("dense", "fused") for run in ("seed-0", "hour-0")]
        yield line(title, *(cell(f"small/{run}", system, *names) for run, system in pairs))


def contrastive_pilots():
    """Chosen by adi and med: texts read up to 96 tokens, seed 0."""
    yield from head("| negatives | τ | learning rate | updates | adi | med |")
    runs = ["c-rand-.02", "c-rand-.05", "c-sim-.05", "c-sim-.1", "c-sim-.05-lr2e-4"]
    runs += ["c-sim-.1-lr2e-4", "c-sim-.2-lr2e-4", "c-sim-.05-lr7e-5"]
    runs += ["c-sim-.1-lr2e-4-230", "c-sim-.1-lr7e-5-230"]
    for run in runs:
        values = config(f"small/{run}")
        kind = "at random" if "rand" in run else "alike"
        cells = [cell(f"small/{run}", "dense", name) for name in ("adi", "med")]
        settings = [str(values["attn_temperature"]), rate(values), str(values["max_steps"])]
        yield line(kind, *settings, *cells)
    for title, run in (("*mean, untrained*", "untrained"), ("*Revela, seed 0*", "0")):
        cells = [cell(f"small/short-{run}", "dense", name) for name in ("adi", "med")]
        yield line(title, "", "", "", *cells)


def replug_pilots():
    """REPLUG, chosen the same way: 40 updates, seed 0."""
    yield from head("| τ | β | learning rate | adi | med |")
    runs = ["r-.1-.1-6e-4", "r-.1-.03-2e-4", "r-.1-.01-2e-4", "r-.1-.003-2e-4", "r-.1-.01-5e-5"]
    for run in runs:
        values = config(f"small/{run}")
        temperatures = [str(values[key]) for key in ("attn_temperature", "lm_temperature")]
        cells = [cell(f"small/{run}", "dense", name) for name in ("adi", "med")]
        yield line(*temperatures, rate(values), *cells)


def contrastive():
    """The best of the pilots at full length: as many updates as Revela, then more than its time."""
    yield from head(
        "| | mean, untrained | contrastive | 230 updates | 230 updates at 7e-5 | REPLUG | Revela "
        "| Revela - contrastive | Revela - 230 at 7e-5 | Revela - REPLUG |"
    )
    short, long, low = (f"small/contrastive-{kind}?" for kind in ("", "230-", "7e-5-"))
    for title, names in ROWS:
        runs = ["small/untrained", short, long, low, "small/replug-?", "small/seed-?"]
        cells = [span(ndcg(run, "dense", *names)) for run in runs]
        for other in (short, low, "small/replug-?"):
            cells.append(paired(names, ("small/seed-?", "dense"), (other, "dense")))
        yield line(title, *cells)
    runs = ("untrained", "contrastive-?", "replug-?", "?")
    sides = [(f"small/torch-{run}", "dense") for run in runs]
    untrained, trained, replug, revela = (span(ndcg(*side, STUDY)) for side in sides)
    differences = [paired([STUDY], sides[3], side) for side in sides[1:3]]
    cells = [untrained, trained, "–", "–", replug, revela, differences[0], "–", differences[1]]
    yield line("torch's source", *cells)


def averaged():
    """The retrievers of four seeds in one."""
    yield from head(
        "| | four seeds | their average | average - four | four, with BM25 `--english` "
        "| average, with it |"
    )
    four, average = "small/seed-[0-3]", "small/average"
    for title, names in ROWS:
        cells = [span(ndcg(four, "dense", *names)), cell(average, "dense", *names)]
        cells.append(paired(names, (average, "dense"), (four, "dense")))
        cells += [span(ndcg(four, "fused", *names)), cell(average, "fused", *names)]
        yield line(title, *cells)


RUNS = json.loads((RAW / "small/pilots.json").read_text())
PILOTS = {
    "b-noeos": "the recipe: documents alike by BM25 (`--similar`)",
    "b-sim-s1": "the recipe",
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
    yield from head("| what differs | seed | adi | med | held-out gain | in `pilots.json` |")
    for run, what in PILOTS.items():
        row = rows[run]
        values = [f"{row[key]:.3f}" for key in ("adi", "med", "gain")]
        yield line(what, str(row["seed"]), *values, f"`{run}`")


# what differs, and the runs that have its evaluation, its log, and the update
VARIANTS = [
    ("before training", "short-untrained", "seed-0", 0),
    ("the recipe", "short-0", "seed-0", 100),
    ("`--freeze_lm`", "frozen-0", "frozen-0", 100),
    ("Muon for AdamW, with rates scaled to AdamW's", "muon-0", "muon-0", 100),
    ("`--lora_r 8`", "rank8-0", "rank8-0", 100),
    ("`--lora_r 128`", "rank128-0", "rank128-0", 100),
]


def variants():
    """One thing changed in the recipe, seed 0; texts read up to 96 tokens."""
    yield from head("| what differs | updates | adi | med | held-out gain |")
    for what, run, log, step in VARIANTS:
        cells = [cell(f"small/{run}", "dense", name) for name in ("adi", "med")]
        yield line(what, str(step), *cells, f"{gain(f'small/{log}')[step]:.3f}")


def claims():
    """Of documents alike against random ones, of code, of own texts, and of the held-out loss."""
    rows = {row["run"]: row.get("per_query") for row in RUNS if row["update"] == 60}
    for data in ("med", "adi"):
        alike, other = (
            np.array([[rows[run][data][q] for q in sorted(rows[run][data])] for run in runs])
            for runs in (("b-noeos", "b-sim-s1"), ("f-rand4", "b-rand4-s1"))
        )
        yield f"{data}: alike - random: " + interval([(alike, other)])
    source, wiki = ("small/torch-own-?", "dense"), ("small/torch-?", "dense")
    code, english = ("small/torch-own-0", "bm25"), ("small/torch-english", "bm25")
    both = "small/torch-own-?", "fused"
    for title, *sides in (
        ("on the source - on Wikipedia", source, wiki),
        ("on the source - BM25 --english --identifiers", source, code),
        ("on Wikipedia - BM25 --english --identifiers", wiki, code),
        ("on the source - BM25 --english", source, english),
        ("on Wikipedia - BM25 --english", wiki, english),
        ("both - BM25 --english --identifiers", both, code),
    ):
        yield f"torch: {title}: " + paired([STUDY], *sides)
    texts = "small/own-{}-?", "dense"
    yield "mean of three: own texts - BM25: " + paired(ROWS[-1][1], texts, ("bm25", "bm25"))
    late = [row for row in RUNS if row["update"] >= 30]
    for what in ("gain", "sib_map"):
        found = [correlation([(r[what], r[data]) for r in late]) for data in ("adi", "med")]
        yield f"{what}, {len(late)} evaluations: adi {found[0]:.2f}, med {found[1]:.2f}"
    [found], gains = logged("toy-weights", "ndcg@10"), gain("toy-weights")
    pairs = [(gains[step], found[step]) for step in gains]
    yield f"toy world, {len(pairs)} evaluations: {correlation(pairs):.2f}"


def torch_source():
    """Trained on an encyclopedia, and on the collection's own texts."""
    yield from head(
        "| mean, untrained | trained on Wikipedia | trained on the source | BM25 "
        "| BM25 `--english` | BM25 `--english --identifiers` | on the source + the latter |"
    )
    cells = [cell("small/torch-untrained", "dense", STUDY)]
    cells += [span(ndcg(f"small/torch-{run}", "dense", STUDY)) for run in ("?", "own-?")]
    cells += [cell(f"small/torch-{run}", "bm25", STUDY) for run in ("bm25", "english", "own-0")]
    yield line(*cells, span(ndcg("small/torch-own-?", "fused", STUDY)))


def rounding():
    yield from head(
        "| residual stream | adi | cranfield | cisi | with BM25: adi, cranfield, cisi |"
    )
    for title, run in {
        "bfloat16, commit fa9258b or earlier (`revela-now-0`)": "rounding/revela-now-0",
        "bfloat16, commit 8211965 (`residual-bf16`)": "rounding/residual-bf16",
        "float32, today's (`residual-float32`)": "rounding/residual-float32",
    }.items():
        yield line(title, *across(run, "dense"), ", ".join(across(run, "fused")))


def toy_ablations():
    """One thing changed, toy world: after 500 updates."""
    yield from head("| changed | seed 0 | seed 1 |")
    for title, run in {
        "none": "default",
        "`--no-v_norm`": "no_v_norm",
        "`--first_half`": "first_half",
        "`--train_group_size 4 --groups_per_device 8` (as many passages)": "group-4",
        "`--attn_temperature 1e-4`, the published one": "tau-1e-4",
        "`--freeze_lm` (here a random language model)": "freeze_lm",
    }.items():
        found = logged(f"toy-ablations/{run}-?", "ndcg@10")
        yield line(title, *(f"{values[500]:.4f}" for values in found))


TABLES = [toy, recipe, gains, averaged, lengths, beginnings, minutes, hour, hour_end, pilots]
TABLES += [variants, contrastive_pilots, contrastive, replug_pilots, sizes, equal_updates]
TABLES += [own_texts, torch_source, rounding, toy_ablations]

if __name__ == "__main__":
    for table in [*TABLES, claims]:
        print(*table(), "", sep="\n")
