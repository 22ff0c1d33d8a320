"""Evaluation: how well does a retriever find the relevant documents of a test collection?

    python eval.py --model BASE [--adapter runs/smol/retriever] --data scifact nfcorpus --out results.json
    python eval.py --bm25 --data scifact                  # the lexical baseline; with --model too: dense, bm25 and fused
    python eval.py --model BASE --adapter runs/smol/retriever --export FOLDER    # for transformers, sentence-transformers
    python eval.py --model BASE --adapter runs/smol/retriever --mteb SciFact     # by mteb (pip install mteb)
    python eval.py --model BASE --adapter runs/smol/retriever --interactive NOTES    # ask your own texts
    python eval.py --plot curves.svg runs/smol            # draw the training (pip install matplotlib)
    torchrun --nproc_per_node=8 eval.py --model BASE ...  # each process encodes and searches its part of the documents

A collection is a folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv. Every document is scored against
every query, exactly. A *run* is {query id: {document id: score}}, as deep as --top_k; *qrels* are {query id: {document
id: grade}}. The measures are trec_eval's: they rank by float32 score, equal scores by document id in descending order,
and leave out queries that have no relevant document.

Shapes:   Q queries   P passages (documents)   D hidden_size   k results of a query
"""

import argparse
import hashlib
import json
import math
import os
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import BM25, PREFIX, Help, read_beir, read_lines, read_passages
from model import find, merge_lora, read_json, save_model, tune_allocator
from revela import Retriever


def setup(device=None):
    """Join the process group if `torchrun` started us. Returns (device, rank, world size)."""
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if "RANK" not in os.environ:
        return torch.device(device), 0, 1
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def leave(code=0):
    """End this process without Python's shutdown, in which one of gloo's threads may wake and abort it."""
    sys.stdout.flush()
    os._exit(code)


# ----------------------------------------------------------------------------------------------------------------------
# measures


def ranking(run):
    """{qid: document ids, best first}: by float32 score, ties by document id, both descending, as trec_eval does."""
    return {qid: [docid for _, docid in sorted(((np.float32(s).item(), d) for d, s in docs.items()), reverse=True)]
            for qid, docs in run.items()}  # fmt: skip


def relevant(run, qrels):
    """The queries of `run` that have a relevant document in `qrels`, each with its ranking and its positive grades."""
    for qid, docids in ranking(run).items():
        grades = {docid: grade for docid, grade in qrels.get(qid, {}).items() if grade > 0}
        if grades:
            yield qid, docids, grades


def ndcg(run, qrels, k=10):
    """{qid: nDCG@k}: sum over ranks r = 1..k of grade / log2(r + 1), over the same sum for the best possible ranking."""
    dcg = lambda grades: sum(grade / math.log2(r + 1) for r, grade in enumerate(grades[:k], 1))
    return {
        qid: dcg([grades.get(docid, 0) for docid in docids]) / dcg(sorted(grades.values(), reverse=True))
        for qid, docids, grades in relevant(run, qrels)
    }


def mrr(run, qrels, k=10):
    """{qid: 1 / rank of the first relevant document}, 0 if it is not among the first k."""
    return {
        qid: next((1 / r for r, docid in enumerate(docids[:k], 1) if docid in grades), 0.0)
        for qid, docids, grades in relevant(run, qrels)
    }


def recall(run, qrels, k=100):
    """{qid: share of the relevant documents that are among the first k}."""
    return {
        qid: sum(docid in grades for docid in docids[:k]) / len(grades) for qid, docids, grades in relevant(run, qrels)
    }


def measure(run, qrels):
    """All three: the means over queries under "ndcg@10", "mrr@10" and "recall@100", each query's under "per_query"."""
    values = {"ndcg@10": ndcg(run, qrels, 10), "mrr@10": mrr(run, qrels, 10), "recall@100": recall(run, qrels, 100)}
    means = {name: sum(v.values()) / len(v) for name, v in values.items()}
    return means | {"per_query": {qid: {name: v[qid] for name, v in values.items()} for qid in values["ndcg@10"]}}


