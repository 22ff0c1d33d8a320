"""BM25 of eval.py with identifiers cut at underscores and capitals (snake_case, camelCase).

python assets/results/code/split_bm25.py --bm25 --data data/eval/cosqa --out split-bm25.json
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
import eval

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")


def words(text):
    return [word.lower() for word in WORD.findall(text)]


eval.BM25.words = staticmethod(words)
eval.main()
