"""Average the adapters of several runs that differ in --seed.

    python assets/average.py runs/mean runs/small-0/retriever runs/small-1/retriever ...

Each is its base plus alpha/r * B A. The mean of n of these corrections is one of rank n * r: all A
one above the other, all B / n side by side.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import must_be_new, read_json, read_safetensors, write_safetensors
from model import write_folder
from revela import POOLING


def main(argv=None):
    out, *folders = map(Path, sys.argv[1:] if argv is None else argv)
    n = len(folders)
    if n < 2:
        raise ValueError("need OUT, and two retrievers or more")
    must_be_new(out)
    configs = [read_json(folder / "adapter_config.json") for folder in folders]
    if configs.count(configs[0]) < n:
        raise ValueError(f"the adapter_config.json of {', '.join(map(str, folders))} differ")
    config = configs[0] | {name: n * configs[0][name] for name in ("r", "lora_alpha")}
    tensors = [read_safetensors(folder / "adapter_model.safetensors") for folder in folders]
    averaged = {}
    for name in tensors[0]:
        parts = [t[name] for t in tensors]
        averaged[name] = torch.cat(parts) if ".lora_A" in name else torch.cat(parts, 1) / n
    write_folder(out, "adapter_", config, averaged)
    if (folders[0] / POOLING).exists():
        given = [read_safetensors(folder / POOLING) for folder in folders]
        mean = {name: sum(t[name] for t in given) / n for name in ("mean", "std")}
        write_safetensors(out / POOLING, mean)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"average.py: {error}")
