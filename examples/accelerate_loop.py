"""Your own Accelerate loop with GEKO's loss and loader, on one process or several.

python examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M
accelerate launch --num_processes 2 examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from gloss_prompts import gloss_items
from transformers import AutoModelForCausalLM, AutoTokenizer

import geko_kernels as gk
from geko_kernels.training.data import CausalCollator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: a directory or a hub name")
    parser.add_argument("--output-dir", default="accelerate_run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # before the loader, which asks for the rank
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loader = gk.GEKOLoader(
        gloss_items(tokenizer, "train", args.samples),
        args.batch_size,
        args.epochs,
        device=accelerator.device,
        collate_fn=CausalCollator(tokenizer.pad_token_id),
    )
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)  # the loader shares its batches out itself

    for number, epoch in enumerate(loader.epochs(), 1):
        rows = looks = 0
        for batch in epoch:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - loader.progress)
            model.train(batch.trains)
            labels = batch.data.pop("labels")
            with torch.set_grad_enabled(batch.trains):
                logits = model(**batch.data).logits
                given, weights = (logits, labels, batch.ids, loader.state), batch.weights
                loss = gk.weighted_loss(*given, shift=True, sample_weights=weights, update=True)
            if batch.trains:
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            rows += len(batch.ids) * batch.trains * accelerator.num_processes
            looks += len(batch.ids) * (not batch.trains) * accelerator.num_processes
        loader.state.check()
        counts = dict(zip((bucket.name for bucket in gk.Bucket), loader.state.bucket_counts().tolist(), strict=True))
        accelerator.print(f"epoch {number}: plan of {rows} rows, {looks} probed, {counts}")
    loader.write_report(args.output_dir)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
