"""How well does a retriever find the relevant documents of a test collection?

    python eval.py --model BASE --adapter runs/mine/retriever --data scifact --out results.json
    python eval.py --bm25 --data scifact     # lexical; with --model too: dense, bm25, fused
    python eval.py --model BASE --adapter ... --interactive NOTES    # ask your own texts
    python eval.py --model BASE --adapter ... --export FOLDER        # for sentence-transformers
    python eval.py --model BASE --adapter ... --mteb SciFact         # by mteb (pip install mteb)
    torchrun --nproc_per_node=8 eval.py --model BASE ...             # shares the documents

A collection is a folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv. Every document
is scored against every query, exactly. A *run* is {query id: {document id: score}}, as deep as
--top_k; *qrels* are {query id: {document id: grade}}. The measures are trec_eval's: they rank by
float32 score, equal scores by document id in descending order. Only queries that have no relevant
document, which have 0 there, are left out.

Shapes:   Q queries   P passages (documents)   D hidden_size   k results of a query
"""

import hashlib
import json
import math
import re
import sys
import tempfile
import time
import unicodedata
from argparse import Namespace
from array import array
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist

from data import (
    PREFIX,
    UNSPACED,
    barrier,
    command,
    flags_given,
    gathered,
    must_be_new,
    must_exist,
    read_collections,
    read_documents,
    say,
    setup,
    split_passages,
    write_json,
    write_safetensors,
)
from model import merge_lora, save_model
from revela import Retriever, save_pooling

# --------------------------------------------------------------------------------------------------
# measures


def ranking(run):
    """{qid: document ids, best first}: by float32 score, ties by document id, both descending."""
    ranked = {}
    for qid, docs in run.items():
        scores = np.array(list(docs.values()), np.float32).tolist()
        ranked[qid] = [docid for _, docid in sorted(zip(scores, docs), reverse=True)]
    return ranked


def judged(run, qrels):
    """Yield (qid, found, best) of each query that has a relevant document.

    found   grades of its results, best first; 0 for what is not relevant
    best    grades of all its relevant documents, the highest first
    """
    for qid, docids in ranking(run).items():
        grades = {docid: grade for docid, grade in qrels.get(qid, {}).items() if grade > 0}
        if grades:
            found = [grades.get(docid, 0) for docid in docids]
            yield qid, found, sorted(grades.values(), reverse=True)


def ndcg(run, qrels, k=10):
    """{qid: nDCG@k}: the sum over ranks r = 1..k of grade / log2(r + 1), over the best sum."""

    def dcg(grades):
        return sum(grade / math.log2(r + 1) for r, grade in enumerate(grades[:k], 1))

    return {qid: dcg(found) / dcg(best) for qid, found, best in judged(run, qrels)}


def mrr(run, qrels, k=10):
    """{qid: 1 / rank of the first relevant document}, 0 if it is not among the first k."""
    values = {}
    for qid, found, _ in judged(run, qrels):
        inverse = (1 / r for r, grade in enumerate(found[:k], 1) if grade)
        values[qid] = next(inverse, 0.0)
    return values


def recall(run, qrels, k=100):
    """{qid: share of the relevant documents that are among the first k}."""
    return {qid: sum(map(bool, found[:k])) / len(best) for qid, found, best in judged(run, qrels)}


MEASURES = {"ndcg@10": ndcg, "mrr@10": mrr, "recall@100": recall}


def measure(run, qrels):
    """The means of MEASURES over queries; each query's under "per_query"."""
    means, rows = {}, {}
    for name, function in MEASURES.items():
        values = function(run, qrels)
        means[name] = sum(values.values()) / len(values)
        for qid, value in values.items():
            rows.setdefault(qid, {})[name] = value
    return means | {"per_query": rows}


def show(run, collection):
    """Print the first three queries with their first three results; a star marks relevant ones."""
    corpus, queries, qrels = collection
    for qid, docids in list(ranking(run).items())[:3]:
        print(f"  query: {queries[qid]}")
        for docid in docids[:3]:
            star = "*" if qrels[qid].get(docid, 0) > 0 else " "
            print(f"    {star} {run[qid][docid]:.3f}  {corpus[docid]}")


# --------------------------------------------------------------------------------------------------
# dense search


def search(queries, passages, k, chunk=65536):
    """The k largest inner products of each query, exactly: scores and indices [Q, k], best first.

    queries [Q, D], passages [P, D] float32. Passages are taken `chunk` at a time and merged into
    the best k so far, so that Q * P scores never exist at once. If P < k, k is P.
    """
    scores = torch.empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(passages), chunk):
        part = queries @ passages[start : start + chunk].T  # [Q, chunk]
        part, numbers = part.topk(min(k, part.shape[1]))  # [Q, k]
        scores, indices = merge([(scores, indices), (part, start + numbers)], k)
    return scores, indices


