"""Norms of the gradients of the small recipe's loss before the first update, float32 and bfloat16.

python assets/results/rounding/gradients.py smollm2 groups.jsonl
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

import train
from data import Groups
from revela import Retriever, Tokenizer, collate

model, data = sys.argv[1:]
args = train.parse_args(["--model", model, "--data", data])
groups, tokenizer = Groups(data, args.train_group_size), Tokenizer(model)
first = [i for (i,) in train.group_order(len(groups), args.seed, 0, 3)]  # of updates 1, 2, 3
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(args.seed)
    retriever, lm = train.build_models(args, dtype, torch.device("cpu"))
    revela = train.build_objective(args, Retriever(retriever, tokenizer), lm)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    for i in first:
        batch = collate([groups[i]], tokenizer, tokenizer, args.passage_max_len, args.first_half)
        with autocast():
            loss = revela(batch)
        loss.backward()
        norms = []
        for llama in (retriever, lm):
            gradients = [p.grad for p in llama.parameters() if p.grad is not None]
            norms.append(f"{torch.nn.utils.get_total_norm(gradients):.3f}")
        print(f"{dtype}  group {i}  loss {loss:.4f}  retriever {norms[0]}  lm {norms[1]}")
        revela.zero_grad()
