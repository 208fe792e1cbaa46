// maefast._C: facts about the native build. The ops are in libmaefast.so and need nothing from here.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the native build of maefast.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = MAEFAST_COMPILER;
        info["build_type"] = MAEFAST_BUILD_TYPE;
        info["cplusplus"] = static_cast<long>(__cplusplus);
        info["cuda"] = MAEFAST_HAS_CUDA != 0;
        info["cutlass"] = MAEFAST_HAS_CUTLASS != 0;
        return info;
      },
      "Compiler, build type, C++ standard, and whether the CUDA kernels and those from CUTLASS are in.");
  m.def("cpu_isa", &maefast::cpu::isa_name,
        "The instruction set that the CPU kernels use: 'avx512bf16', 'avx512', 'avx2' or 'scalar'.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        if (!maefast::cpu::set_isa(name.c_str())) {
          throw py::value_error("name must be 'auto', 'scalar', 'avx2', 'avx512' or 'avx512bf16', and run on this CPU; it is '" +
                                name + "'");
        }
      },
      py::arg("name"), "Forces an instruction set for the whole process; 'auto' gives the best one back.");
}
