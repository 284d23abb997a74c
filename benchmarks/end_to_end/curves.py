"""Held-out loss and accuracy while a language model is fine-tuned, four times an epoch, with raw and averaged weights.

    python -m benchmarks.end_to_end.curves d1.npz --rate 3e-4 --epochs 3 --out curves.jsonl              # constant rate
    python -m benchmarks.end_to_end.curves d1.npz --rate 3e-4 --epochs 1 2 3 5 --cosine --out curves.jsonl

The texts come from `benchmarks.end_to_end.texts`; every sample set that it holds back is looked at beside the test set.
A look takes each set's mean token loss, mean sample loss, share of samples with every token right and share of tokens
right. Weights: "raw"; "5/t", the average `lerp(min(1, 5 / t))`; "0.997", the exponential average of that decay,
bias-corrected. "swapped" is the loss where each prompt has the answer of another sample of the set.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import geko_kernels as gk
from benchmarks.end_to_end.arms import learning_rate
from benchmarks.end_to_end.engine import load_smollm2, tiny_llama
from benchmarks.end_to_end.run import batches
from benchmarks.end_to_end.texts import Texts, load
from benchmarks.results import append, environment

_LOOKS = 4  # an epoch
_SEEN = 400  # training samples that are looked at, and sentinels of the swap test
_MULTIPLE = 8  # a batch is padded to a multiple of so many tokens
AVERAGES: dict[str, Callable[[int], float]] = {
    "5/t": lambda t: min(1.0, 5 / t),
    "0.997": lambda t: max(1 / t, 0.003),
}


class Model(nn.Module):
    """tokens (B, S) -> hidden states (B, S, H); padding on the right is never looked at by what stands before it."""

    def __init__(self, llama: LlamaForCausalLM, compiled: bool) -> None:
        super().__init__()
        self.inner, self.head = llama.model, llama.lm_head.weight
        if compiled:
            for layer in self.inner.layers:
                layer.compile(dynamic=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.inner.embed_tokens(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        rotary = self.inner.rotary_emb(hidden, places)
        for layer in self.inner.layers:
            hidden = layer(hidden, position_ids=places, position_embeddings=rotary)
        return self.inner.norm(hidden)


class Run:
    """One training run of a model on the texts' `train` part."""

    def __init__(self, model: Model, texts: Texts, device: torch.device, batch: int, rate: float) -> None:
        self.model, self.texts, self.device, self.batch = model, texts, device, batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.tokens = texts.tokens.to(device)
        self.rate, self.step = rate, 0
        fused = {"fused": True} if device.type == "cuda" else {"foreach": False}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=torch.tensor(rate), weight_decay=0.01, **fused)
        self.averages = {name: [p.detach().clone() for p in self.parameters] for name in AVERAGES}

    def rows(self, ids: Tensor, answers_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and labels (B, S) of samples; with `answers_of` the answers are those of other samples."""
        texts = self.texts
        others = ids if answers_of is None else answers_of
        prompts = texts.prompts[ids]
        counts = texts.length(others) - texts.prompts[others]
        longest = int((prompts + counts).max())
        place = torch.arange(-(-longest // _MULTIPLE) * _MULTIPLE)  # (S,)
        of_answer = (place >= prompts[:, None]) & (place < (prompts + counts)[:, None])
        answer_at = (texts.offsets[others] + texts.prompts[others] - prompts)[:, None] + place
        source = torch.where(of_answer, answer_at, texts.offsets[ids][:, None] + place).clamp(max=len(texts.tokens) - 1)
        given = (place < prompts[:, None]) | of_answer
        source, of_answer, given = (x.to(self.device, non_blocking=True) for x in (source, of_answer, given))
        tokens = torch.where(given, self.tokens[source], 0).long()
        return tokens, torch.where(of_answer, tokens, -100)

    def loss(self, ids: Tensor, answers_of: Tensor | None = None) -> tuple[Tensor, Any]:
        tokens, labels = self.rows(ids, answers_of)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = self.model(tokens)
        return gk.weighted_linear_loss(
            hidden, self.model.head, labels, reduction="token_mean", shift=True, return_stats=True
        )

    def train_batch(self, ids: Tensor, rate: float) -> None:
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)
        self.loss(ids)[0].backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=self.device.type == "cuda")
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, share in AVERAGES.items():
            torch._foreach_lerp_(self.averages[name], [p.detach() for p in self.parameters], share(self.step))

    @torch.no_grad()
    def measure(self, ids: Tensor, swapped: bool = False) -> list[float]:
        """[mean token loss, mean sample loss, samples all right, tokens right]."""
        places = self.texts.length(ids).argsort(stable=True)
        order, others = ids[places], (ids.roll(1) if swapped else ids)[places]
        found = []
        for part, other in zip(order.split(2 * self.batch), others.split(2 * self.batch), strict=True):
            stats = self.loss(part, other)[1]
            n = stats.num_tokens
            entries = (stats.loss * n, n, stats.loss, stats.accuracy == 1, stats.accuracy * n)
            found.append(torch.stack([entry.double().sum() for entry in entries]))
        total, tokens, loss, right, hits = torch.stack(found).sum(0).tolist()
        return [total / tokens, loss / len(ids), right / len(ids), hits / tokens]

    def look(self) -> dict[str, Any]:
        """The measures of every held-out set, by the weights that they were taken with."""
        parts, seen = self.texts.parts, self.texts.parts["train"][:_SEEN]
        raw = [p.detach().clone() for p in self.parameters]
        found: dict[str, Any] = {}
        for name, weights in (("raw", raw), *self.averages.items()):
            torch._foreach_copy_([p.data for p in self.parameters], weights)
            found[name] = {part: self.measure(ids) for part, ids in parts.items() if part != "train"}
            found[name]["seen"] = self.measure(seen)
            if name == "5/t":
                sentinels = parts["random"][:_SEEN]
                found["swapped"] = {"random": self.measure(sentinels, True), "seen": self.measure(seen, True)}
        torch._foreach_copy_([p.data for p in self.parameters], raw)
        return found

    def go(self, epochs: int, cosine: bool, seed: int) -> tuple[list[dict[str, Any]], float]:
        """The looks, and the seconds of training without them."""
        train = self.texts.parts["train"]
        length, per_epoch = self.texts.length(torch.arange(len(self.texts.prompts))), -(-len(train) // self.batch)
        warm_up, total = max(per_epoch // 10, 1), epochs * per_epoch
        looks: list[dict[str, Any]] = []
        seconds, start = 0.0, self.wait()
        for epoch in range(epochs):
            order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(1000 * seed + epoch))]
            for number, places in enumerate(batches(order, length, self.batch, 1000 * seed + epoch), 1):
                constant = self.rate * min(1.0, (self.step + 1) / warm_up)
                self.train_batch(order[places], learning_rate(self.rate, self.step / total) if cosine else constant)
                last = number == per_epoch
                if last or (not cosine and number * _LOOKS // per_epoch > (number - 1) * _LOOKS // per_epoch):
                    seconds += self.wait() - start
                    looks.append({"epoch": epoch + number / per_epoch, "step": self.step, "seconds": seconds})
                    looks[-1] |= self.look() if not cosine or epoch == epochs - 1 else {}
                    start = self.wait()
        return looks, seconds

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--rate", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--epochs", type=int, nargs="+", default=[3])
    parser.add_argument("--cosine", action="store_true", help="a warm-up and a cosine to 0, looked at at its end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, for tests")
    given = parser.parse_args()
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    llama = (tiny_llama if given.tiny else load_smollm2)()[0].to(device).train()
    model, first = Model(llama, device.type == "cuda"), {k: v.clone() for k, v in llama.state_dict().items()}
    texts, shared = load(given.texts), {**environment(device), "command": " ".join(sys.argv)}
    took = 0.0  # seconds an epoch
    for seed, epochs, rate in ((s, e, r) for s in given.seeds for e in given.epochs for r in given.rate):
        now = time.perf_counter()
        if now - begin + took * epochs > 60 * given.minutes:
            print(f"not run: {epochs} epochs, rate {rate:g}, seed {seed}")
            continue
        llama.load_state_dict(first)
        looks, seconds = Run(model, texts, device, given.batch, rate).go(epochs, given.cosine, seed)
        took = (time.perf_counter() - now) / epochs
        setting = {"task": given.texts.stem, "schedule": "cosine" if given.cosine else "constant", "epochs": epochs}
        row = {**setting, "rate": rate, "seed": seed, "batch": given.batch, "seconds": seconds, "looks": looks}
        append(given.out, {**row, **shared})
        tests = [round(look["raw"]["test"][0], 4) for look in looks if "raw" in look]
        print(
            json.dumps({**setting, "rate": rate, "seed": seed, "seconds": round(seconds, 1), "test": tests}), flush=True
        )


if __name__ == "__main__":
    main()
