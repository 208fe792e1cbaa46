// linear_fwd: y = x W^T + b and, with transposed inputs, its gradients. In fp32, and in bf16 on
// CPUs that multiply pairs of it. In BLIS's words x is A (M x K) and W^T is B (K x N): KC x N of B
// are packed into panels of kNR columns. Each task then packs a block of A, MC x KC, and multiplies
// it by its NC columns.
#include "gelu.h"
#include "isa.h"
#include "product.h"
#include "rows.h"

namespace maefast::cpu {

// Element (i, k) at i * stride + k, or the transpose of that.
struct Matrix {
  const void* data;
  int64_t stride;
  bool transposed;
};

// The micro-tile of AVX-512. Tasks are cut into rows and panels of it on every instruction set.
constexpr int64_t kMR = 8;
constexpr int64_t kNR = 48;

struct LinearFwd {
  Matrix x, weight;         // [M, K], [N, K]
  DType in, out;            // both fp32, or bf16 in and either out
  const float* bias;        // [N] or null
  void* y;                  // [M, N]
  float* packed = nullptr;  // B at [first, first + KC) of K, in panels [words of KC][padded]
  int64_t M, N, first = 0, KC = 0;
  int64_t row_tasks = 1, column_tasks = 1;
  bool gelu = false;  // true with the last KC of K
};

namespace MAEFAST_ISA {
namespace {

inline int64_t count_row_tiles(const LinearFwd& args) { return (args.M + kMR - 1) / kMR; }

inline int64_t count_panels(const LinearFwd& args) { return (args.N + kNR - 1) / kNR; }

inline int64_t lesser(int64_t n, int64_t most) { return n < most ? n : most; }

// The start of part i when n is cut into `parts` even parts.
inline int64_t part_begin(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

template <bool kPairs>
constexpr int64_t count_words(int64_t values) {
  return kPairs ? (values + 1) / 2 : values;
}

// Packs `depth` values from `first` on of `count` rows from `row` on, as rows of words; of a
// transposed matrix as columns.
template <bool kPairs, typename In>
void pack_block(const Matrix& m, int64_t row, int64_t count, int64_t first, int64_t depth, float* out, int64_t stride) {
  const In* data = static_cast<const In*>(m.data);
  if (m.transposed) {
    pack_b<kPairs>(data + first * m.stride + row, m.stride, depth, count, out, stride);
  } else {
    pack_a<kPairs>(data + row * m.stride + first, m.stride, count, depth, out, stride);
  }
}

// Adds micro-tiles of a panel to y or, with the first KC of K, to the bias, and applies GELU.
template <typename Out, bool kGelu>
struct LinearEpilogue {
  const float* product;  // [MC][padded]
  int64_t padded, columns, stride;
  Out* y;
  const float* bias;
  bool accumulate;

  // Lines of y arrive from memory while the micro-tile is computed.
  void prefetch(int64_t row, int64_t rows, int64_t column, int64_t vectors) const {
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t v = 0; v < vectors; ++v) __builtin_prefetch(y + i * stride + column + v * kLanes, 1);
    }
  }

