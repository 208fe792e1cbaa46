#include "multiply.cuh"

namespace maefast::cuda::gemm {

template cudaError_t multiply<Epilogue::gelu, DType::bf16>(const Multiply&, cudaStream_t);

}  // namespace maefast::cuda::gemm
