// The products of multiply.h as CUTLASS collectives. The problem is transposed: features are M,
// rows are N. The bias then has one value for each row of the accumulator, and y is column-major,
// so that the features of a token are adjacent in memory. Two tiles of 128 x 128 x 64 alternate on
// a multiprocessor (ping-pong): the epilogue of one overlaps the products of the other.
//
// NDEBUG must be defined: an assert in a kernel is a function call, which makes the compiler wait
// for each wgmma (C7510).
#pragma once

#ifndef NDEBUG
#error "csrc/cuda/gemm must be compiled with NDEBUG"
#endif

#include <algorithm>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "gelu.h"
#include "multiply.h"

namespace maefast::cuda::gemm {

// The functions of gelu.h on what CUTLASS hands to an epilogue, fp32 values or arrays of them.
template <typename T>
struct Gelu {
  CUTLASS_DEVICE T operator()(T const& v) const {
    if constexpr (std::is_same_v<T, float>) {
      return gelu(v);
    } else {
      T out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < T::kElements; ++i) out[i] = gelu(v[i]);
      return out;
    }
  }
};

template <typename T>
struct GeluSlope {
  CUTLASS_DEVICE T operator()(T const& product, T const& v) const {
    if constexpr (std::is_same_v<T, float>) {
      return product * gelu_slope(v);
    } else {
      T out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < T::kElements; ++i) out[i] = product[i] * gelu_slope(v[i]);
      return out;
    }
  }
};

namespace fusion = cutlass::epilogue::fusion;
namespace collective = cutlass::epilogue::collective;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
using Schedule = cutlass::epilogue::TmaWarpSpecialized;
static_assert(cute::size<0>(Tile{}) == kTileSide && cute::size<1>(Tile{}) == kTileSide);

// What follows the product, as CUTLASS's tree of operations.
template <Epilogue epilogue, typename Value>
struct Fused {
  using Type = fusion::ScaledAcc<Value, float>;
};

template <typename Value>
struct Fused<Epilogue::bias, Value> {
  using Type = fusion::LinCombPerRowBias<Value, float, float, void>;
};

template <typename Value>
struct Fused<Epilogue::gelu, Value> {
  using Type = fusion::LinCombPerRowBiasEltActAux<ColumnMajor, Gelu, Value, float, Value, float, void>;
};

// Each tile writes its part of the sum over tokens. CUTLASS's LinCombDeEltActDePerRowBias finishes
// the sum inside the kernel, which took twice the time on an H200. Tokens past the last add zero.
template <typename Value>
struct Fused<Epilogue::gelu_slope, Value> {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  static constexpr bool kMayBeNull = true, kAcrossTiles = false, kCompare = false;
  using Descriptor = collective::detail::EpilogueDescriptor<Tile, collective::EpilogueTileAuto, void, Value, Schedule>;
  using HiddenDescriptor = collective::detail::AuxLoadDescriptor<Descriptor, ColumnMajor, Value>;
  using Hidden =
      fusion::Sm90AuxLoad<HiddenDescriptor::Stages, typename Descriptor::EpilogueTile, Value, typename HiddenDescriptor::Stride,
                          typename HiddenDescriptor::SmemLayoutAtom, typename HiddenDescriptor::CopyOpS2R>;
  using Product = fusion::Sm90EVT<fusion::Sm90Compute<GeluSlope, float, float, kRound>, fusion::Sm90AccFetch, Hidden>;
  using Sum = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRound,
                                       cute::Stride<cute::_1, cute::_0, int64_t>, 4, kMayBeNull, kAcrossTiles, kCompare>;
  using Type = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Value, float, kRound>,
                               fusion::Sm90EVT<Sum, Product>>;
};

template <Epilogue epilogue, DType dtype>
struct Gemm {
  using Value = std::conditional_t<dtype == DType::bf16, cutlass::bfloat16_t, cutlass::half_t>;
  static constexpr bool kForward = epilogue == Epilogue::bias || epilogue == Epilogue::gelu;

  using CollectiveEpilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, collective::EpilogueTileAuto, float, float, void,
      ColumnMajor, kMultiple, Value, ColumnMajor, kMultiple, Schedule, typename Fused<epilogue, Value>::Type>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Value, std::conditional_t<kForward, RowMajor, ColumnMajor>, kMultiple,
      Value, ColumnMajor, kMultiple, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;
};

// Whether the driver encoded the descriptor of a tensor. CUTLASS leaves zeros and continues
// otherwise.
template <typename Copy>
bool is_described(const Copy& copy) {
  const auto* words = reinterpret_cast<const uint64_t*>(copy.get_tma_descriptor());
  return std::any_of(words, words + sizeof(*copy.get_tma_descriptor()) / sizeof(*words), [](uint64_t word) { return word != 0; });
}

template <Epilogue epilogue, DType dtype>
cudaError_t multiply(const Multiply& args, cudaStream_t stream) {
  using Types = Gemm<epilogue, dtype>;
  using Kernel = typename Types::Kernel;
  using Value = typename Types::Value;
  constexpr cute::Int<1> kDense{};
  const int64_t no_batch = 0, features = args.features;
  typename Kernel::Arguments problem{cutlass::gemm::GemmUniversalMode::kGemm, {args.features, args.rows, args.depth, 1}};
  problem.mainloop.ptr_A = static_cast<const Value*>(args.weight.data);
  if constexpr (Types::kForward) {
    problem.mainloop.dA = cute::make_stride(args.weight.stride, kDense, no_batch);
  } else {
    problem.mainloop.dA = cute::make_stride(kDense, args.weight.stride, no_batch);
  }
  problem.mainloop.ptr_B = static_cast<const Value*>(args.x.data);
  problem.mainloop.dB = cute::make_stride(args.x.stride, kDense, no_batch);
  problem.epilogue.ptr_D = static_cast<Value*>(args.y);
  problem.epilogue.dD = cute::make_stride(kDense, features, no_batch);
  auto& fused = problem.epilogue.thread;
  auto* hidden = static_cast<Value*>(args.hidden);
  if constexpr (Types::kForward) fused.bias_ptr = args.bias;
  if constexpr (epilogue == Epilogue::gelu) {
    fused.aux_ptr = hidden;
    fused.dAux = problem.epilogue.dD;
  }
  if constexpr (epilogue == Epilogue::gelu_slope) {
    fused = {{{{}, {hidden, Value(0), problem.epilogue.dD}, {}}, {args.sums, 0.0f, {}}}, {}};  // operands before operations
  }
  problem.hw_info.sm_count = args.processors;
  problem.scheduler.max_swizzle_size = 1;
  problem.scheduler.raster_order = decltype(problem.scheduler.raster_order)::AlongM;  // neighbours share the rows of x

  // These collectives need no workspace: no split along the depth, no reduction across tiles.
  if (!Kernel::can_implement(problem) || Kernel::get_workspace_size(problem) != 0) return cudaErrorInvalidValue;
  typename Kernel::Params params = Kernel::to_underlying_arguments(problem, nullptr);
  if (!is_described(params.mainloop.tma_load_a) || !is_described(params.mainloop.tma_load_b) ||
      !is_described(params.epilogue.tma_store_d)) {
    return cudaErrorNotSupported;
  }
  const auto kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize)) {
    return error;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
  cudaLaunchConfig_t config{
      Kernel::get_grid_shape(params), Kernel::get_block_shape(), Kernel::SharedStorageSize, stream, &cluster, 1};
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace maefast::cuda::gemm
