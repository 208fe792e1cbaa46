// The C functions of libmaefast.so that maefast._C calls through ctypes. The ops need nothing from here.
#include <string>

#include "cpu/isa.h"

#define MAEFAST_EXPORT extern "C" __attribute__((visibility("default")))

// Facts about the build, as JSON.
MAEFAST_EXPORT const char* maefast_build_info() {
  static const std::string info =
      "{\"compiler\": \"" MAEFAST_COMPILER "\", \"build_type\": \"" MAEFAST_BUILD_TYPE
      "\", \"cpu_isas\": \"" MAEFAST_CPU_ISAS "\", \"cplusplus\": " +
      std::to_string(__cplusplus) + "}";
  return info.c_str();
}

MAEFAST_EXPORT const char* maefast_cpu_isa() { return maefast::cpu::isa_name(); }

MAEFAST_EXPORT bool maefast_set_cpu_isa(const char* name) { return maefast::cpu::set_isa(name); }
