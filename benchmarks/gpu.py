"""
Measures whole runs, evaluations and speed on a GPU, and runs tests/programs/test_gpu.py.

    python benchmarks/gpu.py --data_dir ../data/      # without --data_dir, on rendered digits

Measures runs of 80 epochs (MLP and CNN, with and without CUDA graphs), their evaluation with 1,000 samples per image,
and the seconds per epoch of the package, of a plain loop and of the template (see speed.py). Then runs the tests.
Skips measurements that do not fit into the time limit and, on a CPU, measurements that need a GPU; a note names each of
them. Prints a table of the results with their targets, and writes all measurements to gpu.json.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from speed import WAYS, machine, measure_epochs, measure_whole_run, summary

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = ["MLP", "CNN"]
TARGETS = {"fit": {"MLP": 6, "CNN": 20}, "process": {"MLP": 25, "CNN": 25}}  # at most this many seconds for 80 epochs
WAYS_OF_A_GPU = ["package", "package --no_cuda_graph", "bare loop", "template"]
EVALUATION = """
import sys
sys.path.insert(0, {repository!r})
import torch, evaluate
evaluate.main()
print("MiB:", torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0)
"""


class Benchmark:
    """The measurements, one after the other until the time limit. `measured` is the content of gpu.json."""

    def __init__(self, args):
        self.args = args
        self.end = time.monotonic() + 60 * args.minutes
        self.on_gpu = torch.cuda.is_available()
        self.data = ["--dataset", "mnist", "--data_dir", args.data_dir] if args.data_dir else ["--dataset", "rendered"]
        self.measured = {"machine": machine(), "data": self.data[1], "epochs": args.epochs, "left_out": []}

    @contextlib.contextmanager
    def part(self, name, needs_gpu=False, seconds=10):
        """Context manager of a measurement. Yields the dict for the results, or None if the measurement is skipped."""
        why = "there is no CUDA device" if needs_gpu and not self.on_gpu else None
        if not why and self.seconds_left < seconds:
            why = "there is no time left"
        if why:
            self.skip(name, why)
            yield None
            return
        found = {}
        try:
            yield found
        except subprocess.SubprocessError as error:
            print("\n".join(str(text) for text in [error.stdout, error.stderr] if text), flush=True)
            self.skip(name, "it took too long" if isinstance(error, subprocess.TimeoutExpired) else "it failed")
        self.measured[name] = found

    @property
    def seconds_left(self):
        return max(self.end - time.monotonic(), 1)

    def skip(self, name, why):
        print(f"note: {name} is skipped: {why}", flush=True)
        self.measured["left_out"].append({"name": name, "why": why})

    def whole_run(self, model, folder, *no_graph):
        """Measures a run of the package: with CUDA graphs, followed by an evaluation, or with --no_cuda_graph."""
        name = " ".join(["run", model, *no_graph])
        log_dir = str(folder / name)
        with self.part(name, needs_gpu=bool(no_graph)) as found:
            if found is not None:
                flags = [*self.data, "--model", model, "--epochs", str(self.args.epochs), *no_graph]
                found.update(measure_whole_run(flags, log_dir, timeout=self.seconds_left))
                print(
                    "{name}: process {process:.1f} s, fit {fit:.1f} s, test bpd {test_bpd:.4f}, "
                    "GPU {gpu_mib:.0f} MiB, of which tensors {tensors_mib:.0f}".format(name=name, **found),
                    flush=True,
                )
        if found and not no_graph:
            self.evaluation(model, folder, log_dir)

    def evaluation(self, model, folder, log_dir):
        with self.part(f"evaluation {model}") as found:
            if found is None:
                return
            checkpoint = next(Path(log_dir).glob("**/best.ckpt"))
            code = EVALUATION.format(repository=str(REPOSITORY))
            flags = [str(checkpoint), "--iw_samples", str(self.args.iw_samples), "--out", str(folder / f"of {model}")]
            flags += self.data[2:]
            output = self.run("-c", code, *flags).stdout
            results = json.loads((folder / f"of {model}" / "evaluation.json").read_text())
            found.update({name: results[name] for name in ["seconds", "log_likelihood", "iw_samples", "device"]})
            found["gpu_mib"] = float(re.search("MiB: (.*)", output).group(1))
            print(
                "evaluation {model}: {seconds:.1f} s, log p(x) {log_likelihood:.2f}, {iw_samples} samples, "
                "GPU {gpu_mib:.0f} MiB".format(model=model, **found),
                flush=True,
            )

    def speed(self, model):
        """Measures the seconds per epoch of each way to train, in turn."""
        with self.part(f"speed {model}", needs_gpu=True, seconds=60) as found:
            if found is not None:
                command = [sys.executable, str(REPOSITORY / "benchmarks" / "speed.py"), *self.data]
                command += ["--model", model, "--rounds", "3"]
                found.update(summary(measure_epochs(command, WAYS_OF_A_GPU, rounds=3)))
                for way, row in found.items():
                    print(f"{model} {way:16} {row['median']:.3f} s per epoch  {WAYS[way]}", flush=True)

    def tests(self, name):
        with self.part(name, needs_gpu=True, seconds=30) as found:
            if found is not None:
                run = self.run("-m", "unittest", "--verbose", f"tests.programs.test_gpu.{name}", check=False)
                print(run.stdout + run.stderr, flush=True)
                found.update(exit_code=run.returncode, output=run.stderr)

    def run(self, *words, check=True):
        """Runs a Python process, which is killed at the time limit."""
        return subprocess.run(
            [sys.executable, *words],
            cwd=REPOSITORY,
            check=check,
            capture_output=True,
            text=True,
            timeout=self.seconds_left,
        )

    def print_targets(self):
        """Prints the results with their targets, which are for a GPU such as an H100."""
        if not self.on_gpu:
            return
        rows = []
        for what, targets in TARGETS.items():
            for model, most in targets.items():
                found = self.measured.get(f"run {model}", {}).get(what)
                rows.append((f"{model}, {self.args.epochs} epochs: seconds of the {what}", found, f"at most {most}"))
        for model in self.args.models:
            speed = self.measured.get(f"speed {model}") or {}
            ratio = speed["template"]["median"] / speed["package"]["median"] if speed else None
            rows.append((f"{model}: speed relative to the template", ratio, "at least 10"))
        width = max(len(name) for name, *_ in rows)
        print(
            "\n"
            + "\n".join(
                f"{name:{width}}  {'not measured' if found is None else f'{found:12.2f}'}  {target}"
                for name, found, target in rows
            )
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="Directory of MNIST (default: use rendered digits)")
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--epochs", default=80 if on_gpu else 1, type=int, help="Epochs of a run (default: %(default)s)"
    )
    parser.add_argument(
        "--iw_samples", default=1000 if on_gpu else 10, type=int, help="Samples per image (default: %(default)s)"
    )
    parser.add_argument("--models", default=MODELS, choices=MODELS, nargs="+", help="Models to measure (default: both)")
    parser.add_argument("--minutes", default=9.0, type=float, help="Time limit in minutes (default: %(default)s)")
    parser.add_argument("--out", default=".", help="Directory of gpu.json (default: %(default)s)")
    args = parser.parse_args()
    benchmark = Benchmark(args)
    print(", ".join(f"{name} {value}" for name, value in benchmark.measured["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:  # the most informative measurements first
        for model in args.models:
            benchmark.whole_run(model, Path(folder))
        benchmark.speed(args.models[0])
        benchmark.tests("TestGPU")
        benchmark.tests("TestManyEpochs")
        for model in args.models:
            benchmark.whole_run(model, Path(folder), "--no_cuda_graph")
        for model in args.models[1:]:
            benchmark.speed(model)
    benchmark.print_targets()
    path = Path(args.out) / "gpu.json"
    path.write_text(json.dumps(benchmark.measured, indent=1) + "\n")
    print(f"\nall measurements are in {path}")


if __name__ == "__main__":
    main()
