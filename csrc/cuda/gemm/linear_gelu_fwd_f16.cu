#include "multiply.cuh"

template cudaError_t maefast::cuda::gemm::multiply<maefast::cuda::gemm::Epilogue::gelu, maefast::cuda::DType::f16>(
    const maefast::cuda::gemm::Multiply&, cudaStream_t);
