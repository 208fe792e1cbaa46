// Facts about the object that this file is linked into, as JSON. maefast/_library.py refuses an
// object of another release.
extern "C" __attribute__((visibility("default"))) const char* maefast_build_info() {
  return "{\"version\": \"" MAEFAST_VERSION "\", \"compiler\": \"" MAEFAST_COMPILER "\", \"build_type\": \"" MAEFAST_BUILD_TYPE
         "\", \"kernels\": \"" MAEFAST_KERNELS "\"}";
}
