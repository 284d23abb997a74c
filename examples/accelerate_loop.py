"""Your own Accelerate loop with GEKO's loss and sampler, on one process or several.

python examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M
accelerate launch --num_processes 2 examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from gloss_prompts import gloss_items
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import geko_kernels as gk
from geko_kernels.training.data import CausalCollator, IdCollator, IdDataset


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def probe(
    model: Any, data: IdDataset, collator: IdCollator, sampler: gk.GEKOSampler, epoch: int, accelerator: Accelerator
) -> int:
    """Look again, forward only, at left-out samples that are due: what was forgotten comes back into the plan."""
    looked = 0
    model.eval()
    while len(due := sampler.due_probes(epoch)):
        mine = due[accelerator.process_index :: accelerator.num_processes]
        for ids in mine.split(64) if len(mine) else ():
            items = collator([data[i] for i in ids.tolist()])
            batch = {name: tensor.to(accelerator.device) for name, tensor in items.items()}
            with torch.no_grad():
                logits = forward(model, batch)
            gk.weighted_loss(logits, batch["labels"], batch["sample_ids"], sampler.state, shift=True, update=True)
        sampler.probed(due, epoch)
        looked += len(due)
    model.train()
    return looked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: a directory or a hub name")
    parser.add_argument("--output-dir", default="accelerate_run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = IdDataset(gloss_items(tokenizer, "train", args.samples))
    collator = IdCollator(CausalCollator(tokenizer.pad_token_id))  # adds the sample_ids to a batch

    state = gk.SampleState(len(data), gk.GEKOConfig.recommended(), device=accelerator.device)
    global_batch = args.batch_size * accelerator.num_processes
    sampler = gk.GEKOSampler(state, args.epochs, pad_to=global_batch)  # so accelerate repeats no sample
    loader: Any = DataLoader(data, args.batch_size, sampler=sampler, collate_fn=collator)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(args.epochs):
        num_probed = probe(accelerator.unwrap_model(model), data, collator, sampler, epoch, accelerator)
        sampler.set_epoch(epoch)  # draws the plan
        for step, batch in enumerate(loader):
            done = step * global_batch
            sampler.advance(done)  # moves the weights along the curriculum
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - sampler.progress(done))
            loss = gk.weighted_loss(forward(model, batch), batch["labels"], batch["sample_ids"], state, shift=True)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        state.sync()
        state.check()
        counts = dict(zip((bucket.name for bucket in gk.Bucket), state.bucket_counts().tolist(), strict=True))
        accelerator.print(f"epoch {epoch + 1}: plan of {len(sampler)} rows, {num_probed} probed, {counts}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
