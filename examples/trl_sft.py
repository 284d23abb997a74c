"""TRL's SFTTrainer with GEKO: learnt samples are left out of the epochs; texts, chats, masks and metrics are SFT's.

python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M
"""

import argparse

import torch
from datasets import Dataset
from gloss_prompts import gloss_records
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import geko_kernels as gk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: a directory or a hub name")
    parser.add_argument("--output-dir", default="trl_run")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=3)
    args = parser.parse_args()

    trainer = gk.GEKOSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=10,
            report_to="none",
            eval_strategy="epoch",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(gloss_records("train", args.samples)),
        eval_dataset=Dataset.from_list(gloss_records("test", max(args.samples // 10, 1))),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    trainer.train()
    trainer.save_model()
    report = trainer.get_efficiency_report()
    print(
        f"{report['samples_backward']} of {report['samples_standard']} samples trained; buckets after the last epoch:"
    )
    print(report["epochs"][-1]["buckets"])


if __name__ == "__main__":
    main()