  void store(int64_t row, int64_t rows, int64_t column, int64_t vectors) const {
    const int64_t end = lesser(column + vectors * kLanes, columns) - column;
    for (int64_t i = row; i < row + rows; ++i) {
      const float* sums = product + i * padded + column;
      Out* to = y + i * stride + column;
      for_row(end, [&](auto part, int64_t j) {
        Vec sum = load(sums + j);
        if (accumulate) {
          sum += part.load(to + j);
        } else if (bias != nullptr) {
          sum += part.load(bias + column + j);
        }
        if constexpr (kGelu) sum = gelu(sum, compute_tail<sizeof(Out) == 2>(sum));
        part.store(to + j, sum);
      });
    }
  }
};

template <bool kPairs, typename In, typename Out, bool kGelu>
void multiply_blocks(const LinearFwd& args, int64_t begin, int64_t end) {
  const Matrix& x = args.x;
  const int64_t words = count_words<kPairs>(args.KC);
  const int64_t row_tiles = count_row_tiles(args), panels = count_panels(args);
  const int64_t MC = (row_tiles + args.row_tasks - 1) / args.row_tasks * kMR;
  // Rows an odd number of cache lines apart share no set.
  const int64_t row_stride = (round_up(words, kLanes) / kLanes | 1) * kLanes;
  Scratch<float> block(x.transposed ? words * round_up(MC, kLanes) : MC * row_stride);
  Scratch<float> product(MC * kNR);
  int64_t packed_task = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / args.column_tasks, column_task = unit % args.column_tasks;
    const int64_t row = part_begin(row_tiles, args.row_tasks, task) * kMR;
    const int64_t rows = lesser(part_begin(row_tiles, args.row_tasks, task + 1) * kMR, args.M) - row;
    const int64_t stride = x.transposed ? round_up(rows, kLanes) : row_stride;
    if (task != packed_task) pack_block<kPairs, In>(x, row, rows, args.first, args.KC, block, stride);
    packed_task = task;
    const int64_t rs_a = x.transposed ? 1 : stride, cs_a = x.transposed ? stride : 1;
    const int64_t last = part_begin(panels, args.column_tasks, column_task + 1);
    for (int64_t panel = part_begin(panels, args.column_tasks, column_task); panel < last; ++panel) {
      const int64_t column = panel * kNR, columns = lesser(args.N - column, kNR), padded = round_up(columns, kLanes);
      const LinearEpilogue<Out, kGelu> epilogue{
          .product = product,
          .padded = padded,
          .columns = columns,
          .stride = args.N,
          .y = static_cast<Out*>(args.y) + row * args.N + column,
          .bias = args.bias == nullptr ? nullptr : args.bias + column,
          .accumulate = args.first > 0,
      };
      multiply<kPairs>({.a = block,
                        .rs_a = rs_a,
                        .cs_a = cs_a,
                        .b = args.packed + column * words,
                        .rs_b = padded,
                        .c = product,
                        .rs_c = padded,
                        .k = words},
                       rows, padded, epilogue);
    }
  }
}

template <bool kPairs, typename In>
void pack_panels(const LinearFwd& args, int64_t begin, int64_t end) {
  const Matrix& weight = args.weight;
  constexpr int64_t kDepth = 8;  // rows of a transposed weight, read on from panel to panel
  const int64_t step = weight.transposed ? kDepth : args.KC;
  for (int64_t k = 0; k < args.KC; k += step) {
    const int64_t depth = lesser(args.KC - k, step);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kNR, columns = lesser(args.N - column, kNR), padded = round_up(columns, kLanes);
      float* out = args.packed + column * count_words<kPairs>(args.KC) + padded * count_words<kPairs>(k);
      if (weight.transposed) {
        pack_block<kPairs, In>(weight, column, columns, args.first + k, depth, out, padded);
      } else {
        const In* data = static_cast<const In*>(weight.data) + column * weight.stride + args.first;
        pack_b_transposed<kPairs>(data, weight.stride, columns, depth, out);
      }
    }
  }
}

}  // namespace

// Units: panels.
void linear_pack_kernel(const LinearFwd& args, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (args.in == DType::bf16) return pack_panels<true, bf16>(args, begin, end);
#endif
  pack_panels<false, float>(args, begin, end);
}

// Units: tasks of rows times tasks of columns.
void linear_fwd_kernel(const LinearFwd& args, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (args.in == DType::bf16) {
    return args.out == DType::f32 ? multiply_blocks<true, bf16, float, false>(args, begin, end)
           : args.gelu            ? multiply_blocks<true, bf16, bf16, true>(args, begin, end)
                                  : multiply_blocks<true, bf16, bf16, false>(args, begin, end);
  }
#endif
  args.gelu ? multiply_blocks<false, float, float, true>(args, begin, end)
            : multiply_blocks<false, float, float, false>(args, begin, end);
}

}  // namespace MAEFAST_ISA

#ifdef MAEFAST_ENTRY
MAEFAST_DECLARE_KERNEL(linear_pack_kernel, LinearFwd)
MAEFAST_DECLARE_KERNEL(linear_fwd_kernel, LinearFwd)
#endif

}  // namespace maefast::cpu

#ifdef MAEFAST_ENTRY
#include "entry.h"

namespace maefast::cpu {
namespace {

bool is_transposed(const Tensor& t) { return t.dim() == 2 && t.stride(1) != 1 && t.stride(0) == 1; }

// A tensor (..., K) as the rows of a matrix, a transposed one as its columns.
class MatrixInput {
 public:
  MatrixInput(const char* name, const Tensor& t)
      : transposed_(is_transposed(t)), rows_(name, transposed_ ? torch::stable::transpose(t, 0, 1) : t) {}
  Matrix matrix() const { return {rows_.rows.data, rows_.rows.stride, transposed_}; }

