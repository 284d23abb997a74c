"""SmolLM2-135M learns to name the class of a WordNet gloss: once with the standard loss, once with GEKO.

Both arms train the last 6 layers from the same weights, on the same samples in the same order, for the same number of
epochs, with the same learning rate by progress. The hidden states of the frozen layers never change, so they are
computed once, for both. GEKO leaves out of an epoch what is frozen, and re-checks that every second epoch.
"""

import argparse
import copy

import torch
from demo_report import draw, print_report
from demo_training import BATCH, EPOCHS, LEARNING_RATE, Arm, Data
from glosses import frozen_states, load_glosses
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from smollm2 import Prefix, Tail, load_smollm2, tiny_llama

import geko_kernels as gk

TRAINED_LAYERS = 6
CONFIG = gk.GEKOConfig(bucket_weights=(1, 1, 1))  # nothing but leaving out what is learnt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model on few samples, in seconds")
    parser.add_argument("--plot", default="demo.png", help="where the picture goes (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    with console.status("Loading the model (the first time it is unpacked, which takes half a minute) ..."):
        model, encode = tiny_llama() if options.smoke else load_smollm2()
    sizes = (64, 32) if options.smoke else (4096, 512) if device.type == "cuda" else (768, 512)
    train, test = (
        load_glosses(split, encode, device, size) for split, size in zip(("train", "test"), sizes, strict=True)
    )
    frozen_layers = model.config.num_hidden_layers - TRAINED_LAYERS
    model.to(device).requires_grad_(False)
    with console.status("Computing what the frozen layers make of each gloss ..."):
        prefix = Prefix(model, frozen_layers)
        train_data, test_data = (Data(split, frozen_states(prefix, split)) for split in (train, test))
    console.print(
        f"{len(train)} glosses to train on, {len(test)} held out, {EPOCHS} epochs in batches of {BATCH}, "
        f"learning rate {LEARNING_RATE}, last {TRAINED_LAYERS} of {model.config.num_hidden_layers} layers, {device}"
    )
    hard, focus, light = CONFIG.bucket_weights
    console.print(
        f"GEKO weights: HARD {hard}, FOCUS {focus}, LIGHT {light}, FREEZE {CONFIG.freeze_weight:.0f}; a sample freezes "
        f"at loss < {CONFIG.correct_loss}, confidence > {CONFIG.freeze_confidence}, quality > {CONFIG.freeze_quality}\n"
    )

    tail = Tail(model, frozen_layers)
    tail.layers.requires_grad_(True)
    arms = [
        Arm("standard", copy.deepcopy(tail), None),
        Arm("GEKO", copy.deepcopy(tail), gk.SampleState(len(train), CONFIG, device)),
    ]
    columns = (TextColumn("{task.description:>8}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[buckets]}"), console=console) as progress:
        bars = [progress.add_task(arm.name, total=EPOCHS * len(train), buckets="") for arm in arms]
        for _ in range(EPOCHS):  # in turns, so that whatever else the machine does slows both alike
            for arm, bar in zip(arms, bars, strict=True):
                arm.train_epoch(train_data, test_data, progress, bar)
    print_report(console, *arms)
    draw(options.plot, *arms)
    console.print(f"Picture: {options.plot}")


if __name__ == "__main__":
    main()
