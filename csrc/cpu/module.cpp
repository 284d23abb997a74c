// geko_kernels._C: the functions that are not tensor ops. Importing it also registers the ops of library.cpp.
#include <pybind11/pybind11.h>

#include <string>

#include "csrc/cpu/simd/row_kernels.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The CPU kernels of geko_kernels: facts about them; the ops are overloads of torch.ops.geko.";
  module.def(
      "build_info", [] { return std::string("torch " GEKO_BUILD_TORCH ", C++ compiler " __VERSION__); },
      "What the extension was built with.");
  module.def(
      "cpu_capability", [] { return std::string(geko::row_kernels().capability); },
      "The instruction set in use: 'avx512', 'avx2' or 'portable'; the widest, or what GEKO_CPU_CAPABILITY names.");
  module.def("num_threads", &geko::num_threads, "Threads that the ops use: `torch.get_num_threads()`.");
}
