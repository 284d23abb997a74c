"""SmolLM2-135M learns to name the class of a WordNet gloss: once with the standard loss, once with GEKO.

Both arms train the last 6 layers from the same weights, on the same samples in the same order, for the same number of
epochs, with the same learning rate by progress: `transformers.Trainer` and `GEKOTrainer`. The hidden states of the
frozen layers never change, so they are computed once, for both. GEKO leaves out of an epoch what is frozen and
re-checks some of that before each epoch.
"""

import argparse
import copy
from pathlib import Path

import torch
from demo_report import draw, print_report
from demo_training import BATCH, EPOCHS, LEARNING_RATE, train
from glosses import class_tokens, frozen_states, load_glosses
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from smollm2 import Prefix, Tail, load_smollm2, tiny_llama
from transformers.utils import logging

import geko_kernels as gk
from geko_kernels.training.report.report import write_report

TRAINED_LAYERS = 6
CONFIG = gk.GEKOConfig.recommended()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model on few samples, in seconds")
    parser.add_argument("--out", default="demo_run", type=Path, help="folder for the report (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.disable_progress_bar()

    with console.status("Loading the model (the first time it is unpacked, which takes half a minute) ..."):
        model, encode = tiny_llama() if options.smoke else load_smollm2()
    sizes = (64, 32) if options.smoke else (4096, 512) if device.type == "cuda" else (448, 256)
    model.to(device).requires_grad_(False)
    frozen_layers = model.config.num_hidden_layers - TRAINED_LAYERS
    prefix, tail = Prefix(model, frozen_layers), Tail(model, frozen_layers)
    with console.status("Computing what the frozen layers make of each gloss ..."):
        splits = (load_glosses(split, encode, size) for split, size in zip(("train", "test"), sizes, strict=True))
        train_data, test_data = (frozen_states(prefix, split, device) for split in splits)
    console.print(
        f"{len(train_data)} glosses to train on, {len(test_data)} held out, {EPOCHS} epochs in batches of {BATCH}, "
        f"learning rate {LEARNING_RATE}, last {TRAINED_LAYERS} of {model.config.num_hidden_layers} layers, {device}"
    )
    hard, focus, light = CONFIG.bucket_weights
    console.print(
        f"GEKO weights: HARD {hard}, FOCUS {focus}, LIGHT {light}, FREEZE {CONFIG.freeze_weight:.0f}; a sample freezes "
        f"at loss < {CONFIG.correct_loss}, confidence > {CONFIG.freeze_confidence}, quality > {CONFIG.freeze_quality}; "
        f"a LIGHT sample takes part every {CONFIG.light_interval} epochs\n"
    )

    tail.layers.requires_grad_(True)
    data, classes = (train_data, test_data), class_tokens(encode)
    columns = (TextColumn("{task.description:>8}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[buckets]}"), console=console) as progress:
        standard, geko = (
            train(name, copy.deepcopy(tail), data, classes, config, options.out, progress)
            for name, config in (("standard", None), ("GEKO", CONFIG))
        )
    print_report(console, standard, geko)
    draw(options.out / "demo.png", standard, geko)
    console.print(f"Picture: {options.out / 'demo.png'}   Report: {write_report(options.out)}")


if __name__ == "__main__":
    main()
