"""Text in, tensors out: tokenizer, batches, the stream of groups; how groups are made of documents; test collections.

A *group* is what one in-batch attention sees: passages that belong together. It is one line of a JSON-lines file, a list
of texts or {"src": ..., "text": [...]} (the published corpora's format). Groups are made of raw documents by

    python data.py --docs docs.jsonl --out groups.jsonl                  # neighbours: consecutive passages of a document
    python data.py --docs docs.jsonl --out groups.jsonl --group bm25     # a passage and those nearest to it by BM25

where a document is {"text": ...} on a line of its own. Training and evaluation share this file's `Tokenizer`: the prefixes,
the EOS token and the truncation exist only here.

Shapes:   G groups   B passages of a group   T tokens
"""

import argparse
import gzip
import json
import os
import random
import re
import shutil
import sys
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch

from model import Llama, LlamaConfig, check, existing, find, parse, read_json, read_safetensors, reading, save_model

PREFIX = {"query": "query: ", "passage": "passage: "}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """The --help of all our commands: with the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, [], argparse.SUPPRESS) else super()._get_help_string(action)


# ----------------------------------------------------------------------------------------------------------------------
# tokens


class Tokenizer:
    """The tokenizer.json of a model folder, and the end-of-text token that goes with it."""

    def __init__(self, folder):
        """The EOS is tokenizer_config.json's eos_token, else config.json's eos_token_id; ValueError if there is none."""
        folder = find(folder)
        self.file, self.config = existing(folder / "tokenizer.json"), LlamaConfig.from_pretrained(folder)
        eos = read_json(folder / "tokenizer_config.json").get("eos_token") if (folder / "tokenizer_config.json").exists() else None
        eos = eos.get("content") if isinstance(eos, dict) else eos
        with reading(self.file, f"is not a tokenizer, or not one for eos_token {eos!r:.80}"):
            self.tokenizer = tokenizers.Tokenizer.from_file(str(self.file))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.eos_id = self.tokenizer.token_to_id(eos) if eos else self.config.eos_token_id
        if self.eos_id is None or not 0 <= self.eos_id < self.config.vocab_size:
            raise ValueError(f"{folder}: no EOS token: tokenizer_config.json needs an eos_token that is in the vocabulary")

    def lm_ids(self, texts, max_len):
        """Token ids of `texts` as the language model reads them: no prefix, no EOS; a BOS if the tokenizer adds one."""
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]  # half of a surrogate pair -> "?"
        with reading(self.file, "fails at a text"):
            rows = [encoding.ids[:max_len] for encoding in self.tokenizer.encode_batch_fast(texts)]
        if (most := max(map(max, filter(None, rows)), default=0)) >= self.config.vocab_size:
            raise ValueError(f"{self.file} makes token {most} of a text, but the model's vocab_size is {self.config.vocab_size}")
        return rows

    def retriever_ids(self, texts, kind, max_len, ratio=1.0):
        """Token ids of `texts` as the retriever reads them: prefix, text, EOS; at most `max_len` of them.

        `ratio` < 1 keeps only the first int(n * ratio) of the n tokens before the EOS (prefix counted).
        """
        rows = self.lm_ids([PREFIX[kind] + text for text in texts], max_len - 1)
        return [row[: int(len(row) * ratio)] + [self.eos_id] for row in rows]

    def second_half_ids(self, texts, max_len):
        """Token ids of what the queries of ratio 0.5 leave out of `texts`, as passages: prefix, second half, EOS."""
        query, passage = self.lm_ids([prefix.strip() for prefix in (PREFIX["query"], PREFIX["passage"])], max_len)
        rows = self.lm_ids([PREFIX["query"] + text for text in texts], max_len - 1)
        return [(passage + row[max(len(query), int(len(row) * 0.5)) :])[: max_len - 1] + [self.eos_id] for row in rows]


def pad(rows, value):
    """Lists of ids -> ids [N, T] int64 and mask [N, T] bool, padded on the right to the length of the longest, rounded up
    to a multiple of 8 (odd lengths are slow on GPUs and CPUs alike)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(-(-int(lengths.max()) // 8) * 8) < lengths[:, None]  # [N, T]
    ids = torch.full(mask.shape, value, dtype=torch.int64)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    return ids, mask


def collate(groups, tokenizer, lm_tokenizer, passage_max_len=157, first_half=False, second_half=False):
    """[(texts, src)] of G groups -> the batch: {query,passage,lm}_{ids,mask}, each [G, B, T].

    `first_half`: the query of a passage is its first half, so that predicting the second half is what retrieval pays
    for; groups with src "stackoverflow" keep the whole passage (as published: there a question comes with its answers).
    `second_half`: every query is a first half, and its passage is the second: the two have no token in common.
    """
    texts = [text for group, _ in groups for text in group]
    queries = []
    for group, src in groups:
        ratio = 0.5 if second_half or (first_half and src != "stackoverflow") else 1.0
        queries += tokenizer.retriever_ids(group, "query", passage_max_len, ratio)
    if second_half:
        passages = tokenizer.second_half_ids(texts, passage_max_len)
    else:
        passages = tokenizer.retriever_ids(texts, "passage", passage_max_len)
    rows = {
        "query": (queries, tokenizer.eos_id),
        "passage": (passages, tokenizer.eos_id),
        "lm": ([row or [lm_tokenizer.eos_id] for row in lm_tokenizer.lm_ids(texts, passage_max_len)], lm_tokenizer.eos_id),
    }
    batch = {}
    for name, (ids, eos) in rows.items():
        ids, mask = pad(ids, eos)  # [G*B, T]
        batch[name + "_ids"], batch[name + "_mask"] = ids.unflatten(0, (len(groups), -1)), mask.unflatten(0, (len(groups), -1))
    return batch


# ----------------------------------------------------------------------------------------------------------------------
# reading


def read_lines(file):
    """(line number, JSON value) of each non-empty line of a JSON-lines file, gzipped or not."""
    with reading(file, "cannot be read"), (gzip.open if str(file).endswith(".gz") else open)(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, parse(line, f"{file}:{number}")


def parse_group(line, where, size):
    """One line of a groups file -> (its first `size` texts, src or None)."""
    group = parse(line, where)
    texts, src = (group.get("text"), group.get("src")) if isinstance(group, dict) else (group, None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: need a list of texts, or {{"src": ..., "text": [...]}} with one')
    if len(texts) < max(size, 2):
        raise ValueError(f"{where}: a group of {len(texts)} passages; need {max(size, 2)} (--train_group_size)")
    if not all(text.strip() for text in texts[:size]):
        raise ValueError(f"{where}: passage {[bool(text.strip()) for text in texts].index(False) + 1} is empty")
    return texts[:size], src


def unpacked(file):
    """The plain file behind a gzipped one: {file}.unpacked, written once beside it (gzip cannot be read from the middle)."""
    plain, partial = Path(f"{file}.unpacked"), Path(f"{file}.unpacked.{os.getpid()}.partial")
    time = os.stat(file).st_mtime_ns
    if not plain.exists() or plain.stat().st_mtime_ns != time:  # it gets the time of what it was made from
        try:
            with reading(file, f"cannot be unpacked to {plain}"), gzip.open(file, "rb") as packed, open(partial, "wb") as out:
                shutil.copyfileobj(packed, out)
            os.utime(partial, ns=(time, time))
            os.replace(partial, plain)
        finally:
            partial.unlink(missing_ok=True)
    return plain


def group_offsets(file, size):
    """The byte at which each group of `file` starts, int64; every line is checked on the way, ValueError names file and line.

    They are kept in {file}.index.safetensors, with four numbers by which a later call knows that they still hold: the file's
    length, its time, `size`, and their own checksum. In a folder that cannot be written to they are just made again.
    """
    state, index, offsets, position = os.stat(file), f"{file}.index.safetensors", [], 0
    made_from = lambda offsets: [state.st_size, state.st_mtime_ns, size, zlib.crc32(offsets.numpy().tobytes())]
    try:
        kept = read_safetensors(index)
        if kept["offsets"].dtype == torch.int64 and kept["made_from"].tolist() == made_from(kept["offsets"]):
            return kept["offsets"].numpy()
    except (OSError, ValueError, KeyError):  # none there, or not one of ours
        pass
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                parse_group(line, f"{file}:{number}", size)
                offsets.append(position)
            position += len(line)
    if not offsets:
        raise ValueError(f"{file} holds no groups")
    offsets, partial = torch.tensor(offsets), Path(f"{file}.{os.getpid()}.partial")
    try:
        partial.write_bytes(safetensors.torch.save({"made_from": torch.tensor(made_from(offsets)), "offsets": offsets}))
        os.replace(partial, index)
    except OSError:
        partial.unlink(missing_ok=True)
    return offsets.numpy()


class Groups(torch.utils.data.Dataset):
    """The groups of a JSON-lines file, gzipped or not, read one at a time from their byte offsets: it need not fit in memory."""

    def __init__(self, file, size):
        """`size`: passages of a group that are used. Raises ValueError that names file and line of what is no group."""
        self.file, self.size = str(unpacked(file) if str(file).endswith(".gz") else file), size
        self.offsets = group_offsets(self.file, size)

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        with open(self.file, "rb") as lines:
            lines.seek(self.offsets[i])
            return parse_group(lines.readline(), f"{self.file}: byte {self.offsets[i]}", self.size)


def group_order(n, seed, first, last, rank=0, world=1, accumulation=1, groups=1):
    """Which of n groups this rank reads: a list of `groups` indices for each micro-batch of updates `first` to `last` - 1.

    Each epoch is a permutation that depends on (seed, epoch) alone, and update u takes the next world * accumulation *
    groups of it; so a resumed run goes on where it was, and the same update on more ranks reads the same groups.
    """
    epoch, order = -1, None
    for micro in range(first * accumulation, last * accumulation):
        start = (micro * world + rank) * groups
        indices = []
        for position in range(start, start + groups):
            if position // n != epoch:
                epoch = position // n
                order = np.random.default_rng([seed, epoch]).permutation(n)
            indices.append(int(order[position % n]))
        yield indices


def read_beir(folder, split="test"):
    """A test collection in BEIR layout: corpus {docid: title + text}, queries {qid: text}, qrels {qid: {docid: grade}}.

    Only queries with a relevant document are kept. Raises ValueError or FileNotFoundError that names file and line.
    """
    folder = Path(folder)
    texts = {}
    for name in ("corpus", "queries"):
        file = folder / f"{name}.jsonl"
        texts[name] = {}
        for number, row in read_lines(file):
            row = row if isinstance(row, dict) else {}
            key, title, text = row.get("_id"), row.get("title") or "", row.get("text")
            key = str(key) if type(key) is int else key  # some collections number their documents; in qrels all is text
            if not all(isinstance(value, str) for value in (key, title, text)):
                raise ValueError(f'{file}:{number}: need an object with texts "_id" and "text", and if it has one, "title"')
            if key in texts[name]:
                raise ValueError(f"{file}:{number}: id {key!r:.80} occurs twice")
            texts[name][key] = f"{title} {text}".strip()
        if not texts[name]:
            raise ValueError(f"{file} is empty")
    qrels, file = {}, folder / "qrels" / f"{split}.tsv"
    for number, line in enumerate(existing(file).read_bytes().splitlines(), 1):  # a str's would end lines at U+2028 too
        if not line.strip():
            continue
        try:
            qid, docid, grade = line.decode("utf-8-sig").split("\t")[:3]
            if number == 1 and grade.strip() == "score":
                continue
            grade = int(grade)
            check("score", grade, -(2**31), 2**31, int)
        except ValueError:
            raise ValueError(f"{file}:{number}: need query-id, corpus-id and a whole score, tab-separated") from None
        for what, key in (("queries", qid), ("corpus", docid)):
            if key not in texts[what]:
                raise ValueError(f"{file}:{number}: {key!r:.80} is not in {what}.jsonl")
        if qrels.setdefault(qid, {}).setdefault(docid, grade) != grade:
            raise ValueError(f"{file}:{number}: {docid!r:.80} has another score for {qid!r:.80} above")
    qrels = {qid: grades for qid, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        raise ValueError(f"{file} has no relevant document for any query")
    return texts["corpus"], {qid: texts["queries"][qid] for qid in qrels}, qrels


# ----------------------------------------------------------------------------------------------------------------------
# documents -> passages -> groups

# Where a text may be cut, from the best place to the last resort: after a sentence or paragraph, a line, a word.
CUTS = [re.compile(p) for p in (r"""(?<=[.!?])["')\]]*\s+(?![a-z])|\n\s*\n""", r"\n", r"\s+")]


def split_passages(text, max_words=120):
    """Cut `text` into passages of whole sentences, as many as fit into `max_words` words. Nothing is left out or changed
    but white space at the ends; a sentence that is too long is cut at line ends, and such a line between words.

    >>> split_passages("One two. Three four. Five.", 4)
    ['One two. Three four.', 'Five.']
    """

    def pieces(text, cuts):  # each at most max_words long
        start = 0
        for end in [match.end() for match in cuts[0].finditer(text)] + [len(text)]:
            piece, start = text[start:end], end
            if len(piece.split()) <= max_words:
                yield piece
            else:
                yield from pieces(piece, cuts[1:])

    passages, words = [""], 0
    for piece in pieces(text, CUTS):
        words += len(piece.split())
        if words > max_words:
            passages.append("")
            words = len(piece.split())
        passages[-1] += piece
    return [passage.strip() for passage in passages if passage.strip()]


def read_passages(path):
    """[(source, passage)] of a folder's UTF-8 text files, hidden ones left out, or of a JSON-lines file of {"text": ...}."""
    path, texts = Path(path), []
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                with suppress(UnicodeDecodeError):  # not a text
                    texts.append((str(name), file.read_text(encoding="utf-8-sig")))
    else:
        for number, row in read_lines(path):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path}:{number}: need an object with a text under "text"')
            texts.append((str(row.get("_id", number)), f"{row.get('title') or ''} {row['text']}"))
    passages = [(source, passage) for source, text in texts for passage in split_passages(text)]
    if not passages:
        raise ValueError(f"{path} holds no text")
    return passages


def group_by_document(documents, size, run_length, seed=0):
    """Groups of `size` passages from `documents` (lists of passages): runs of up to `run_length` consecutive passages of
    one document, filled up with shorter runs of others. Every passage is used once, but for those of a last, short group.
    """
    runs = [doc[i : i + run_length] for doc in documents for i in range(0, len(doc), run_length)]
    random.Random(seed).shuffle(runs)
    by_length = [[] for _ in range(run_length + 1)]
    for run in runs:
        by_length[len(run)].append(run)
    group = []
    while any(by_length):
        room = size - len(group)
        fitting = [n for n in range(1, run_length + 1) if by_length[n] and n <= room]
        run = by_length[fitting[-1]].pop() if fitting else next(runs for runs in by_length if runs).pop()
        if len(run) > room:  # none fits: cut one
            by_length[len(run) - room].append(run[room:])
        group += run[:room]
        if len(group) == size:
            yield group
            group = []


def group_by_bm25(documents, size, seed=0):
    """Groups of a passage and its `size` - 1 nearest by BM25; seeds are drawn until every passage is in some group."""
    passages = [passage for doc in documents for passage in doc]
    if len(passages) < size:
        return
    index, used = BM25(passages), np.zeros(len(passages), bool)
    for i in np.random.default_rng(seed).permutation(len(passages)):
        if not used[i]:
            scores = index.scores(passages[i])
            scores[i] = np.inf  # the passage itself comes first
            nearest = np.argpartition(-scores, size - 1)[:size]
            nearest = nearest[np.argsort(-scores[nearest], kind="stable")]
            used[nearest] = True
            yield [passages[j] for j in nearest]


class BM25:
    """Lucene's BM25 over texts cut into lower-case words; no stemming, no stop words.

    score(q, d) = sum over the words t of q:  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|)),
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))
    """

    def __init__(self, texts, k1=0.9, b=0.4):
        self.vocabulary, words, lengths = {}, [], []
        for text in texts:
            ids = [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in self.words(text)]
            lengths.append(len(ids))
            words.append(np.array(ids, dtype=np.int64))
        N, V, lengths = len(lengths), len(self.vocabulary), np.array(lengths, dtype=np.float64)
        docs = np.repeat(np.arange(N), lengths.astype(int))
        pairs, tf = np.unique(np.concatenate(words) * N + docs, return_counts=True)  # sorted by word, then document
        word, self.docs = pairs // N, pairs % N
        df = np.bincount(word, minlength=V)
        idf = np.log(1 + (N - df + 0.5) / (df + 0.5))
        self.starts = np.concatenate([[0], np.cumsum(df)])  # word t's postings are starts[t] : starts[t + 1]
        length = 1 - b + b * lengths[self.docs] / max(lengths.mean(), 1e-9)
        self.impact = (idf[word] * tf / (tf + k1 * length)).astype(np.float32)
        self.n = N

    @staticmethod
    def words(text):
        return re.findall(r"\w+", text.lower())

    def scores(self, query):
        """The score of every document, float32 [N]; 0 where no word of the query occurs."""
        scores = np.zeros(self.n, np.float32)
        for word, count in Counter(self.words(query)).items():
            if (t := self.vocabulary.get(word)) is not None:
                at = slice(self.starts[t], self.starts[t + 1])
                scores[self.docs[at]] += count * self.impact[at]
        return scores


# ----------------------------------------------------------------------------------------------------------------------
# the toy world: people who do not exist, each described several times in different words


def join_words(starts, ends):
    return [start + end for start in starts.split() for end in ends.split()]


FIRST = join_words("Al Bri Cor Dan El Fen", "a an is o ya")
LAST = join_words("Harg Kest Lorn Mund Pell Rost", "a en er ing ov")
FACTS = {
    "town": join_words("Ash Birch Cold Deer East Fair", "brook field ham port wick"),
    "job": """baker barber carpenter clerk cook dancer doctor farmer fisher gardener guard hunter judge lawyer mason miller
        miner painter pilot poet porter potter sailor singer smith tailor teacher trader waiter weaver""".split(),
    "pet": """bear camel cat cow crow dog donkey dove duck eagle fox frog goat goose hare hawk hen horse lizard mole mouse
        owl parrot pig rabbit raven sheep snake swan turtle""".split(),
    "good": """amber apples barley bells boats bread bricks candles carpets cheese clocks copper cotton figs glass gold
        honey ivory lamps leather marble olives paper pearls pepper salt silk tea tin wool""".split(),
}
WORDINGS = {
    "town": ("{name} was born in {town}.", "The home of {name} is {town}.", "They know {name} in {town}."),
    "job": ("{name} works as a {job}.", "The trade of {name} is that of a {job}.", "They say that {name} is a {job}."),
    "pet": ("{name} keeps a {pet}.", "The friend of {name} is a {pet}.", "They saw {name} with a {pet}."),
    "good": ("{name} sells {good}.", "The treasure of {name} is {good}.", "They ask {name} for {good}."),
}


def tell(rng, name, tellings):
    """`tellings` passages about a new person called `name`: three of the four facts about her, in changing words."""
    facts = {"name": name} | {what: rng.choice(values) for what, values in FACTS.items()}
    for _ in range(tellings):
        yield " ".join(rng.choice(WORDINGS[what]).format(**facts) for what in rng.sample(sorted(FACTS), 3))


def write_toy_world(folder, seed, n_groups=2000, group_size=16, n_test=200):
    """Write a world to `folder`: groups.jsonl to train on (each tells twice of `group_size` / 2 people), a test collection
    in BEIR layout about people whose names occur in no group, a tokenizer trained on the groups, and a tiny decoder
    with random weights."""
    folder, rng = Path(folder), random.Random(seed)
    (folder / "qrels").mkdir(parents=True)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    groups = []
    for _ in range(n_groups):
        group = [text for name in rng.sample(names[n_test:], group_size // 2) for text in tell(rng, name, 2)]
        rng.shuffle(group)
        groups.append(group)
    corpus, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for i, name in enumerate(names[:n_test]):
        query, *passages = tell(rng, name, 3)
        queries.append({"_id": f"q{i}", "text": query})
        corpus += [{"_id": f"d{i}.{j}", "title": "", "text": text} for j, text in enumerate(passages)]
        qrels += [f"q{i}\td{i}.{j}\t1" for j in range(len(passages))]
    for name, rows in (("groups", groups), ("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1024, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((PREFIX[kind] + text for group in groups for text in group for kind in PREFIX), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    config = LlamaConfig(
        tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, tie_word_embeddings=True, eos_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(seed)
    save_model(Llama(config).init_weights(), folder)


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description="Make groups of related passages from raw documents.", allow_abbrev=False,
        formatter_class=Help,
    )  # fmt: skip
    add = parser.add_argument
    add("--docs", nargs="+", required=True, help='JSON-lines files of documents, {"text": ...} each, of which only the text is read; .gz too')
    add("--out", required=True, help="JSON-lines file of groups to write; must not exist")
    add("--group", choices=("document", "bm25"), default="document",
        help="document: consecutive passages of one document, or of a few when they are short; bm25: a passage and its nearest")  # fmt: skip
    add("--group_size", type=int, default=16, help="passages in a group")
    add("--run_length", type=int, help="most consecutive passages of one document in a group (default: the whole group)")
    add("--max_words", type=int, default=120, help="most words in a passage")
    add("--seed", type=int, default=0, help="order in which documents meet")
    args = parser.parse_args()
    if args.group_size < 2 or args.max_words < 1 or not 1 <= (args.run_length or 1) <= args.group_size:
        raise ValueError("need --group_size of at least 2, --max_words of at least 1, --run_length of 1 to --group_size")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists already; remove it or choose another --out")

    documents, seen, repeated = [], set(), 0
    for file in args.docs:
        for number, doc in read_lines(file):
            if not isinstance(doc, dict) or not isinstance(doc.get("text"), str):
                raise ValueError(f'{file}:{number}: need an object with a text under "text"')
            passages = split_passages(doc["text"], args.max_words)
            new = [p for p in dict.fromkeys(passages) if p not in seen]
            repeated += len(passages) - len(new)
            seen.update(new)
            documents.append(new)
    if args.group == "bm25":
        groups = group_by_bm25(documents, args.group_size, args.seed)
    else:
        groups = group_by_document(documents, args.group_size, args.run_length or args.group_size, args.seed)
    n_groups, partial = 0, Path(f"{args.out}.partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="replace") as out:
            for group in groups:
                out.write(json.dumps(group, ensure_ascii=False) + "\n")
                n_groups += 1
        if not n_groups:
            raise ValueError(f"{len(seen)} passages are too few for one group of {args.group_size}")
        os.replace(partial, args.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{len(documents):,} documents, {len(seen):,} passages ({repeated:,} repeated ones left out)")
    print(f"{args.out}: {n_groups:,} groups of {args.group_size}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
