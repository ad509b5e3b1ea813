"""A small LightningModule that the harness trains: `python -m tests.programs.toy --log_dir LOGS --run_name toy`."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from harness.errors import exit_on_error
from harness.flags import Flag, Parser, check_run_flags, run_flags
from harness.run import Experiment, Run

FLAGS = {
    "training": {
        "lr": Flag(0.1, "Learning rate", above=0),
        "batch_size": Flag(20, "Points per minibatch", minimum=1),
        "epochs": Flag(6, "Passes over the points", minimum=1),
        "seed": Flag(1, "Seed", minimum=0),
    },
    **run_flags(log_dir="toy_logs"),
}


class Line(pl.LightningModule):
    """Linear regression, y = a x + b, by least squares with a little noise in x."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.line = torch.nn.Linear(1, 1)

    def step(self, batch, stage):
        x, y = batch
        error = (self.line(x + 0.01 * torch.randn_like(x)) - y).square().mean()
        self.log(f"{stage}_error", error, on_epoch=True, on_step=False, batch_size=len(x), sync_dist=True)
        return {"loss": error, "error": error.detach()}

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def load_data(args, download, sampler):
    """Returns loaders of 100 points for training, 40 for validation and 40 for test."""
    x = torch.linspace(-1, 1, 180).unsqueeze(1)
    parts = TensorDataset(x, 3 * x + 1), [100, 40, 40]
    sets = torch.utils.data.random_split(*parts, generator=torch.Generator().manual_seed(0))
    return [DataLoader(part, args.batch_size, sampler=sampler(part, part is sets[0])) for part in sets]


def save_text(path, run):
    """Writes a line of text, as a mock of a figure of the finished run."""
    with open(path, "w") as file:
        file.write(f"{len(run.curve('val_error'))} values, test {run.results['test_error']}")


EXPERIMENT = Experiment(
    metric="error",
    metric_label="squared error",
    describe=lambda loaders: f"a line on {len(loaders[0].dataset)} points",
    quantities={"error": "mean squared error"},
    identifying=("lr",),
    figures={"line.txt": save_text},
)


def main():
    parser = Parser("Trains a line.", FLAGS)
    args = parser.parse_args()
    with exit_on_error(parser):
        args = parser.complete(args)
        check_run_flags(args)
        with Run(args, parser.defaults, EXPERIMENT, callbacks=[]) as run:
            if not run.is_finished:
                train_loader, val_loader, test_loader = run.start(load_data)
                pl.seed_everything(args.seed)
                model = run.prepare(Line(args.lr))
                if run.is_new:
                    run.trainer.validate(model, val_loader, verbose=False)
                run.fit(model, train_loader, val_loader)
                best = Line.load_from_checkpoint(run.best_checkpoint)
                run.finish(run.trainer.test(best, test_loader, verbose=False))


if __name__ == "__main__":
    main()
