// fastconv._C, the face of the library that carries no tensors. The ops are not here: loading the
// library registers them with torch (schemas.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "build_info.h"
#include "cpu/capability.h"
#ifdef FASTCONV_HAVE_CUDA
#include "cuda/runtime/choice.h"
#include "cuda/runtime/kernel_table.h"
#endif
#include "fingerprint.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastconv's compiled library; importing it registers the torch.ops.fastconv ops.";
  m.def(
      "build_info",
      [] {
        const char* json = std::strchr(fastconv::kBuildInfo, '{');
        return py::module_::import("json").attr("loads")(json);
      },
      "What this library was built from and for, as a dict.");
  m.def("cpu_capability", &fastconv::cpu::capability_name,
        "The build of the CPU kernels that this machine runs: default, avx2 or avx512.");
  m.def(
      "kernel_table",
      [] {
#ifdef FASTCONV_HAVE_CUDA
        const char* json = fastconv_cuda_kernel_table();
#else
        const char* json = "[]";
#endif
        return py::module_::import("json").attr("loads")(json);
      },
      "Every CUDA kernel of this library, as a list of dicts (csrc/cuda/runtime/kernel_table.h); empty when built "
      "without CUDA.");
#ifdef FASTCONV_HAVE_CUDA
  m.def("force_kernel", &fastconv_cuda_force_kernel, py::arg("op"), py::arg("name").none(true),
        "Lets no CUDA kernel of `op` but this one run; None gives the choice back. 1 where there is no such kernel.");
  m.def("record_choices", &fastconv_cuda_record_choices, py::arg("on"),
        "Whether choices among CUDA kernels are noted from now on; forgets those that were.");
  m.def(
      "take_choices", [] { return py::module_::import("json").attr("loads")(fastconv_cuda_take_choices()); },
      "The choices that were noted (csrc/cuda/runtime/choice.h), as a list of dicts; forgets them.");
#endif
  m.def("fingerprint", &fastconv::fingerprint, py::arg("addresses"), py::arg("sizes"),
        "A hash of samples of the memory at these addresses, which hold so many bytes.");
}