# ----------------------------------------------------------------------------------------------------------------------
# runs


def search(queries, passages, k, chunk=65536):
    """The k largest inner products of each query, exactly: (scores [Q, k], indices [Q, k]), best first.

    queries [Q, D], passages [P, D] float32. Passages are taken `chunk` at a time and merged into the best k so far, so
    that Q * P scores never exist at once. With fewer than k passages, k is their number.
    """
    scores, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(passages), chunk):
        new = queries @ passages[start : start + chunk].T  # [Q, chunk]
        scores = torch.cat([scores, new], 1)
        indices = torch.cat([indices, torch.arange(start, start + new.shape[1]).expand(len(queries), -1)], 1)
        scores, best = scores.topk(min(k, scores.shape[1]))
        indices = indices.gather(1, best)
    return scores, indices


def dense_run(retriever, corpus, queries, k=1000, out=None, **encode):
    """The run of a Retriever. As in BEIR, a document that has the query's own id is not a result. `out`: see `encode`.

    Under `torchrun` every process must call this, and gets the whole run: each encodes and searches its part of the
    documents (and writes it to `out` with ".RANK-of-WORLD" before the suffix), then the best of all are merged.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    docids, P, run = list(corpus), len(corpus), {}
    first, last = P * rank // world, P * (rank + 1) // world
    if out is not None and world > 1:
        out = Path(out).with_suffix(f".{rank}-of-{world}.npy")
    passages = retriever.encode([corpus[docid] for docid in docids[first:last]], "passage", out=out, **encode)  # [P, D]
    vectors = retriever.encode(list(queries.values()), "query", **encode)  # [Q, D]
    scores, indices = search(vectors, passages, k + 1)
    if world > 1:
        width = min(k + 1, -(-P // world)) - scores.shape[1]  # parts differ by a passage; all must give as many results
        mine = (F.pad(scores, (0, width), value=-torch.inf), F.pad(indices + first, (0, width)))
        device = retriever.llama.embed_tokens.weight.device
        parts = [[torch.empty_like(t, device=device) for _ in range(world)] for t in mine]
        for part, t in zip(parts, mine):
            dist.all_gather(part, t.to(device))
        scores, indices = (torch.cat(part, 1).cpu() for part in parts)
        scores, best = scores.topk(min(k + 1, P))
        indices = indices.gather(1, best)
    for qid, row, best in zip(queries, scores.tolist(), indices.tolist()):
        results = [(docids[i], score) for i, score in zip(best, row) if docids[i] != qid]
        run[qid] = dict(results[:k])
    return run


def bm25_run(corpus, queries, k=1000, index=None):
    """The run of BM25 (`index`). Documents that share no word with the query are not results, nor is one with the query's id."""
    docids, index, run = list(corpus), index or BM25(corpus.values()), {}
    for qid, text in queries.items():
        scores = index.scores(text)
        best = np.argsort(-scores, kind="stable")[: k + 1].tolist()
        run[qid] = dict([(docids[i], scores[i].item()) for i in best if scores[i] > 0 and docids[i] != qid][:k])
    return run


def fuse(*runs):
    """The sum of runs, each query's scores first brought to [0, 1] (smallest to largest of its list; 0 if not in it)."""
    fused = {}
    for run in runs:
        for qid, docs in run.items():
            low, high = min(docs.values(), default=0), max(docs.values(), default=0)
            total = fused.setdefault(qid, {})
            for docid, score in docs.items():
                total[docid] = total.get(docid, 0) + (score - low) / ((high - low) or 1)
    return fused


def show(run, collection, n=3, depth=3):
    """Print the first `n` queries with their first `depth` results; a star marks the relevant ones."""
    corpus, queries, qrels = collection
    for qid, docids in list(ranking(run).items())[:n]:
        print(f"  query: {queries[qid]}")
        for docid in docids[:depth]:
            print(f"    {'*' if qrels[qid].get(docid, 0) > 0 else ' '} {run[qid][docid]:.3f}  {corpus[docid]}")


