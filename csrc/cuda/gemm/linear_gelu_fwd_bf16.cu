#include "multiply.cuh"

template cudaError_t maefast::cuda::gemm::multiply<maefast::cuda::gemm::Epilogue::gelu, maefast::cuda::DType::bf16>(
    const maefast::cuda::gemm::Multiply&, cudaStream_t);