def merge(parts, k):
    """The k largest (or all) of several (scores, indices), both [Q, n]: two tensors [Q, k]."""
    scores, indices = (torch.cat(part, 1) for part in zip(*parts))
    scores, columns = scores.topk(min(k, scores.shape[1]))
    return scores, indices.gather(1, columns)


def without_itself(collection, qid, pairs, k):
    """{docid: score} of the first k of `pairs`, without the document that is the query itself.

    As in BEIR, it has the query's id. But queries and documents are often both numbered from 1. So
    it must also have the query's text, perhaps after a shorter title, and not be judged relevant.
    """
    corpus, queries, qrels = collection
    query, text = queries[qid], corpus.get(qid, "")
    ends = f" {text}".endswith(f" {query}")  # it is the query, perhaps after a title
    same = ends and len(text) < 2 * len(query)  # and the title is the shorter part
    found = dict(pairs)
    if same and qrels[qid].get(qid, 0) <= 0:
        found.pop(qid, None)
    return dict(list(found.items())[:k])


def dense_run(retriever, collection, k=1000, out=None, **options):
    """The run of a Retriever on (corpus, queries, qrels). `out`: see `revela.encode_texts`.

    Under `torchrun` every process must call this, and gets the whole run: each encodes and searches
    its part of the documents (and writes it to `out` with ".RANK-of-WORLD" before the suffix).
    """
    corpus, queries, _ = collection
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    docids, P = list(corpus), len(corpus)
    start, end = P * rank // world_size, P * (rank + 1) // world_size
    part = out
    if out and world_size > 1:
        part = Path(out).with_suffix(f".{rank}-of-{world_size}.npy")
    texts = list(corpus.values())[start:end]
    passages = retriever.encode(texts, "passage", out=part, **options)  # [P / world_size, D]
    asked = retriever.encode(list(queries.values()), "query", **options)  # [Q, D]
    scores, indices = search(asked, passages, k + 1)  # one more: one may be the query itself
    if world_size > 1:
        scores, indices = merge(gathered((scores, indices + start)), k + 1)
    run = {}
    for qid, row, found in zip(queries, scores.tolist(), indices.tolist()):
        pairs = zip([docids[i] for i in found], row)
        run[qid] = without_itself(collection, qid, pairs, k)
    return run


# --------------------------------------------------------------------------------------------------
# BM25, and both together


# Lucene's stop words of English, and the endings that a light stemmer cuts.
STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the
their then there these they this to was will with""".split()
ENDING = re.compile(r"(?<=\w{3})(?:ations?|ions?|ings?|ed|ly|ies|es|s|e|y)$")

# Python's \w lacks the marks on letters: combining accents; Hebrew, Arabic and Indic vowels.
COMBINING = "".join(chr(i) for i in range(0x11A00) if unicodedata.category(chr(i))[0] == "M")
BM25_WORD = re.compile(rf"[{UNSPACED}]|(?:[^\W{UNSPACED}]+[{COMBINING}]*)+")


class BM25:
    """Lucene's BM25 over texts cut into lower-case words.

    english       leave out stop words, and cut endings
    identifiers   cut names of code into words: snake_case, camelCase

    score(q, d) = sum over the words t of q:  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))        of N documents
    """

    def __init__(self, texts, english=False, identifiers=False, k1=0.9, b=0.4):
        self.english, self.identifiers = english, identifiers
        lengths = []  # words of each document
        postings = {}  # {word: [document, tf, document, tf, ...]}
        for doc, text in enumerate(texts):
            words = self.words(text)
            lengths.append(len(words))
            for word, tf in Counter(words).items():
                postings.setdefault(word, array("i")).extend((doc, tf))
        self.n, self.impacts = len(lengths), {}
        lengths = np.array(lengths)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))  # [N]
        for word, pairs in postings.items():
            docs, tf = np.array(pairs).reshape(-1, 2).T  # each [df]
            idf = np.log(1 + (self.n - len(docs) + 0.5) / (len(docs) + 0.5))
            impact = idf * tf / (tf + norm[docs])
            self.impacts[word] = docs, impact.astype(np.float32)

    def words(self, text):
        """The words of `text`, without punctuation. Characters of unspaced scripts are words."""
        if self.identifiers:
            text = re.sub("_|(?<=[a-z])(?=[A-Z])", " ", text)
        words = BM25_WORD.findall(unicodedata.normalize("NFC", text.lower()))
        if self.english:
            words = [ENDING.sub("", word) for word in words if word not in STOP_WORDS]
        return words

    def scores(self, query):
        """The score of every document, float32 [N]; 0 where no word of the query occurs."""
        scores = np.zeros(self.n, np.float32)
        for word, count in Counter(self.words(query)).items():
            if word in self.impacts:
                docs, impact = self.impacts[word]
                scores[docs] += count * impact
        return scores


def bm25_run(collection, index, k=1000):
    """The run of BM25 by the corpus's `index`. A document needs a word of the query to be in it."""
    corpus, queries, _ = collection
    docids, run = list(corpus), {}
    for qid, text in queries.items():
        scores = index.scores(text)
        best = np.argsort(-scores, kind="stable")[: k + 1].tolist()
        pairs = [(docids[i], scores[i].item()) for i in best if scores[i] > 0]
        run[qid] = without_itself(collection, qid, pairs, k)
    return run


