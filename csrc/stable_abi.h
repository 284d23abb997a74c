// LibTorch through its stable ABI: one binary for torch 2.11 and later. Include only this and torch/headeronly.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000  // not a compiler flag: torch's pybind11 headers refuse it
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
