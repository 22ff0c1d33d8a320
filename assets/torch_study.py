"""A collection and its training text from what everyone has: the source of the torch package.

    python assets/torch_study.py torch-study

FOLDER/corpus.jsonl, queries.jsonl and qrels/test.tsv, in BEIR layout: documents are functions
without their docstring, queries are the first sentences of docstrings. FOLDER/docs.jsonl: the same
package's modules without those docstrings, to train on. It holds no pair of a query and a document.
"""

import argparse
import ast
import inspect
import json
import random
import re
import textwrap
from pathlib import Path

import torch

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTS, QUERIES = 2000, 500


def functions(tree):
    """(first line, end, docstring's first line, its end, first sentence) of documented functions.

    Lines are counted from 0, and the end is the first line that no longer belongs.
    """
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION) and (doc := ast.get_docstring(node)):
            paragraph = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
            sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
            first = min([node, *node.decorator_list], key=lambda n: n.lineno).lineno - 1
            string = node.body[0]
            yield first, node.end_lineno, string.lineno - 1, string.end_lineno, sentence


def main():
    parser = argparse.ArgumentParser(description="Make a test collection of torch's own source.")
    parser.add_argument("out", help="folder to write; must not exist")
    args = parser.parse_args()
    folder, package = Path(args.out), Path(torch.__file__).parent
    if folder.exists():
        parser.error(f"{folder} exists already; remove it or choose another name")
    (folder / "qrels").mkdir(parents=True)
    found, modules = {}, []
    for file in sorted(package.rglob("*.py")):
        if "testing" in file.parts:  # some files there are for later Pythons
            continue
        source = file.read_text(encoding="utf-8")
        lines, cut = source.splitlines(), set()
        name = file.relative_to(package.parent).as_posix()
        for first, end, doc, doc_end, sentence in functions(ast.parse(source)):
            cut |= set(range(doc, doc_end))
            body = lines[first:doc] + lines[doc_end:end]
            if len(body) >= 5 and 5 <= len(sentence.split()) <= 40:
                document = f"{name}:{first + 1}", textwrap.dedent("\n".join(body))
                found.setdefault(sentence, document)
        text = "\n".join(line for n, line in enumerate(lines) if n not in cut)
        modules.append({"_id": name, "text": text})
    rng = random.Random(0)
    chosen = rng.sample(sorted(found.items()), min(DOCUMENTS, len(found)))
    rows = {
        "corpus": [{"_id": place, "title": "", "text": body} for _, (place, body) in chosen],
        "queries": [{"_id": f"q{i}", "text": s} for i, (s, _) in enumerate(chosen[:QUERIES])],
        "docs": modules,
    }
    for name, values in rows.items():
        lines = "".join(json.dumps(value) + "\n" for value in values)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    pairs = [f"q{i}\t{place}\t1" for i, (_, (place, _)) in enumerate(chosen[:QUERIES])]
    judged = "\n".join(["query-id\tcorpus-id\tscore", *pairs])
    (folder / "qrels/test.tsv").write_text(judged + "\n", encoding="utf-8")
    print(f"{folder}: {len(found):,} documented functions, {len(chosen):,} of them documents;")
    print(
        f"{len(pairs):,} queries; {len(modules):,} modules to train on; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
