"""GEKOTrainer in place of transformers.Trainer: the same script, one class changed.

python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M
torchrun --nproc-per-node 2 examples/trainer.py --model HuggingFaceTB/SmolLM2-135M
"""

import argparse

import torch
from gloss_prompts import gloss_items
from transformers import AutoModelForCausalLM, AutoTokenizer

from geko_kernels import GEKOTrainer, GEKOTrainingArguments
from geko_kernels.training.report.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: a directory or a hub name")
    parser.add_argument("--output-dir", default="trainer_run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=4)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = GEKOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=GEKOTrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=10,
            eval_strategy="epoch",
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=gloss_items(tokenizer, "train", args.samples),
        eval_dataset=gloss_items(tokenizer, "test", args.samples // 4),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        figures = trainer.get_efficiency_report()
        print(f"trained {figures['samples_backward']} samples, a standard run {figures['samples_standard']}")
        print("report:", write_report(args.output_dir))


if __name__ == "__main__":
    main()