# ----------------------------------------------------------------------------------------------------------------------
# questions at a prompt


def interactive(path, retriever, bm25, folder=None, progress=False, **encode):
    """Answer questions from stdin with the five best passages of `path`, by `retriever`, BM25 or both, until an empty line. The
    vectors' name in `folder` has a hash of the passages and of what the model makes of a text, by which they are found again."""
    sources, passages = zip(*read_passages(path))
    corpus, index, vectors = dict(enumerate(passages)), BM25(passages) if bm25 else None, None
    if retriever:
        made_from = json.dumps([retriever.encode(["a text"], **encode).tolist(), encode["max_len"], passages])
        name = f"{Path(path).resolve().name}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.npy"
        if folder and Path(folder, name).exists():
            vectors = torch.from_numpy(np.load(Path(folder, name), mmap_mode="c"))
        else:
            vectors = retriever.encode(passages, "passage", out=folder and Path(folder, name), progress=progress, **encode)  # [P, D]
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    print(f"{len(passages):,} passages of {len(set(sources)):,} texts; an empty line ends")
    with suppress(EOFError, KeyboardInterrupt):
        while question := input("\n> ").strip():
            runs = [bm25_run(corpus, {"": question}, index=index)] if bm25 else []
            if retriever:
                scores, best = search(retriever.encode([question], "query", **encode), vectors, 1000)
                runs.append({"": dict(zip(best[0].tolist(), scores[0].tolist()))})
            run = fuse(*runs) if len(runs) > 1 else runs[0]
            for i in ranking(run)[""][:5]:
                print(f"{run[''][i]:7.3f}  {sources[i]}\n         {textwrap.shorten(passages[i], 200)}")
            if not run[""]:
                print("nothing found")


# ----------------------------------------------------------------------------------------------------------------------
# to others: how a folder's texts are to be encoded, sentence-transformers, mteb


def write_encoding(folder, max_len=512):
    """Say in `folder` how texts become vectors, in sentence-transformers' words: prefixes, length, similarity."""
    prompts = {"prompts": PREFIX, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (Path(folder) / "config_sentence_transformers.json").write_text(json.dumps(prompts, indent=1) + "\n")
    (Path(folder) / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_len, "do_lower_case": False}) + "\n")


def read_max_len(folder):
    """The length that `write_encoding` left in `folder`; 512, the published evaluation's, where it left none."""
    file = find(folder) / "sentence_bert_config.json"
    return (read_json(file) if file.exists() else {}).get("max_seq_length") or 512


def export(retriever, folder, max_len=512):
    """Write a plain Hugging Face checkpoint, LoRA merged into the weights, that `SentenceTransformer(folder)` encodes with
    as we do: `encode(texts, prompt_name="query")`. Its tokenizer appends the EOS itself. Ends the retriever's LoRA."""
    if retriever.tokenizer is None:
        raise ValueError(f"{retriever.llama.path} has no tokenizer.json, which --export needs")
    folder, ours = Path(folder), retriever.tokenizer
    if retriever.llama.lora:
        merge_lora(retriever.llama)
    save_model(retriever.llama, folder)
    tokenizer, eos = tokenizers.Tokenizer.from_str(ours.tokenizer.to_str()), ours.tokenizer.id_to_token(ours.eos_id)
    append = tokenizers.processors.TemplateProcessing(single=["$A", eos], pair=["$A", "$B", eos], special_tokens=[(eos, ours.eos_id)])
    before = [tokenizer.post_processor] if tokenizer.post_processor else []
    tokenizer.post_processor = tokenizers.processors.Sequence([*before, append])
    tokenizer.save(str(folder / "tokenizer.json"))
    pooling = {"word_embedding_dimension": retriever.llama.config.hidden_size, "pooling_mode_lasttoken": True,
               "pooling_mode_mean_tokens": False, "include_prompt": True}  # fmt: skip
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    for name, content in {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos,
                                  "padding_side": "right", "model_max_length": max_len, "clean_up_tokenization_spaces": False},
        "modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                         for i, (kind, path) in enumerate(steps)],
        "1_Pooling/config.json": pooling,
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    write_encoding(folder, max_len)


