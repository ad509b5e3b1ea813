"""
Measures how the time of a training step on a CPU is divided between kinds of operators (from torch.profiler) and the
time between the operators.

    python benchmarks/step.py --data_dir ../data/      # or --dataset rendered; --model CNN

The first line of the output is the time of a step without the profiler. The table below it includes the overhead of the
profiler.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_pl
from bmnist import load_data
from harness.devices import use_fast_layout
from sources import SOURCES

KINDS = {
    "matrix products": ["mm", "addmm"],
    "convolutions": ["convolution_backward", "mkldnn_convolution", "_convolution", "_slow_conv2d_forward"],
    "activations": ["relu", "clamp_min", "threshold_backward", "gelu", "gelu_backward"],
    "likelihood": ["log_sigmoid_forward", "binary_cross_entropy_with_logits", "sigmoid"],
    "Adam": ["_fused_adam_", "Optimizer.step#Adam.step", "_foreach_add_"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../data/", help="Directory of MNIST (default: %(default)s)")
    parser.add_argument("--dataset", default="mnist", choices=SOURCES)
    parser.add_argument("--model", default="MLP", choices=train_pl.FLAGS["model"]["model"].choices)
    parser.add_argument("--steps", default=100, type=int, help="Steps without, then with the profiler")
    args = parser.parse_args(namespace=train_pl.make_parser().parse_args([]))
    torch.set_flush_denormal(True)  # like a run
    model = use_fast_layout(train_pl.make_vae(args))
    optimizer = model.configure_optimizers()
    train_set = load_data(args)[0].dataset
    order = torch.randperm(len(train_set)).split(args.batch_size)

    def step(number):
        start = time.perf_counter()
        loss = model.training_step(train_set[order[number % len(order)]], number)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    for number in range(10):
        step(number)
    alone = statistics.median(step(number) for number in range(args.steps))
    print(f"{args.model}: {alone * 1e3:.2f} ms per step, median of {args.steps}, {torch.get_num_threads()} threads")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        total = sum(step(number) for number in range(args.steps))
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    microseconds = Counter()
    for event in profiled.key_averages():
        microseconds[kind_of.get(event.key.removeprefix("aten::"), "other operators")] += event.self_cpu_time_total
    microseconds["between the operators"] = total * 1e6 - sum(microseconds.values())
    for kind, value in microseconds.most_common():
        print(f"{kind:22} {value / args.steps / 1e3:7.2f} ms  {value / total / 1e6:4.0%}")


if __name__ == "__main__":
    main()
