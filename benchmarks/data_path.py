"""
An epoch of the default MLP (training and validation) with the images in memory, against the template's way:
torchvision's transforms image by image in a DataLoader of 2 workers. The same Lightning Trainer runs both, in turn.

    python benchmarks/data_path.py --data_dir ../data/
"""
import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_folder
from bmnist import NUM_TRAIN, NUM_VAL, bmnist
from train_pl import VAE


def template_loaders(root):
    """Training and validation loader with per-image transforms and 2 workers each."""
    binarize = transforms.Compose([transforms.ToTensor(), transforms.Lambda(lambda img: (img > 0.5).float())])
    dataset = MNIST(root, transform=binarize)
    train, val = Subset(dataset, range(NUM_TRAIN)), Subset(dataset, range(NUM_TRAIN, NUM_TRAIN + NUM_VAL))
    return DataLoader(train, 128, shuffle=True, num_workers=2), DataLoader(val, 128, num_workers=2)


class EpochSeconds(pl.Callback):
    """Wall time of each epoch, validation included, in `seconds`."""

    def __init__(self):
        self.seconds = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds.append(time.perf_counter() - self.start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../data/", help="Directory of MNIST (default: %(default)s)")
    parser.add_argument("--rounds", default=5, type=int, help="Epochs of each, after one to warm up (default: 5)")
    args = parser.parse_args()
    run_folder.quiet_libraries()
    ways = {"in memory": bmnist(args.data_dir)[:2], "template": template_loaders(args.data_dir)}
    clocks = {name: EpochSeconds() for name in ways}
    for _ in range(args.rounds + 1):
        for name, loaders in ways.items():
            trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[clocks[name]], logger=False,
                                 enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                                 num_sanity_val_steps=0)
            trainer.fit(VAE("MLP", [512], 32, 20, 1e-3), *loaders)
    medians = {}
    for name, clock in clocks.items():
        seconds = clock.seconds[1:]
        medians[name] = statistics.median(seconds)
        print(f"{name:10} {medians[name]:6.2f} s per epoch (median of {len(seconds)}; {min(seconds):.2f} to "
              f"{max(seconds):.2f})")
    ratios = [ours / theirs for ours, theirs in zip(*(clock.seconds[1:] for clock in clocks.values()))]
    print(f"ratio      {statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
          f"torch {torch.__version__}, Lightning {pl.__version__}")


if __name__ == "__main__":
    main()