class MtebEncoder:
    """A Retriever as mteb 2.x calls it (its EncoderProtocol)."""

    def __init__(self, retriever, name, **options):
        self.retriever, self.name, self.options = retriever, name, options

    def encode(self, inputs, *, prompt_type=None, **_):
        """inputs: batches {"text": [...]} -> float32 array [N, D]. What is not called a query is a passage."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.retriever.encode(texts, "query" if prompt_type == "query" else "passage", **self.options).numpy()

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)

    @property
    def mteb_model_meta(self):
        from mteb.models import ModelMeta

        return ModelMeta.create_empty({"name": f"revela/{self.name}", "revision": "local", "similarity_fn_name": "cosine"})


def mteb_results(encoder, tasks):
    """Evaluate by mteb, which fetches the tasks' data: a list of results as `main` makes them, without per-query values."""
    try:
        import mteb
    except ImportError:
        raise ValueError("--mteb needs the package mteb: pip install 'mteb>=2'") from None
    results = []
    for task in mteb.evaluate(encoder, mteb.get_tasks(tasks=tasks), cache=None).task_results:
        scores = next(iter(task.scores.values()))[0]  # of the task's one split
        names = {"ndcg@10": "ndcg_at_10", "mrr@10": "mrr_at_10", "recall@100": "recall_at_100"}
        results.append({"data": task.task_name, "system": "dense"} | {k: scores[v] for k, v in names.items()} | {"per_query": {}})
    return results


def plot(file, runs, results):
    """Draw the updates of `runs`, run folders or their metrics.jsonl by any name, and lines at the nDCG@10 of `results`."""
    try:
        from matplotlib import figure, rcParams
    except ImportError:
        raise ValueError("--plot needs the package matplotlib: pip install matplotlib") from None
    rcParams.update({"font.size": 13, "svg.hashsalt": "0", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False})
    picture = figure.Figure(figsize=(6, 9), layout="tight")
    panels = picture.subplots(3, sharex=True)
    for n, run in enumerate(map(Path, runs)):
        rows = [row for _, row in read_lines(run / "metrics.jsonl" if run.is_dir() else run)]
        color = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")[n % 5]  # Okabe and Ito's, told apart by marks too
        for axes, name, label in zip(panels, ("ndcg@10", "loss", "max_weight"), ("nDCG@10", "loss", "mean largest weight")):
            x, y = [row["step"] for row in rows if name in row], [row[name] for row in rows if name in row]
            axes.plot(x, y, "os^Dv"[n % 5] + "-", color=color, markersize=4, label=run.resolve().name.removesuffix("-metrics.jsonl"))
            axes.set_ylabel(label)
    for r in results:
        panels[0].axhline(r["ndcg@10"], color="black", linewidth=1, linestyle=":", label=f"{r['system']} on {r['data']}")
    panels[0].legend(frameon=False)
    panels[2].set_xlabel("updates")
    picture.savefig(file, metadata={"Date": None} if file.endswith(".svg") else None)


# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Evaluate a retriever, or BM25, on test collections.", allow_abbrev=False,
        formatter_class=Help,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="folders in BEIR layout")
    add("--split", default="test", help="which qrels/SPLIT.tsv")
    add("--model", help="base model: a folder in Hugging Face layout, or a hub id org/name[@revision]")
    add("--adapter", help="LoRA adapter of the retriever: a PEFT folder")
    add("--bm25", action="store_true", help="evaluate BM25; with --model too, the sum of both as well")
    add("--mteb", nargs="+", default=[], metavar="TASK", help="tasks for mteb to evaluate, which must be installed")
    add("--export", metavar="FOLDER", help="write the model, adapter merged, for transformers and sentence-transformers")
    add("--interactive", metavar="NOTES", help='ask a folder of text files, or a JSON-lines file of {"text": ...}, at a prompt')
    add("--plot", nargs="+", default=[], metavar=("FILE", "RUN"), help="draw run folders into FILE (.svg, .png); results of --data as lines")
    add("--out", help="JSON file to write; must not exist")
    add("--vectors", metavar="FOLDER", help="keep passages' vectors in FOLDER/DATA.npy, a part of them in memory; --interactive finds its own again")
    add("--max_len", type=int, help="tokens of a text that are read, EOS included (default: as the adapter or model says, else 512)")
    add("--top_k", type=int, default=1000, help="documents retrieved for each query")
    add("--batch_tokens", type=int, help="tokens in a batch when encoding (default: 4096 on a CPU, else 16384)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of weights and arithmetic")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    args = parser.parse_args(argv)
    if not ((args.data or args.interactive) and (args.model or args.bm25) or args.model and (args.mteb or args.export) or args.plot[1:]):
        raise ValueError("nothing to do: give --data or --interactive with --model, --bm25 or both; --model with --mteb or --export; or --plot")
    if args.adapter and not args.model:
        raise ValueError("--adapter needs the --model it belongs to")
    for path in (args.out, args.export, *args.plot[:1]):
        if path and Path(path).exists():
            raise ValueError(f"{path} exists already; remove it or choose another name")

    if args.vectors:
        Path(args.vectors).mkdir(parents=True, exist_ok=True)
    tune_allocator()
    device, rank, world = setup(args.device)
    say = print if rank == 0 else lambda *_: None
    if rank > 0:  # helps with the dense runs and leaves the rest to the first process
        args.bm25, args.mteb, args.export, args.out, args.plot, args.interactive = False, [], None, None, [], None
    retriever = None
    if args.model:
        retriever = Retriever.from_pretrained(args.model, args.adapter, getattr(torch, args.dtype), device)
        args.max_len = args.max_len or read_max_len(args.adapter or args.model)
    options = {"max_len": args.max_len, "batch_tokens": args.batch_tokens, "progress": sys.stderr.isatty() and rank == 0}
    results = []
    numbers = lambda result: " ".join(f"{result[name]:8.4f}" for name in ("ndcg@10", "mrr@10", "recall@100"))
    if args.data:
        say(f"{'data':<16} {'system':<7} {'nDCG@10':>8} {'MRR@10':>8} {'R@100':>8} {'queries':>8} {'documents':>10} {'s':>6}")
    for folder in args.data:
        corpus, queries, qrels = read_beir(folder, args.split)
        runs = {}
        for system in ("dense", "bm25", "fused"):
            began = time.time()
            if system == "dense" and retriever:
                vectors = Path(args.vectors, f"{Path(folder).resolve().name}.npy") if args.vectors else None
                runs[system] = dense_run(retriever, corpus, queries, args.top_k, vectors, **options)
            elif system == "bm25" and args.bm25:
                runs[system] = bm25_run(corpus, queries, args.top_k)
            elif system == "fused" and len(runs) == 2:
                runs[system] = fuse(runs["dense"], runs["bm25"])
            else:
                continue
            result = {"data": Path(folder).resolve().name, "system": system} | measure(runs[system], qrels)
            results.append(result)
            size = f"{len(queries):8} {len(corpus):10} {time.time() - began:6.1f}"
            say(f"{result['data']:<16} {system:<7} {numbers(result)} {size}")
    if args.mteb:
        encoder = MtebEncoder(retriever, Path(args.adapter or args.model).name, **options)
        for result in mteb_results(encoder, args.mteb):
            results.append(result)
            print(f"{result['data']:<16} {'dense':<7} {numbers(result)}")
    if args.export:
        export(retriever, args.export, args.max_len)
        print(f"{args.export}: a checkpoint for transformers and sentence-transformers")
    if args.out:
        Path(args.out).write_text(json.dumps({"config": vars(args), "results": results}, indent=1) + "\n")
    if args.plot:
        plot(args.plot[0], args.plot[1:], results)
    if args.interactive:
        interactive(args.interactive, retriever, args.bm25, args.vectors, **options)
    if world > 1:
        dist.barrier()  # a process that leaves while another still works would end the job for both


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    leave()
