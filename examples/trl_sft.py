"""TRL's SFTTrainer with GEKO's loss: every sample weighs what it still has to teach.

    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M

This changes the loss alone; GEKOTrainer (examples/trainer.py) also leaves learnt samples out of the epochs.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from gloss_prompts import gloss_records
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import geko_kernels as gk


class GEKOSFTTrainer(SFTTrainer):
    """`SFTTrainer` with `weighted_loss`; the training data needs a column `sample_id` that counts from 0.

    It asks for `SFTConfig(remove_unused_columns=False)`, which keeps that column, and for no packing. An evaluation
    dataset needs no such column: its loss is the plain one.
    """

    data_collator: Any

    def __init__(self, *args: Any, num_samples: int, geko_config: gk.GEKOConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sample_state = gk.SampleState(num_samples, geko_config, device=self.args.device)
        self.pad = self.data_collator
        self.data_collator = self.collate

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.pad(items)
        if "sample_id" in items[0]:
            batch["sample_ids"] = torch.tensor([item["sample_id"] for item in items])
        return batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:  # evaluation: the plain loss, whatever the data has for columns
            plain = {name: value for name, value in inputs.items() if name != "sample_ids"}
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        loss = gk.weighted_loss(
            outputs.logits,
            inputs["labels"],
            inputs["sample_ids"],
            self.sample_state,
            shift=True,
            reduction="token_mean",
            num_items=num_items_in_batch,
        )
        if num_items_in_batch is not None:  # counts the tokens of all processes, whose gradients DDP averages
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: a directory or a hub name")
    parser.add_argument("--output-dir", default="trl_run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=3)
    args = parser.parse_args()

    records = [{**record, "sample_id": i} for i, record in enumerate(gloss_records("train", args.samples))]
    trainer = GEKOSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=10,
            report_to="none",
            eval_strategy="epoch",
            remove_unused_columns=False,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(records),
        eval_dataset=Dataset.from_list(gloss_records("test", max(args.samples // 10, 1))),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        num_samples=len(records),
    )
    trainer.train()
    trainer.save_model()
    trainer.sample_state.check()
    counts = trainer.sample_state.bucket_counts().tolist()
    print("samples by bucket:", dict(zip((bucket.name for bucket in gk.Bucket), counts, strict=True)))


if __name__ == "__main__":
    main()