def fuse(*runs):
    """The sum of runs. In each a query's lowest score first becomes 0, its highest 1.

    A document that a run lacks has 0 there. If all scores of a query are equal, they become 1.
    """
    fused = {}
    for run in runs:
        for qid, docs in run.items():
            low = min(docs.values(), default=0)
            high = max(docs.values(), default=0)
            total = fused.setdefault(qid, Counter())
            for docid, score in docs.items():
                total[docid] += (score - low) / (high - low) if high > low else 1.0
    return fused


# --------------------------------------------------------------------------------------------------
# questions at a prompt


def read_passages(path):
    """[(source, passage)] of a folder of text files, one such file, or a file of JSON lines.

    Raises ValueError if there is no text.
    """
    path, texts = Path(path), []
    if re.search(r"\.jsonl(\.gz)?$", path.name):
        for number, doc in read_documents(path):
            text = f"{doc.get('title') or ''} {doc['text']}"
            texts.append((str(doc.get("_id", number)), text))
    elif path.is_dir():
        files = files_under(path, set())
        texts = [(str(file.relative_to(path)), read_text(file)) for file in files]
    else:
        texts = [(path.name, read_text(must_exist(path)))]
    passages = [(source, passage) for source, text in texts for passage in split_passages(text)]
    if not passages:
        raise ValueError(f"{path} holds no text")
    return passages


def read_text(file):
    """The text of a file in UTF-8; "" if it is no text."""
    raw = file.read_bytes()
    if b"\0" in raw:
        say(f"{file} is no text, and left out")
        return ""
    return raw.decode("utf-8-sig", "replace")


def files_under(folder, seen):
    """Yield the files of a folder in order, then those of the folders in it; no hidden ones.

    Links are followed, but no folder is entered twice: `seen` holds those that were.
    """
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in seen:
            yield from files_under(path, seen)


def interactive(args, retriever, progress=False, **encode):
    """Answer questions from stdin with the five best passages, until an empty line.

    With --vectors the passages' vectors are kept for the next run. Their file's name is a hash of
    the passages, of --max_len, and of the vector of a fixed text, which tells models apart.
    """
    sources, passages = zip(*read_passages(args.interactive))
    corpus = dict(enumerate(passages))
    if args.bm25:
        index = BM25(passages, args.english, args.identifiers)
    if retriever:
        probe = retriever.encode(["a text"], **encode).tolist()
        made_from = json.dumps([probe, encode["max_len"], passages]).encode()
        name = hashlib.sha256(made_from).hexdigest()[:16]
        file = Path(args.vectors, f"{name}.npy") if args.vectors else None
        if file and file.exists():
            vectors = torch.from_numpy(np.load(file, mmap_mode="c"))  # torch warns of "r"
        else:
            vectors = retriever.encode(passages, out=file, progress=progress, **encode)  # [P, D]
    for stream in (sys.stdin, sys.stdout):  # a terminal may lack a character, or send half of one
        stream.reconfigure(errors="replace")
    print(f"{len(passages):,} passages of {len(set(sources)):,} texts; an empty line ends")
    qid = "question"
    with suppress(EOFError, KeyboardInterrupt):
        while question := input("\n> ").strip():
            runs = []
            if args.bm25:
                collection = corpus, {qid: question}, {qid: {}}  # one query, nothing judged
                runs.append(bm25_run(collection, index))
            if retriever:
                query = retriever.encode([question], "query", **encode)  # [1, D]
                scores, best = search(query, vectors, 1000)  # both [1, k]
                runs.append({qid: dict(zip(best[0].tolist(), scores[0].tolist()))})
            run = fuse(*runs) if len(runs) > 1 else runs[0]  # one alone keeps its scores
            for i in ranking(run)[qid][:5]:
                passage = " ".join(passages[i].split())
                short = passage if len(passage) <= 200 else passage[:197] + "..."
                print(f"{run[qid][i]:7.3f}  {sources[i]}\n         {short}")
            if not run[qid]:
                print("nothing found")


