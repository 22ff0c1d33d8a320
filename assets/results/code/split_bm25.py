"""BM25 for code: eval.py's, with identifiers cut at underscores and capitals (snake_case, camelCase), as one command:

python assets/results/code/split_bm25.py --bm25 --data data/eval/cosqa data/eval/pydoc --out split-bm25.json
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
import eval
from data import BM25

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")
BM25.words = staticmethod(lambda text: [word.lower() for word in WORD.findall(text)])
eval.main()
