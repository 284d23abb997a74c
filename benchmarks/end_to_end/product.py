"""D1 through `GEKOTrainer`: what `auto()` gives beside uniform training of a fixed length, by the trainer's own clock.

    python -m benchmarks.end_to_end.product d1.npz --arms auto uniform:1 uniform:3 --out product.jsonl
    python -m benchmarks.end_to_end.product d1.npz --choosing --rate 1e-4 --arms uniform:1 --out choose.jsonl

Both train all layers of SmolLM2-135M in bfloat16 autocast, `--batch` samples a step, windows sorted by length. A
uniform run has a cosine over its own length; `auto` has the most of `--most` epochs. With `--compile` the first arm
pays for the compilation: `--arms uniform:0.02 auto ...` leaves it out of the seconds of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, TrainingArguments

import geko_kernels as gk
from benchmarks.end_to_end.engine import load_smollm2, tiny_llama
from benchmarks.end_to_end.texts import Texts, load
from benchmarks.results import append, environment

_WARM_UP = 0.03


class Rows(Dataset[dict[str, list[int]]]):
    """Samples as `input_ids` and `labels`, -100 on the prompt."""

    def __init__(self, texts: Texts, ids: torch.Tensor) -> None:
        self.texts, self.ids = texts, ids.tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        texts, i = self.texts, self.ids[row]
        tokens = texts.tokens[texts.offsets[i] : texts.offsets[i + 1]].tolist()
        start = int(texts.prompts[i])
        return {"input_ids": tokens, "labels": [-100] * start + tokens[start:], "length": len(tokens)}


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = -(-max(len(item["input_ids"]) for item in items) // 8) * 8
    fill = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([item[key] + [value] * (longest - len(item[key])) for item in items])
        for key, value in fill.items()
    }
    return {**batch, "attention_mask": (torch.arange(longest) < torch.tensor([[len(i["input_ids"])] for i in items]))}


def run(model: LlamaForCausalLM, texts: Texts, arm: str, given: argparse.Namespace) -> Any:
    seed, rate, most, batch = given.seed, given.rate, given.most, given.batch
    kind, _, length = arm.partition(":")
    config = gk.GEKOConfig.auto() if kind == "auto" else gk.GEKOConfig.uniform()
    ids = torch.cat([ids for name, ids in texts.parts.items() if name not in ("test", "choose")]).sort().values
    folder = tempfile.mkdtemp()
    args = TrainingArguments(
        folder,
        num_train_epochs=most if kind == "auto" else float(length),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=2 * batch,
        learning_rate=rate,
        weight_decay=0.01,
        lr_scheduler_type="constant_with_warmup" if kind == "auto" else "cosine",
        warmup_steps=0.1 if kind == "auto" else _WARM_UP,
        train_sampling_strategy="group_by_length",
        bf16=torch.cuda.is_available(),
        torch_compile=given.compile,
        seed=seed,
        save_strategy="no",
        logging_steps=200,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    begin = time.perf_counter()
    trainer = gk.GEKOTrainer(model, args, collate, Rows(texts, ids), config=config)
    trainer.train()
    seconds = time.perf_counter() - begin
    test = trainer.evaluate(Rows(texts, texts.parts["choose" if given.choosing else "test"]))
    report = json.loads((Path(folder) / "geko_report.json").read_text())
    counted = trainer.get_efficiency_report()
    kept = {key: counted[key] for key in ("seconds", "saved_compute", "samples_forward", "samples_backward")}
    stopping = {key: value for key, value in report.get("stopping", {}).items() if key != "held_back"}
    return {"arm": arm, "seconds_all": seconds, "test_loss": test["eval_loss"], **kept, "stopping": stopping}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--arms", nargs="+", default=["auto", "uniform:1", "uniform:3"])
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--choosing", action="store_true", help="measure the rows to choose by, not the test rows")
    parser.add_argument("--compile", action="store_true", help="by regions; an arm before the others pays for it")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and few samples, for tests")
    given = parser.parse_args()
    if given.compile:
        os.environ |= {f"ACCELERATE_DYNAMO_USE_{name}": "true" for name in ("REGIONAL_COMPILATION", "DYNAMIC")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = load(given.texts)
    model = (tiny_llama if given.tiny else load_smollm2)()[0]
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for arm in given.arms:
        model.load_state_dict(first)
        row = run(model, texts, arm, given)
        append(
            given.out,
            {
                **row,
                "seed": given.seed,
                "rate": given.rate,
                "batch": given.batch,
                "compiled": given.compile,
                "choosing": given.choosing,
                **environment(device),
            }
            | {"command": " ".join(sys.argv)},
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
