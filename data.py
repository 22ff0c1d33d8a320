"""Files in, groups out: the stream of groups, and how groups are made from raw documents.

A *group* is what one in-batch attention sees: passages that belong together. It is one line of a
JSON-lines file: a list of texts, or {"src": ..., "text": [...]} as in the published corpora. Raw
documents, {"text": ...} on a line of its own each, become groups by

    python data.py --docs docs.jsonl --out groups.jsonl

Further down: test collections, the toy world, the readers of files that are not to be trusted, and
what all commands share: flags, processes.
"""

import argparse
import ctypes
import gzip
import json
import os
import random
import re
import signal
import sys
import traceback
import zlib
from array import array
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

PREFIX = {"query": "query: ", "passage": "passage: "}  # what the retriever reads before a text

# --------------------------------------------------------------------------------------------------
# the stream of groups


def parse_group(line, where, size):
    """(first `size` texts, src or None) of a line. Raises ValueError that begins with `where`."""
    group = parse(line, where)
    src = None
    if isinstance(group, dict):
        group, src = group.get("text"), group.get("src")
    if not isinstance(group, list) or not all(isinstance(text, str) for text in group):
        raise ValueError(f'{where}: need a list of texts, or {{"src": ..., "text": that list}}')
    if len(group) < size:
        raise ValueError(
            f"{where}: a group of {len(group)} passages; need {size} (--train_group_size)"
        )
    for number, text in enumerate(group[:size], 1):
        if not text.strip():
            raise ValueError(f"{where}: passage {number} is empty")
    return group[:size], src


