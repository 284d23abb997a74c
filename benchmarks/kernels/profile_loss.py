"""One forward and backward of `weighted_loss`, for tools that look at single kernels.

Bytes that each kernel reads and writes (the forward: at most 1.05 x and under 1 % of the logits' size, printed here):

    GEKO_BACKEND=triton ncu --launch-skip 3 --launch-count 3 --kernel-name 'regex:statistics|update|grad' \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        python -m benchmarks.kernels.profile_loss 8192 128256

The same for the Hopper path, which takes 128 MiB of logits or more, and what its CUDA kernel waits for:

    ncu --launch-skip 4 --launch-count 4 --kernel-name 'regex:predict|update|correct' \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
        python -m benchmarks.kernels.profile_loss 8192 128256

Memory errors and races, on a small case (1056 128256 without --packed is one for the Hopper path):

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python -m benchmarks.kernels.profile_loss 64 1027 --packed
    compute-sanitizer --tool racecheck python -m benchmarks.kernels.profile_loss 64 1027 --packed
"""

from __future__ import annotations

import argparse

import torch

import geko_kernels as gk

ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=int, help=f"a multiple of {ROWS}")
    parser.add_argument("vocab", type=int)
    parser.add_argument("--packed", action="store_true", help="one id a token instead of one a row")
    parser.add_argument("--zero", type=int, default=0, help=f"how many of the first samples ({ROWS} rows) weigh 0")
    args = parser.parse_args()
    shape = (ROWS, args.tokens // ROWS)
    logits = torch.randn(*shape, args.vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, args.vocab, shape, device="cuda")
    ids = torch.arange(ROWS, device="cuda")
    if args.packed:
        ids = (torch.arange(args.tokens, device="cuda") // 5).view(shape)
    state = gk.SampleState(args.tokens, device="cuda")
    state.quarantined[: args.zero] = True
    for _ in range(2):  # the first call compiles: skip its three launches
        loss, _ = gk.weighted_loss(logits, labels, ids, state, return_stats=True)
        loss.backward()
    torch.cuda.synchronize()
    print(f"logits: {logits.numel() * logits.element_size() / 1e6:.1f} MB; seen {int(state.times_seen.sum())} visits")


if __name__ == "__main__":
    main()
