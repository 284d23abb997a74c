"""A LightningModule with GEKO's loss and loader, on one process or several (pip install lightning).

python examples/lightning_loop.py [--processes 2] [--resume RUN/last.ckpt]
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

import geko_kernels as gk

EPOCHS = 8


class Classifier(LightningModule):
    """Reads the batches itself (`dataloader_iter`): otherwise Lightning fetches the next one before this is trained."""

    def __init__(self, dataset: TensorDataset, num_epochs: int) -> None:
        super().__init__()
        self.automatic_optimization = False  # looks at left-out samples take no optimizer step
        self.dataset, self.num_epochs = dataset, num_epochs
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
        self.loader: Any = None

    def setup(self, stage: str) -> None:  # the processes are there by now, and the device is known
        self.loader = gk.GEKOLoader(self.dataset, 50 // self.trainer.world_size, self.num_epochs, device=self.device)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - self.loader.progress)
        return [optimizer], [schedule]

    def train_dataloader(self) -> Iterator[Any]:
        return next(self.loader.epochs())  # the epoch at hand, its probes first

    def training_step(self, dataloader_iter: Iterator[Any]) -> None:
        batch, _, _ = next(dataloader_iter)
        self.train(batch.trains)
        inputs, labels = batch.data
        with torch.set_grad_enabled(batch.trains):
            given = labels, batch.ids, self.loader.state
            loss = gk.weighted_loss(self.model(inputs), *given, sample_weights=batch.weights, update=True)
        if batch.trains:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["loader"] = self.loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loader.load_state_dict(checkpoint["loader"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="lightning_run")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--stop-after", type=int, default=EPOCHS, help="epochs, of the eight that the run has")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    args = parser.parse_args()

    torch.manual_seed(0)
    inputs = torch.randn(2000, 16)
    labels = (inputs[:, :4] @ torch.randn(4, 5)).argmax(1)  # 5 classes
    module = Classifier(TensorDataset(inputs, labels), EPOCHS)
    trainer = Trainer(
        max_epochs=args.stop_after,
        accelerator="auto",
        devices=args.processes,
        strategy="auto" if args.processes == 1 else "ddp",
        reload_dataloaders_every_n_epochs=1,  # a plan an epoch
        callbacks=[ModelCheckpoint(args.output_dir, save_last=True)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, ckpt_path=args.resume)
    page = module.loader.write_report(args.output_dir)
    if trainer.is_global_zero:
        with torch.no_grad():
            accuracy = (module.model.cpu()(inputs).argmax(1) == labels).float().mean().item()
        trained = module.loader.counts.report()["samples_backward"]
        print(f"trained {trained} samples of {EPOCHS * len(inputs)}, accuracy {accuracy:.4f}, {page}")


if __name__ == "__main__":
    main()
