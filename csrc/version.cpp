// The release of these sources, in libmaefast.so and in libmaefast_cuda.so: maefast/_library.py refuses those of another one.
extern "C" __attribute__((visibility("default"))) const char* maefast_version() { return MAEFAST_VERSION; }