class Groups:
    """The groups of a JSON-lines file, read one at a time: the file need not fit in memory.

    As torch's DataLoader wants it, it has a length, and items by number.
    """

    def __init__(self, file, size):
        """size: passages of a group that are used. Raises ValueError that names a bad line."""
        if str(file).endswith(".gz"):
            raise ValueError(f"{file}: groups are read from the middle of a file; gunzip it first")
        self.file, self.size = str(file), size
        self.checksum = 0  # by which a resumed run notices other data
        self.offsets, position = array("q"), 0
        with open(must_exist(file), "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    parse_group(line, f"{file}:{number}", size)
                    self.offsets.append(position)
                position += len(line)
                self.checksum = zlib.crc32(line, self.checksum)
        if not self.offsets:
            raise ValueError(f"{file} holds no groups")

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        with open(self.file, "rb") as lines:
            lines.seek(self.offsets[i])
            return parse_group(lines.readline(), f"{self.file}: group {i}", self.size)


def group_order(n, seed, first, last, rank=0, world_size=1, accumulation=1, batch_size=1):
    """Yield, for each micro-batch of updates `first` to `last` - 1, this rank's group numbers.

    They are a list of `batch_size` numbers below n. Each epoch is a permutation that depends on
    (seed, epoch) alone. An update takes the next world_size * accumulation * batch_size numbers of
    it. So a run can be resumed, and how that product is split does not change what an update reads.
    """

    @lru_cache(1)
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(n)

    for micro in range(first * accumulation, last * accumulation):
        start = (micro * world_size + rank) * batch_size
        yield [int(order(i // n)[i % n]) for i in range(start, start + batch_size)]


# --------------------------------------------------------------------------------------------------
# documents -> passages -> groups

# Thai, Lao, Burmese, Khmer, kana, Chinese have no spaces: each character counts as a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
# their vowel signs and tones, which stay with the character before
MARKS = "\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3"
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")

# Where a text may be cut, from the best place to the last resort.
CUTS = [
    # after . ! ? and quotes, unless one space and a small letter follow; at an empty line; after
    # 。 ！ ？
    re.compile(r"""(?<=[.!?])["')\]]*\s+(?![a-z]) | \n\s*\n | [。！？]["'」』”’]*""", re.VERBOSE),
    re.compile(r"\n"),
    # between words; between unspaced characters, but not before a mark on one
    re.compile(rf"\s+|(?<=[{UNSPACED}])(?![{MARKS}])"),
]


def split_passages(text, max_words=120):
    """Cut `text` into passages of whole sentences, as many as fit into `max_words` words.

    Nothing is left out or changed but white space at the ends. Too long a sentence is cut at line
    ends, too long a line between words.

    >>> split_passages("One two. Three four. Five.", 4)
    ['One two. Three four.', 'Five.']
    """

    def count(piece):
        return len(WORD.findall(piece))

    def pieces(text, cut, *cuts):  # each at most max_words long
        start = 0
        for end in [match.end() for match in cut.finditer(text)] + [len(text)]:
            piece, start = text[start:end], end
            if count(piece) <= max_words or not cuts:  # after the last cut it stays whole
                yield piece
            else:
                yield from pieces(piece, *cuts)

    passages, words = [""], 0
    for piece in pieces(text, *CUTS):
        words += count(piece)
        if words > max_words:
            passages.append("")
            words = count(piece)
        passages[-1] += piece
    return [passage.strip() for passage in passages if passage.strip()]


def parts(items, size):
    """The list `items` in parts of `size`, in order; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def group_by_document(documents, size, run_length, seed=0):
    """List groups of `size` passages from `documents`, which are lists of passages.

    A group holds runs of up to `run_length` consecutive passages of one document. Runs are put in
    order of length, so that whole ones fill whole groups. A run may be cut where a group ends.
    Every passage is used once, but for those of a last, short group.
    """
    rng = random.Random(seed)
    runs = [run for doc in documents for run in parts(doc, run_length)]
    rng.shuffle(runs)
    runs.sort(key=len, reverse=True)
    passages = [passage for run in runs for passage in run]
    groups = [group for group in parts(passages, size) if len(group) == size]
    rng.shuffle(groups)
    return groups


def group_by_similarity(documents, size, run_length, seed=0, block=4096, nearest=60):
    """List groups of `size` passages: a run from each of size / run_length similar documents.

    A run is `run_length` consecutive passages; what is left of a document is not used. The first
    document of a group is drawn at random. Then come, of its `nearest` documents, the first ones
    with an unused run. Near is what BM25 finds with the whole document as a query. Documents meet
    in blocks of `block`, so that the time grows linearly.
    """
    from eval import BM25  # here, since eval imports this file

    rng, groups = random.Random(seed), []
    n_others = size // run_length - 1
    nearest = max(nearest, 2 * n_others)
    documents = [doc for doc in documents if len(doc) >= run_length]
    rng.shuffle(documents)
    for part in parts(documents, block):
        runs = [[run for run in parts(doc, run_length) if len(run) == run_length] for doc in part]
        texts = [" ".join(doc) for doc in part]
        index = BM25(texts)
        # + 1: the document itself is among them
        near = [np.argsort(-index.scores(text), kind="stable")[: nearest + 1] for text in texts]
        before = None
        while before != len(groups):  # rounds, until one adds no group
            before = len(groups)
            for i in rng.sample(range(len(part)), len(part)):  # all of them, in random order
                alike = [j for j in near[i].tolist() if j != i and runs[j]][:n_others]
                if runs[i] and len(alike) == n_others:
                    groups.append([])
                    for j in [i, *alike]:
                        groups[-1] += runs[j].pop(rng.randrange(len(runs[j])))
    rng.shuffle(groups)
    return groups


def read_documents(file):
    """(line number, {"text": ...}) of each line. Raises ValueError that names a bad one."""
    for number, doc in read_lines(file):
        if not isinstance(doc, dict) or not isinstance(doc.get("text"), str):
            raise ValueError(f'{file}:{number}: need an object with a text under "text"')
        yield number, doc


# --------------------------------------------------------------------------------------------------
# test collections


def read_beir(folder, split="test"):
    """A test collection in BEIR layout: corpus, queries, qrels.

    corpus {docid: title + text}, queries {qid: text}, qrels {qid: {docid: grade}}. Only queries
    with a relevant document are kept. A judged document that is not in the corpus is never found; a
    judged query that has no text is left out; a printed note says so. Raises ValueError or
    FileNotFoundError that names file and line.
    """
    folder = Path(folder)
    corpus, queries = read_texts(folder / "corpus.jsonl"), read_texts(folder / "queries.jsonl")
    file = folder / f"qrels/{split}.tsv"
    judged = read_qrels(file)
    qrels = {qid: grades for qid, grades in judged.items() if qid in queries}
    docids = [docid for grades in qrels.values() for docid in grades]
    unknown = [docid for docid in docids if docid not in corpus]
    lost = len(judged) - len(qrels)
    if 2 * lost > len(judged) or 2 * len(unknown) > len(docids):
        raise ValueError(f"{file} judges mostly queries or documents that {folder} does not hold")
    if lost:
        say(f"{file}: {lost} queries are not in queries.jsonl, and left out")
    if unknown:
        say(f"{file}: {len(unknown)} judgements of documents not in corpus.jsonl: never found")
    qrels = {qid: grades for qid, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        raise ValueError(f"{file} has no relevant document for any query")
    return corpus, {qid: queries[qid] for qid in qrels}, qrels


def read_collections(folders, split="test"):
    """{name: (corpus, queries, qrels)}: a folder's name, or its path if two have one name."""
    names = [Path(folder).resolve().name for folder in folders]
    collections = {}
    for name, folder in zip(names, folders):
        if names.count(name) > 1:
            name = str(folder)
        collections[name] = read_beir(folder, split)
    return collections


def read_texts(file):
    """{id: title + text} of a corpus.jsonl or queries.jsonl. An id is a text or a number."""
    texts = {}
    for number, doc in read_documents(file):
        key, title = doc.get("_id"), doc.get("title") or ""
        if type(key) not in (str, int) or not isinstance(title, str):
            raise ValueError(
                f'{file}:{number}: need an "_id", and a text as "title" if there is one'
            )
        if str(key) in texts:
            raise ValueError(f"{file}:{number}: id {str(key)!r:.80} occurs twice")
        texts[str(key)] = f"{title} {doc['text']}".strip()
    if not texts:
        raise ValueError(f"{file} is empty")
    return texts


def read_qrels(file):
    """{qid: {docid: grade}} of lines "qid docid grade", or TREC's "qid 0 docid grade".

    Columns are separated by tabs or spaces. A first line without a digit is a header.
    """
    qrels = {}
    for number, line in enumerate(must_exist(file).read_bytes().splitlines(), 1):
        where = f"{file}:{number}"
        with blame(where, "is not UTF-8"):
            line = line.decode("utf-8-sig")
        separator = "\t" if "\t" in line else None  # None: white space
        fields = [field.strip(" ") for field in line.split(separator)]
        header = number == 1 and not re.search(r"\d", line)
        if header or not line.strip():
            continue
        if len(fields) == 4 and fields[1] in ("0", "Q0"):
            del fields[1]
        if len(fields) != 3 or not re.fullmatch(r"[+-]?\d{1,9}", fields[2]):
            raise ValueError(
                f"{where}: need query-id, corpus-id, whole score, "
                "or TREC's query-id, 0, corpus-id, score"
            )
        qid, docid, grade = fields[0], fields[1], int(fields[2])
        grades = qrels.setdefault(qid, {})
        if grades.setdefault(docid, grade) != grade:
            raise ValueError(f"{where}: {docid!r:.80} has another score for {qid!r:.80} above")
    return qrels


# --------------------------------------------------------------------------------------------------
# the toy world: people who do not exist, each described several times in different words


def join_words(starts, ends):
    return [start + end for start in starts.split() for end in ends.split()]


FIRST = join_words("Al Bri Cor Dan El Fen", "a an is o ya")
LAST = join_words("Harg Kest Lorn Mund Pell Rost", "a en er ing ov")
FACTS = {
    "town": join_words("Ash Birch Cold Deer East Fair", "brook field ham port wick"),
    "job": """baker barber carpenter clerk cook dancer doctor farmer fisher gardener guard hunter
        judge lawyer mason miller miner painter pilot poet porter potter sailor singer smith
        tailor teacher trader waiter weaver""".split(),
    "pet": """bear camel cat cow crow dog donkey dove duck eagle fox frog goat goose hare hawk hen
        horse lizard mole mouse owl parrot pig rabbit raven sheep snake swan turtle""".split(),
    "good": """amber apples barley bells boats bread bricks candles carpets cheese clocks copper
        cotton figs glass gold honey ivory lamps leather marble olives paper pearls pepper
        salt silk tea tin wool""".split(),
}
WORDINGS = {
    "town": (
        "{name} was born in {town}.",
        "The home of {name} is {town}.",
        "They know {name} in {town}.",
    ),
    "job": (
        "{name} works as a {job}.",
        "The trade of {name} is that of a {job}.",
        "They say that {name} is a {job}.",
    ),
    "pet": (
        "{name} keeps a {pet}.",
        "The friend of {name} is a {pet}.",
        "They saw {name} with a {pet}.",
    ),
    "good": (
        "{name} sells {good}.",
        "The treasure of {name} is {good}.",
        "They ask {name} for {good}.",
    ),
}


def tell(rng, name, tellings):
    """Yield passages about `name`: three of four facts in changing words.

    The facts are drawn anew at each call. So only other passages of the same group reveal them.
    """
    facts = {what: rng.choice(values) for what, values in FACTS.items()}
    for _ in range(tellings):
        told = rng.sample(sorted(FACTS), 3)
        yield " ".join(rng.choice(WORDINGS[what]).format(name=name, **facts) for what in told)


def write_toy_decoder(folder, texts):
    """Write a byte-level BPE of 1,024 tokens, trained on `texts`, and a tiny decoder's config."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(f"{folder}/tokenizer.json")
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "initializer_range": 0.05,
    }
    write_json(folder / "config.json", config)


def write_toy_world(folder, seed, n_groups=2000, n_test=200):
    """Write a world to `folder`, all but the weights of its tiny decoder.

    groups.jsonl to train on: each group tells twice of 8 people. A test collection in BEIR layout
    about people whose names occur in no group. A tokenizer trained on the groups.
    """
    folder, rng = Path(folder), random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    groups = []
    for _ in range(n_groups):
        people = rng.sample(names[n_test:], 8)
        group = [text for name in people for text in tell(rng, name, 2)]
        rng.shuffle(group)
        groups.append(group)
    corpus, queries, qrels = [], [], "query-id\tcorpus-id\tscore\n"
    for i, name in enumerate(names[:n_test]):
        query, *passages = tell(rng, name, 3)
        queries.append({"_id": f"q{i}", "text": query})
        for j, text in enumerate(passages):
            corpus.append({"_id": f"d{i}.{j}", "title": "", "text": text})
            qrels += f"q{i}\td{i}.{j}\t1\n"
    for name, rows in (("groups", groups), ("corpus", corpus), ("queries", queries)):
        write_lines(folder / f"{name}.jsonl", rows)
    write(folder / "qrels/test.tsv", qrels)
    texts = [prefix + text for group in groups for text in group for prefix in PREFIX.values()]
    write_toy_decoder(folder, texts)


# --------------------------------------------------------------------------------------------------
# files. They are not to be trusted: nothing in them is run as code, and only regular files are
# read. Links are followed: the hub's cache is made of them.

# `mean` and `std` of a retriever that pools by the mean. Without this file it pools by the EOS
POOLING = "pooling.safetensors"
# All that is ever read of a model's folder; nothing else is fetched from the hub.
FILES = f"""config.json model.safetensors model-*.safetensors tokenizer.json tokenizer_config.json
adapter_config.json adapter_model.safetensors 1_Pooling/config.json {POOLING}""".split()


def model_folder(name):
    """The folder of `name`: a folder, or a model of the hub, "org/name" or "org/name@revision".

    The hub's cache and its variables (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT) are respected. Raises
    ValueError that says how to fetch by hand.
    """
    hub_id = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?", str(name))
    if Path(name).exists() or not hub_id:
        return Path(name)
    from huggingface_hub import snapshot_download  # here, since it is slow to import

    repo, revision = hub_id.groups()
    by_hand = f"where there is a network, `hf download {repo} --local-dir FOLDER`, and give FOLDER"
    with blame(name, f"is no folder here, nor did the Hugging Face hub give it ({by_hand})"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FILES))


def brief(text):
    """Make `text`, which is not to be trusted, one short line that a terminal shows as it is."""
    return repr(str(text))[1:-1][:200]


@contextmanager
def blame(where, failed):
    """Turn whatever fails inside into one ValueError of one line: "{where} {failed}: ...".

    An error that already begins with `where` passes as it is.
    """
    try:
        yield
    # GeneratorExit: `read_lines` yields inside, and its reader may stop early
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        if str(error).startswith(str(where)):
            raise
        raise ValueError(f"{where} {failed}: {brief(error) or type(error).__name__}") from None


def must_exist(file):
    """Return `file`. Raises FileNotFoundError unless it is a regular file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist, or is no file")
    return file


def parse(line, where):
    """The JSON value of the bytes `line`. Raises ValueError that begins with `where`."""
    with blame(where, "is not JSON in UTF-8"):
        return json.loads(line.decode("utf-8-sig"))


def read_json(file):
    """The JSON object in `file`. Raises FileNotFoundError or ValueError that name it."""
    value = parse(Path(must_exist(file)).read_bytes(), file)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: need a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(file):
    """{name: tensor} of one file. Raises FileNotFoundError or ValueError that name it."""
    with blame(must_exist(file), "is damaged or incomplete"):
        return load_file(file)


def read_lines(file):
    """(line number, JSON value) of each non-empty line of a JSON-lines file, gzipped or not."""
    opened = gzip.open if str(file).endswith(".gz") else open
    with blame(file, "cannot be read"), opened(must_exist(file), "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, parse(line, f"{file}:{number}")


def must_be_new(path):
    """Return `path`, or None. Make the folder it will be in; raise ValueError if it exists."""
    if path:
        if Path(path).exists():
            raise ValueError(f"{path} exists already; remove it or choose another name")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    return path


def fsync(path):
    """Return when what was written to `path`, a file or folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def replacing(file):
    """Yield another name. What is written to it replaces `file` atomically, if nothing failed.

    It may be a folder, if there is none of `file`'s name.
    """
    file, partial = Path(file), Path(f"{file}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    fsync(partial)
    os.replace(partial, file)
    fsync(file.parent)


def write(file, text):
    """Replace `file` atomically, and make its folder if need be."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_lines(file, rows):
    """Replace `file` atomically by `rows`, one JSON value a line."""
    with replacing(file) as partial, open(partial, "w", encoding="utf-8", errors="replace") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(file, value):
    """Replace `file` by `value` atomically."""
    write(file, json.dumps(value, indent=1) + "\n")


def write_safetensors(file, tensors):
    """Replace `file` by {name: tensor} atomically. Raises ValueError that names it."""
    with blame(file, "could not be written"), replacing(file) as partial:
        save_file(tensors, partial, {"format": "pt"})


# --------------------------------------------------------------------------------------------------
# messages, flags, the machine


def say(text):
    """Print a line, by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def flags_given(description, flags, argv=None):
    """({flag: default}, {flag: value given}) of a command line.

    flags: {flag: (default, help, least, below)}. What a flag takes follows from its default:

        bool     --flag or --no-flag
        tuple    one of these; the first is the default
        list     several values
        text     a text; None: likewise
        number   a number from `least` (0, if left out) to below `below`
    """

    def limits(default, text, least=0, below=1e15):  # of a flag's tuple, which may end before
        return least, below

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    defaults = {}
    for name, (default, text, *_) in flags.items():
        kind, options = type(default), {}
        if kind is tuple:
            options["choices"], default = default, default[0]
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            options["nargs"] = "+"
        elif default is not None:
            options["type"] = kind
        shown = "" if kind is bool or default in (None, []) else f" (default: {default})"
        parser.add_argument(f"--{name}", help=text + shown, default=argparse.SUPPRESS, **options)
        defaults[name] = default
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        least, below = limits(*flags[name])
        if type(value) in (int, float) and not least <= value < below:
            raise ValueError(f"--{name} is {value}; need at least {least}, and less than {below:g}")
    return defaults, given


def tune_malloc():
    """Let glibc keep what it frees: else a CPU run spends half of its time asking for it again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl's has none
        for option, value in ((-4, 0), (-1, -1), (-8, 1)):  # MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX
            libc.mallopt(option, value)


def setup(device):
    """Join the process group, if `torchrun` started several. Returns (device, rank, world size)."""
    tune_malloc()
    here = [name for name in ("cuda", "mps", "cpu") if getattr(torch, name).is_available()]
    device = device or here[0]
    if device.split(":")[0] not in here:
        raise ValueError(f"--device {device} is not there; here are: {', '.join(here)}")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with blame(f"--device {device}", "is not there"):
        device = torch.device(device)
        gpu = device.type == "cuda"
        if gpu:
            torch.cuda.set_device(device)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return device, 0, 1
    day = timedelta(days=1)  # the others wait while the first process runs BM25
    backend, device_id = ("nccl", device) if gpu else ("gloo", None)
    dist.init_process_group(backend, timeout=day, device_id=device_id)
    return device, dist.get_rank(), dist.get_world_size()


def barrier():
    """Wait for all processes: one that leaves while another works would end the job for both."""
    if dist.is_initialized():
        dist.barrier()


def gathered(value):
    """[value of each process], in order. Collective: all must call it."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def leave(code):
    """End this process without Python's shutdown, in which one of gloo's threads may abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def command(main):
    """Run the `main` of a file. A user's mistake, or too little memory, ends it with one line."""
    code, failure = 1, None
    try:
        code = main()
    except KeyboardInterrupt:  # die by the signal: else a shell's loop would go on
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except (ValueError, OSError) as error:
        # a worker's error comes with its traceback before it
        failure = str(error).strip().rpartition(f"\n{type(error).__name__}: ")[2]
    except Exception as error:
        # torch and numpy say "allocate" when memory runs out, on a CPU and on a GPU
        if isinstance(error, (RuntimeError, MemoryError)) and "allocate" in str(error):
            reason = str(error).splitlines()[0]
            failure = f"out of memory ({reason}). What helps: assets/OPERATIONS.md, When it stops"
        else:
            traceback.print_exc()
    if failure:
        print(f"{Path(sys.argv[0]).name}: {failure}", file=sys.stderr)
    # also after a failure: Python would wait for the data loader's workers, which ignore its signal
    leave(code)


# --------------------------------------------------------------------------------------------------

FLAGS = {
    "docs": ([], 'JSON-lines files of documents, {"text": ...} each; .gz too'),
    "out": (None, "JSON-lines file of groups to write; must not exist"),
    "group_size": (16, "passages in a group", 2),
    "run_length": (16, "most consecutive passages of one document in a group", 1),
    "similar": (False, "a group's documents are alike, by their words"),
    "max_words": (120, "most words in a passage", 1),
    "seed": (0, "order in which documents meet"),
}


def main():
    defaults, given = flags_given("Make groups of passages from raw documents.", FLAGS)
    args = argparse.Namespace(**defaults | given)
    if not args.docs or not args.out:
        raise ValueError("--docs and --out are needed")
    must_be_new(args.out)
    run_length = min(args.run_length, args.group_size)
    make_groups = group_by_document
    if args.similar:
        make_groups = group_by_similarity
        if args.group_size % run_length or args.group_size == run_length:
            raise ValueError(
                "with --similar, --run_length must divide --group_size, and be smaller: 4, say"
            )

    documents, seen, total = [], set(), 0
    for file in args.docs:
        for _, doc in read_documents(file):
            passages = split_passages(doc["text"], args.max_words)
            fresh = [p for p in dict.fromkeys(passages) if p not in seen]
            documents.append(fresh)
            seen.update(fresh)
            total += len(passages)
    groups = make_groups(documents, args.group_size, run_length, args.seed)
    if not groups:
        raise ValueError(f"{len(seen)} passages are too few for a group of {args.group_size}")
    write_lines(args.out, groups)
    repeated = total - len(seen)
    print(f"{len(documents):,} documents, {len(seen):,} passages ({repeated:,} repeated left out)")
    print(f"{args.out}: {len(groups):,} groups of {args.group_size}")


if __name__ == "__main__":
    command(main)
