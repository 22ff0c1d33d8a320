"""Draw curves.svg from the metrics beside this file: python assets/results/curves.py   (pip install matplotlib)"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

here = Path(__file__).parent
plt.rcParams |= {"font.size": 13, "svg.hashsalt": "0", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
figure, axes = plt.subplots(3, 1, figsize=(6, 9), sharex=True)
panels = (("ndcg@10", "nDCG@10 on adi"), ("loss", "next-token loss"), ("max_weight", "mean largest weight"))
for seed, color, style in ((0, "#0072B2", "o-"), (1, "#D55E00", "s--")):  # Okabe and Ito's, told apart by marks too
    rows = [json.loads(line) for line in (here / f"smol-seed{seed}-metrics.jsonl").read_text().splitlines()]
    for axis, (name, label) in zip(axes, panels):
        axis.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row]), style, color=color, label=f"seed {seed}", markersize=4)
        axis.set_ylabel(label)
axes[0].axhline(0.383, color="black", linewidth=1, linestyle=":", label="BM25")
axes[0].legend(frameon=False)
axes[2].set_xlabel("updates (one group of 16 passages each)")
figure.tight_layout()
figure.savefig(here / "curves.svg", metadata={"Date": None})