# --------------------------------------------------------------------------------------------------
# to others: sentence-transformers, mteb


def export(retriever, folder, max_len=512):
    """Write a Hugging Face checkpoint that `SentenceTransformer(folder)` encodes with as we do.

    With EOS pooling the tokenizer appends the EOS. With mean pooling nothing is appended, and a
    Dense layer standardises. Merges LoRA into the retriever's weights, if there is any.
    """
    folder, ours = Path(folder), retriever.tokenizer
    if ours is None:
        raise ValueError(f"{retriever.llama.path} has no tokenizer.json, which --export needs")
    ids = [*ours.bos_ids, ours.eos_id]
    tokens = [ours.tokenizer.id_to_token(i) for i in ids]
    if None in tokens:
        raise ValueError(f"{ours.file} has no token {ours.eos_id}, the EOS, which --export needs")
    *start, eos = tokens
    merge_lora(retriever.llama)
    save_pooling(retriever, folder)  # first: without it a killed export would pool by the EOS
    save_model(retriever.llama, folder)
    tokenizer = tokenizers.Tokenizer.from_str(ours.tokenizer.to_str())  # a copy
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*start, "$A"] if retriever.pooling == "mean" else [*start, "$A", eos],
        special_tokens=list(zip(tokens, ids)),
    )
    tokenizer.save(f"{folder}/tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "eos_token": eos,
        "pad_token": eos,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_modules(retriever, folder, max_len)


def write_modules(retriever, folder, max_len):
    """Say in `folder` how sentence-transformers makes vectors, one module after the other.

    With mean pooling it reads no EOS: its max_seq_length is ours - 1.
    """
    mean, size = retriever.pooling == "mean", retriever.llama.config.hidden_size
    prompts = PREFIX | {"document": PREFIX["passage"]}
    config = {"prompts": prompts, "default_prompt_name": "document", "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", config)
    length = max_len - 1 if mean else max_len
    lengths = {"max_seq_length": length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", lengths)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    if not mean:
        kinds.remove("Dense")
    modules = []
    for i, kind in enumerate(kinds):
        path = f"{i}_{kind}" if i else ""
        (folder / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": kind})
    write_json(folder / "modules.json", modules)
    pooling = {
        "word_embedding_dimension": size,
        "pooling_mode_lasttoken": not mean,
        "pooling_mode_mean_tokens": mean,
    }
    write_json(folder / "1_Pooling/config.json", pooling)
    if mean:
        dense = {"in_features": size, "out_features": size, "bias": True}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"
        write_json(folder / "2_Dense/config.json", dense)
        center, scale = retriever.mean.cpu(), 1 / retriever.std.cpu()
        # (x - center) * scale
        layer = {"linear.weight": scale.diag(), "linear.bias": -center * scale}
        write_safetensors(folder / "2_Dense/model.safetensors", layer)


def mteb_results(retriever, tasks, max_len):
    """Let mteb, which fetches the tasks' data, evaluate an export. Yields what `evaluate` does."""
    import mteb
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as folder:
        export(retriever, folder, max_len)
        tasks = mteb.get_tasks(tasks=tasks)
        done = mteb.evaluate(SentenceTransformer(folder), tasks, cache=None)
    for task in done.task_results:
        scores = next(iter(task.scores.values()))[0]  # of its one split, the first subset
        result = {"data": task.task_name, "system": "dense", "per_query": {}}
        result |= {name: scores[name.replace("@", "_at_")] for name in MEASURES}
        print(ROW.format(**result, queries="", documents="", s=0))
        yield result


# --------------------------------------------------------------------------------------------------

FLAGS = {
    "data": ([], "folders in BEIR layout"),
    "split": ("test", "which qrels/SPLIT.tsv"),
    "model": (None, "base model: a folder, or a hub id org/name[@revision]"),
    "adapter": (None, "LoRA adapter of the retriever: a PEFT folder"),
    "bm25": (False, "evaluate BM25; with --model too, the sum of both as well"),
    "english": (False, "BM25 leaves out English stop words, and endings: the stronger baseline"),
    "identifiers": (False, "BM25 cuts snake_case and camelCase into words: stronger on code"),
    "mteb": ([], "tasks for mteb to evaluate, which must be installed"),
    "export": (None, "folder to write for transformers and sentence-transformers"),
    "interactive": (
        None,
        'texts to ask at a prompt: a folder, a file, or JSON lines {"text": ...}',
    ),
    "out": (None, "JSON file of results to write; must not exist"),
    "vectors": (
        None,
        "folder for passages' vectors, memory-mapped; --interactive finds them there again",
    ),
    "max_len": (512, "tokens of a text that are read, EOS included", 2),
    "top_k": (1000, "documents retrieved for each query", 100),
    "batch_tokens": (0, "tokens in a batch when encoding; 0: 4096 on a CPU, else 16384"),
    "dtype": (("float32", "bfloat16"), "precision of weights and arithmetic"),
    "device": (None, "cuda, mps or cpu; without: the first that is there"),
}


def parse_args(argv=None):
    """The arguments, checked as far as it goes without reading anything.

    Makes the folders that --out and --export will be in.
    """
    defaults, given = flags_given("Evaluate a retriever, or BM25, on collections.", FLAGS, argv)
    args = Namespace(**defaults | given)
    to_others = args.mteb or args.export  # these need a model, the rest a model or BM25
    enough = args.model or (args.bm25 and not to_others)
    if not enough or not (args.data or args.interactive or to_others):
        raise ValueError(
            "nothing to do: give --data or --interactive with --model, --bm25 or both; "
            "or --model with --mteb or --export"
        )
    if args.adapter and not args.model:
        raise ValueError("--adapter needs the --model it belongs to")
    if args.mteb and not find_spec("mteb"):
        raise ValueError("--mteb needs the package mteb: pip install 'mteb>=2'")
    must_be_new(args.out)
    must_be_new(args.export)
    return args


def systems(args, retriever, options, collection, out):
    """Yield (system, run) of what is asked for: dense, bm25, fused."""
    if retriever:
        dense = dense_run(retriever, collection, args.top_k, out, **options)
        yield "dense", dense
    if args.bm25:
        index = BM25(collection[0].values(), args.english, args.identifiers)
        bm25 = bm25_run(collection, index, args.top_k)
        yield "bm25", bm25
    if retriever and args.bm25:
        yield "fused", fuse(dense, bm25)


HEAD = "data             system   nDCG@10   MRR@10    R@100  queries  documents      s"
ROW = """{data:<16} {system:<7} {ndcg@10:8.4f} {mrr@10:8.4f} {recall@100:8.4f} \
{queries:>8} {documents:>10} {s:6.1f}"""


def evaluate(args, retriever, options):
    """Yield the results of every collection and system, and print them."""
    collections = read_collections(args.data, args.split)
    files = dict.fromkeys(collections)  # None: vectors are not kept
    if args.vectors:
        for name in collections:
            file = f"{name.replace('/', '_')}.npy"
            files[name] = must_be_new(Path(args.vectors, file))
    if collections or args.mteb:
        say(HEAD)
    for name, collection in collections.items():
        corpus, queries, qrels = collection
        began = time.time()
        for system, run in systems(args, retriever, options, collection, files[name]):
            result = {"data": name, "system": system} | measure(run, qrels)
            size = {"queries": len(queries), "documents": len(corpus), "s": time.time() - began}
            say(ROW.format(**result | size))
            yield result
            began = time.time()
    if args.mteb:
        yield from mteb_results(retriever, args.mteb, args.max_len)


def main(argv=None):
    args = parse_args(argv)
    device, rank, _ = setup(args.device)
    if rank > 0:  # helps with the dense runs of --data, and leaves the rest to the first process
        for name in ("bm25", "mteb", "export", "out", "interactive"):
            setattr(args, name, None)
    retriever, options = None, {}
    if args.model:
        dtype = getattr(torch, args.dtype)
        retriever = Retriever.from_pretrained(args.model, args.adapter, dtype, device)
        merge_lora(retriever.llama)
        options = {
            "max_len": args.max_len,
            "batch_tokens": args.batch_tokens,
            "progress": sys.stderr.isatty() and rank == 0,
        }
    results = []
    for result in evaluate(args, retriever, options):
        results.append(result)
        if args.out:  # as they come: a later failure loses nothing
            write_json(args.out, {"config": vars(args), "results": results})
    if args.export:
        export(retriever, args.export, args.max_len)
        print(f"{args.export}: a checkpoint for transformers and sentence-transformers")
    if args.interactive:
        interactive(args, retriever, **options)
    barrier()


if __name__ == "__main__":
    command(main)
