"""Peak memory and time of the student's loss, forward and backward: whole logits against chunks (`training.losses.answer_losses`).

    python benchmarks/loss_memory.py [--tokens 1024] [--chunk 256] [--train-layer] [--ratio 6]

The sizes are the paper's: a student of 3B (hidden 2048, 151,936 ids) under an assistant of 7B (3584, 152,064 ids), λ = 0.3, T = 2. `dense` is the
plain way: both models' logits [tokens, ids], cross_entropy, log_softmax, kl_div. Only the hidden states train, as under LoRA; with
--train-layer the output layer does too, and its gradient of 1.2 GB, which both ways need, is in both figures.

Each way runs in a process of its own, which first makes the inputs (3.4 GB). Its figure is what it takes beyond them: on a CPU the growth of
the peak resident set, on a CUDA device that of `max_memory_allocated`. Exit code 1 unless the chunks take at most 1 / RATIO of the memory and
both ways agree on the losses and the gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulcot_ray.training.losses import Teacher, answer_losses

HIDDEN, IDS = {"student": 2048, "assistant": 3584}, {"student": 151_936, "assistant": 152_064}
LAM, TEMPERATURE = 0.3, 2.0


def dense(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: Teacher) -> Tensor:
    logits = hidden @ weight.T
    with torch.no_grad():
        theirs = teacher.hidden @ teacher.weight.T
    log_q = F.log_softmax(logits.float() / TEMPERATURE, -1)
    log_p = F.log_softmax(theirs[:, : IDS["student"]].float() / TEMPERATURE, -1)
    soft = TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return (1 - LAM) * F.cross_entropy(logits.float(), targets, reduction="sum") + LAM * soft


def normal(rows: int, columns: int, scale: float, device: str) -> Tensor:
    """In place, so that making the inputs takes no more than they do."""
    return torch.empty(rows, columns, device=device).normal_(0, scale)


def peak(device: str) -> int:
    """Bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(way: str, tokens: int, chunk: int, train_layer: bool) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = normal(tokens, HIDDEN["student"], 1.0, device).requires_grad_()
    weight = normal(IDS["student"], HIDDEN["student"], 1.5 * HIDDEN["student"] ** -0.5, device).requires_grad_(train_layer)
    teacher = Teacher(
        normal(tokens, HIDDEN["assistant"], 1.0, device), normal(IDS["assistant"], HIDDEN["assistant"], 1.5 * HIDDEN["assistant"] ** -0.5, device)
    )
    targets = torch.randint(0, IDS["student"], (tokens,), device=device)
    _ = normal(64, 64, 1.0, device) @ normal(64, 64, 1.0, device)  # libraries' buffers
    before = peak(device)
    if device == "cpu" and before - resident() > 64 << 20:
        raise SystemExit(f"the inputs took {before} bytes to make and {resident()} to hold: the peak says nothing of the loss")
    wall, cpu = time.perf_counter(), time.process_time()
    if way == "dense":
        total = dense(hidden, weight, targets, teacher)
    else:
        total = answer_losses(hidden, weight, targets, teacher, temperature=TEMPERATURE, chunk=chunk, mix=(1 - LAM, LAM)).total
    (total / tokens).backward()
    loss = total.item() / tokens  # waits for the device
    assert hidden.grad is not None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "bytes": peak(device) - before,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "loss": loss,
        "gradient": hidden.grad.norm().item(),
        "layer": weight.grad.norm().item() if weight.grad is not None else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--train-layer", action="store_true")
    parser.add_argument("--ratio", type=float, default=6.0)
    parser.add_argument("--way", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.tokens, options.chunk, options.train_layer)))
        return
    found = {}
    for way in ("dense", "chunked"):
        run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], stdout=subprocess.PIPE, text=True)
        if run.returncode:
            sys.exit(f"{way} ended with code {run.returncode}" + (": killed, most likely for memory" if run.returncode < 0 else ""))
        found[way] = json.loads(run.stdout.splitlines()[-1])
    a, b = found["dense"], found["chunked"]
    print(f"{options.tokens} answer tokens, chunks of {options.chunk}, output layer {'trained' if options.train_layer else 'frozen'}, {a['device']}")
    for way, x in found.items():
        print(f"  {way:8} {x['bytes'] / 2**30:6.2f} GiB  {x['wall']:7.2f} s (CPU {x['cpu']:.1f} s)  loss {x['loss']:.6f}")
    memory = a["bytes"] / b["bytes"]
    print(f"  dense ÷ chunked: memory {memory:.1f}, time {a['wall'] / b['wall']:.2f}, CPU time {a['cpu'] / b['cpu']:.2f}")
    same = all(math.isclose(a[k], b[k], rel_tol=1e-4) for k in ("loss", "gradient", "layer"))
    if not same:
        print("the two ways disagree:", a, b, sep="\n  ")
    sys.exit(0 if same and memory >= options.ratio else 1)


if __name__ == "__main__":
    main()
