// The dtypes that kernels on the CPU and on GPUs take.
#pragma once

namespace maefast {

enum class DType { f32, bf16, f16, u8 };

}  // namespace maefast
