// fastconv._C, the face of the library that carries no tensors. The ops are not here: loading the
// library registers them with torch (schemas.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/capability.h"
#ifdef FASTCONV_HAVE_CUDA
#include "cuda/conformance/conformance.h"
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
  m.def(
      "find_kernel", &fastconv_cuda_find_kernel, py::arg("op"), py::arg("name"),
      "The number by which `prefer_kernels` knows a CUDA kernel of `op`; -1 where there is no such kernel to choose.");
  m.def(
      "prefer_kernels",
      [](const std::vector<int>& kernels) {
        fastconv_cuda_prefer_kernels(kernels.data(), static_cast<int>(kernels.size()));
      },
      py::arg("kernels"), "Adds to the CUDA kernels that this thread takes wherever they can run the call.");
  m.def("end_preference", &fastconv_cuda_end_preference, "Takes back what this thread's last `prefer_kernels` added.");
  m.def(
      "disable_kernels",
      [](const std::vector<std::string>& names) {
        std::vector<const char*> pointers;
        for (const std::string& name : names) pointers.push_back(name.c_str());
        fastconv_cuda_disable_kernels(pointers.data(), static_cast<int>(pointers.size()));
      },
      py::arg("names"), "Lets no call run these CUDA kernels, and again those that were disabled before.");
  m.def(
      "conformance_cases", [] { return py::module_::import("json").attr("loads")(fastconv_cuda_conformance_cases()); },
      "The cases that try a GPU's instructions (csrc/cuda/conformance/conformance.h), as a list of dicts.");
  m.def(
      "conformance_run",
      [](int index, uintptr_t given, uintptr_t out, uintptr_t stream) {
        const char* said =
            fastconv_cuda_conformance_run(index, reinterpret_cast<const uint32_t*>(given),
                                          reinterpret_cast<uint32_t*>(out), reinterpret_cast<void*>(stream));
        if (*said) throw std::runtime_error(said);
      },
      py::arg("index"), py::arg("given"), py::arg("out"), py::arg("stream"),
      "Runs a case on the current device; `given` and `out` are addresses of its words there.");
  m.def("record_choices", &fastconv_cuda_record_choices, py::arg("on"),
        "Whether choices among CUDA kernels are noted from now on; forgets those that were.");
  m.def(
      "take_choices", [] { return py::module_::import("json").attr("loads")(fastconv_cuda_take_choices()); },
      "The choices that were noted (csrc/cuda/runtime/choice.h), as a list of dicts; forgets them.");
#endif
  m.def("fingerprint", &fastconv::fingerprint, py::arg("addresses"), py::arg("sizes"),
        "A hash of samples of the memory at these addresses, which hold so many bytes.");
}