 private:
  bool transposed_;
  RowsInput rows_;
};

// A result in fp32 takes K in parts of KC, summed in y. A bf16 result takes all of K at once, in
// smaller blocks of rows: between parts its sums would be rounded to bf16.
struct Blocking {
  int64_t KC, row_tasks, column_tasks;
};

Blocking choose_blocking(const LinearFwd& args, int64_t K) {
  constexpr int64_t kPackedBytes = 12 << 20;           // L3 (16 MiB): the packed weight, KC x N
  constexpr int64_t kBlockBytes = 432 << 10;           // L2 (1 MiB): a block of x, MC x KC
  constexpr int64_t kMostKC = 1024;                    // words; L2: a panel, KC x kNR, is 192 KiB
  constexpr int64_t kMostMC = 144;                     // rows; L1 (32 KiB): MC x kNR sums, 27 KiB
  constexpr int64_t kLeastMC = 24;                     // rows
  constexpr int64_t kStepKC = 128;                     // values; also the least KC
  constexpr int64_t kRowTilesPerThread = 16;           // with fewer, threads share the columns
  const int64_t word = args.in == DType::f32 ? 1 : 2;  // values
  const int64_t row_tiles = scalar::count_row_tiles(args), panels = scalar::count_panels(args);
  Blocking blocking{.KC = K, .row_tasks = 1, .column_tasks = 1};
  if (args.out == DType::f32) {
    const int64_t most = std::clamp<int64_t>(kPackedBytes / (panels * kNR * 4), kStepKC, kMostKC) * word;
    const int64_t parts = (K + most - 1) / most;
    blocking.KC = ((K + parts - 1) / parts + kStepKC - 1) / kStepKC * kStepKC;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = std::clamp<int64_t>(kBlockBytes * word / (4 * kMR * blocking.KC), kLeastMC / kMR, kMostMC / kMR);
  blocking.row_tasks = (row_tiles + tiles - 1) / tiles;
  if (row_tiles >= kRowTilesPerThread * threads) {
    blocking.row_tasks = (blocking.row_tasks + threads - 1) / threads * threads;
  } else {
    blocking.column_tasks = std::min(threads, panels);
  }
  return blocking;
}

// The arithmetic of all tasks as memory traffic that takes as long: four products of words to a
// byte.
int64_t estimate_bytes(const LinearFwd& args) {
  const int64_t words = args.in == DType::f32 ? args.KC : args.KC / 2;
  return args.M * args.N * words / 4;
}

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu,
                  std::optional<ScalarType> dtype) {
  check(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), "x must be (..., in) for a weight (out, in)");
  check(x.scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
  check(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == weight.scalar_type()),
        "bias must be (out,) in the dtype of weight");
  const ScalarType in = x.scalar_type(), out = dtype.value_or(in);
  check(out == in || (out == ScalarType::Float && !gelu), "dtype must be that of x, or float32 without gelu");
  const bool has_kernel = in == ScalarType::Float || (in == ScalarType::BFloat16 && isa() == Isa::avx512bf16);
  if (!has_kernel || x.numel() == 0 || weight.numel() == 0) {
    const Tensor y = call_op("aten::linear", x, weight, bias);
    if (out != in) return torch::stable::to(y, out);
    return gelu ? call_op("aten::gelu", y, std::string("none")) : y;
  }
  const int64_t N = weight.size(0), K = weight.size(1), M = x.numel() / K;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  Tensor y = empty_cpu(IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), out);
  const MatrixInput x_matrix("x", x), weight_matrix("weight", weight);
  const FloatInput bias_values("bias", bias, N);

  LinearFwd args{
      .x = x_matrix.matrix(),
      .weight = weight_matrix.matrix(),
      .in = float_dtype("x", in),
      .out = float_dtype("dtype", out),
      .bias = bias_values.data,
      .y = y.mutable_data_ptr(),
      .M = M,
      .N = N,
  };
  const Blocking blocking = choose_blocking(args, K);
  args.row_tasks = blocking.row_tasks;
  args.column_tasks = blocking.column_tasks;
  const scalar::Scratch<float> packed(scalar::count_panels(args) * kNR * blocking.KC);
  args.packed = packed;
  for (; args.first < K; args.first += blocking.KC) {
    args.KC = std::min(blocking.KC, K - args.first);
    args.gelu = gelu && args.first + args.KC == K;
    run(MAEFAST_KERNEL(linear_pack_kernel), args, scalar::count_panels(args), kNR * args.KC * 8);
    const int64_t tasks = args.row_tasks * args.column_tasks;
    run(MAEFAST_KERNEL(linear_fwd_kernel), args, tasks, estimate_bytes(args) / tasks);
  }
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) { m.impl("linear_fwd", TORCH_BOX(&linear_fwd)); }

}  // namespace
}  // namespace maefast::cpu
#endif
