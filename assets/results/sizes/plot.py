"""nDCG@10 against the size of a group, from results of eval.py --bm25, as one command:

python assets/results/sizes/plot.py sizes.svg 8=size-8.json 16=size-16.json 32=size-32.json 64=size-64.json
"""

import json
import sys
from pathlib import Path

from matplotlib import figure, rcParams

rcParams.update({"font.size": 13, "svg.hashsalt": "0", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
picture = figure.Figure(figsize=(6, 4), layout="tight")
axes = picture.subplots()
values = {}
for size, file in (arg.split("=") for arg in sys.argv[2:]):
    for r in json.loads(Path(file).read_text())["results"]:
        values.setdefault((r["data"], r["system"]), {})[int(size)] = r["ndcg@10"]
for data, color, mark in (("cranfield", "#0072B2", "o"), ("cisi", "#D55E00", "s")):  # Okabe and Ito's colours
    sizes, ndcg = zip(*sorted(values[data, "dense"].items()))
    axes.plot(sizes, ndcg, mark + "-", color=color, label=data)
    axes.axhline(max(values[data, "bm25"].values()), color=color, linewidth=1, linestyle=":", label=f"BM25 on {data}")
axes.set_xscale("log", base=2)
axes.set_xticks(sizes, map(str, sizes))
axes.set_ylim(0)
axes.set(xlabel="passages in a group", ylabel="nDCG@10")
axes.legend(frameon=False, ncols=2, fontsize=11, loc="lower right")
with open(sys.argv[1], "x") as file:  # must not exist
    picture.savefig(file, format="svg", metadata={"Date": None})
