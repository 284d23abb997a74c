"""Your own Accelerate loop with GEKO's loss and sampler, on one process or several.

python examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M
accelerate launch --num_processes 2 examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from gloss_prompts import Item, gloss_items
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import geko_kernels as gk


class Collator:
    """Pads a list of items into a batch, and adds the `sample_ids` (B,) of its rows."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, items: list[Item]) -> dict[str, Tensor]:
        ids = [item["sample_id"] for item in items]
        batch = self.pad([{name: item[name] for name in ("input_ids", "labels")} for item in items])
        return {**batch, "sample_ids": torch.tensor(ids)}


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def probe(
    model: Any, items: list[Item], collator: Collator, sampler: gk.GEKOSampler, epoch: int, accelerator: Accelerator
) -> int:
    """Look again, forward only, at left-out samples that are due: what was forgotten comes back into the plan."""
    due = sampler.due_probes(epoch)
    mine = due[accelerator.process_index :: accelerator.num_processes]
    model.eval()
    for ids in mine.split(64):
        batch = {name: tensor.to(accelerator.device) for name, tensor in collator([items[i] for i in ids]).items()}
        with torch.no_grad():
            logits = forward(model, batch)
        gk.weighted_loss(logits, batch["labels"], batch["sample_ids"], sampler.state, shift=True)
    model.train()
    sampler.probed(due, epoch)
    return len(due)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: a directory or a hub name")
    parser.add_argument("--output-dir", default="accelerate_run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()

    accelerator = Accelerator()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    items = [{**item, "sample_id": i} for i, item in enumerate(gloss_items(tokenizer, "train", args.samples))]
    collator = Collator(tokenizer)

    state = gk.SampleState(len(items), gk.GEKOConfig(), device=accelerator.device)
    sampler = gk.GEKOSampler(state, args.epochs)
    loader: Any = DataLoader(items, args.batch_size, sampler=sampler, collate_fn=collator)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(args.epochs):
        num_probed = probe(accelerator.unwrap_model(model), items, collator, sampler, epoch, accelerator)
        sampler.set_epoch(epoch)  # draws the plan
        for step, batch in enumerate(loader):
            done = step * args.batch_size * accelerator.num_processes
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
        accelerator.print(f"epoch {epoch + 1}: trained {len(sampler)} of {len(items)}, probed {num_probed}, {counts}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
