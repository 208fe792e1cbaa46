// linear_fwd: y = x W^T + b, and of the same kernel, with transposed inputs, its gradients. In fp32, and in bf16 where the CPU
// multiplies pairs of it. The weight is packed into panels of columns that lie together in memory; then a task is a block of rows
// times some panels, with its part of x packed for the second cache.
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

constexpr int64_t kPanel = 48;  // columns: vectors of every width, in tiles that fill the registers
constexpr int64_t kTile = 8;    // rows: tasks are cut there

struct LinearFwd {
  Matrix x, weight;   // [rows, K], [columns, K]
  DType in, out;      // both fp32, or bf16 in and either out
  const float* bias;  // [columns] or null
  void* y;            // [rows, columns]
  float* packed;      // the weight's values [first, first + depth) of K, in panels [words][a panel's columns, padded]
  int64_t rows, columns, first, depth;
  int64_t row_tasks, column_tasks;
  bool gelu;  // of the whole sum, when the last part of it is stored
};

namespace MAEFAST_ISA {
namespace {

inline int64_t row_tiles_of(const LinearFwd& args) { return (args.rows + kTile - 1) / kTile; }

inline int64_t panels_of(const LinearFwd& args) { return (args.columns + kPanel - 1) / kPanel; }

inline int64_t lesser(int64_t n, int64_t most) { return n < most ? n : most; }

// Where part i of `parts` even ones of n begins.
inline int64_t part_begin(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

template <bool kPairs>
constexpr int64_t words_of(int64_t values) {
  return kPairs ? (values + 1) / 2 : values;
}

// `count` rows of a matrix from `row` on, `depth` values of each from `first` on, as A of a product.
template <bool kPairs, typename In>
void pack_block(const Matrix& m, int64_t row, int64_t count, int64_t first, int64_t depth, float* out, int64_t stride) {
  const In* data = static_cast<const In*>(m.data);
  if (m.transposed) {
    pack_summed<kPairs>(data + first * m.stride + row, m.stride, depth, count, out, stride);
  } else {
    pack_rows<kPairs>(data + row * m.stride + first, m.stride, count, depth, out, stride);
  }
}

// Stores finished tiles of a panel in y: on top of what is there, or of the bias, if there is one; through GELU where the sum is
// whole.
template <typename Out, bool kGelu>
struct StoreTiles {
  const float* product;  // [rows][padded]
  int64_t padded, columns, stride;
  Out* y;
  const float* bias;
  bool more;

  // The lines of y come from memory while the tile is computed.
  void before(int64_t row, int64_t rows, int64_t column, int64_t vectors) const {
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t v = 0; v < vectors; ++v) __builtin_prefetch(y + i * stride + column + v * kLanes, 1);
    }
  }

  void after(int64_t row, int64_t rows, int64_t column, int64_t vectors) const {
    const int64_t end = lesser(column + vectors * kLanes, columns) - column;
    for (int64_t i = row; i < row + rows; ++i) {
      const float* sums = product + i * padded + column;
      Out* to = y + i * stride + column;
      for_row(end, [&](auto part, int64_t j) {
        Vec sum = load(sums + j);
        if (more) {
          sum += part.load(to + j);
        } else if (bias != nullptr) {
          sum += part.load(bias + column + j);
        }
        if constexpr (kGelu) sum = gelu(sum, tail_of<sizeof(Out) == 2>(sum));
        part.store(to + j, sum);
      });
    }
  }
};

template <bool kPairs, typename In, typename Out, bool kGelu>
void multiply_tasks(const LinearFwd& args, int64_t begin, int64_t end) {
  const Matrix& x = args.x;
  const int64_t words = words_of<kPairs>(args.depth);
  const int64_t row_tiles = row_tiles_of(args), panels = panels_of(args);
  const int64_t most_rows = (row_tiles + args.row_tasks - 1) / args.row_tasks * kTile;
  // Rows an odd number of cache lines apart share no set.
  const int64_t row_stride = (round_up(words, kLanes) / kLanes | 1) * kLanes;
  Scratch<float> block(x.transposed ? words * round_up(most_rows, kLanes) : most_rows * row_stride);
  Scratch<float> product(most_rows * kPanel);
  int64_t packed_task = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t task = unit / args.column_tasks, column_task = unit % args.column_tasks;
    const int64_t row = part_begin(row_tiles, args.row_tasks, task) * kTile;
    const int64_t rows = lesser(part_begin(row_tiles, args.row_tasks, task + 1) * kTile, args.rows) - row;
    const int64_t stride = x.transposed ? round_up(rows, kLanes) : row_stride;
    if (task != packed_task) pack_block<kPairs, In>(x, row, rows, args.first, args.depth, block, stride);
    packed_task = task;
    const int64_t a_row = x.transposed ? 1 : stride, a_depth = x.transposed ? stride : 1;
    const int64_t last = part_begin(panels, args.column_tasks, column_task + 1);
    for (int64_t panel = part_begin(panels, args.column_tasks, column_task); panel < last; ++panel) {
      const int64_t column = panel * kPanel, columns = lesser(args.columns - column, kPanel), padded = round_up(columns, kLanes);
      const StoreTiles<Out, kGelu> finish{product,
                                          padded,
                                          columns,
                                          args.columns,
                                          static_cast<Out*>(args.y) + row * args.columns + column,
                                          args.bias == nullptr ? nullptr : args.bias + column,
                                          args.first > 0};
      multiply<kPairs>({block, a_row, a_depth, args.packed + column * words, padded, product, padded, words, false}, rows, padded,
                       finish);
    }
  }
}

template <bool kPairs, typename In>
void pack_panels(const LinearFwd& args, int64_t begin, int64_t end) {
  const Matrix& weight = args.weight;
  constexpr int64_t kDepth = 8;  // of a transposed weight at a time: its rows are read on from panel to panel
  const int64_t step = weight.transposed ? kDepth : args.depth;
  for (int64_t k = 0; k < args.depth; k += step) {
    const int64_t depth = lesser(args.depth - k, step);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel, columns = lesser(args.columns - column, kPanel), padded = round_up(columns, kLanes);
      float* out = args.packed + column * words_of<kPairs>(args.depth) + padded * words_of<kPairs>(k);
      if (weight.transposed) {
        pack_block<kPairs, In>(weight, column, columns, args.first + k, depth, out, padded);
      } else {
        const In* data = static_cast<const In*>(weight.data) + column * weight.stride + args.first;
        pack_columns<kPairs>(data, weight.stride, columns, depth, out);
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
    return args.out == DType::f32 ? multiply_tasks<true, bf16, float, false>(args, begin, end)
           : args.gelu            ? multiply_tasks<true, bf16, bf16, true>(args, begin, end)
                                  : multiply_tasks<true, bf16, bf16, false>(args, begin, end);
  }
#endif
  args.gelu ? multiply_tasks<false, float, float, true>(args, begin, end)
            : multiply_tasks<false, float, float, false>(args, begin, end);
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

// How the work is cut. The sums of fp32 results may go through y in several parts of K; rounded to bf16 between them they would
// lose what fp32 keeps, so those take all of K at once, in smaller blocks of rows.
struct Cut {
  int64_t depth, row_tasks, column_tasks;
};

Cut cut(const LinearFwd& args, int64_t K) {
  constexpr int64_t kPart = 128, kPacked = 12 << 20, kBlock = 432 << 10, kMostDepth = 1024, kMostTiles = 18, kEven = 16;
  const int64_t word = args.in == DType::f32 ? 1 : 2;  // values
  const int64_t row_tiles = scalar::row_tiles_of(args), panels = scalar::panels_of(args);
  Cut to{K, 1, 1};
  if (args.out == DType::f32) {
    const int64_t most = std::clamp<int64_t>(kPacked / (panels * kPanel * 4), kPart, kMostDepth) * word;
    const int64_t parts = (K + most - 1) / most;
    to.depth = ((K + parts - 1) / parts + kPart - 1) / kPart * kPart;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = std::clamp<int64_t>(kBlock * word / (4 * kTile * to.depth), 3, kMostTiles);
  to.row_tasks = (row_tiles + tiles - 1) / tiles;
  if (row_tiles >= kEven * threads) {
    to.row_tasks = (to.row_tasks + threads - 1) / threads * threads;
  } else {
    to.column_tasks = std::min(threads, panels);
  }
  return to;
}

// The arithmetic of all tasks as memory traffic that takes as long: four products of words to a byte.
int64_t bytes_of_products(const LinearFwd& args) {
  const int64_t words = args.in == DType::f32 ? args.depth : args.depth / 2;
  return args.rows * args.columns * words / 4;
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
  const int64_t columns = weight.size(0), K = weight.size(1), rows = x.numel() / K;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  Tensor y = empty_cpu(IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), out);
  const MatrixInput x_matrix("x", x), weight_matrix("weight", weight);
  const FloatInput bias_values("bias", bias, columns);

  LinearFwd args{x_matrix.matrix(),
                 weight_matrix.matrix(),
                 float_dtype("x", in),
                 float_dtype("dtype", out),
                 bias_values.data,
                 y.mutable_data_ptr(),
                 nullptr,
                 rows,
                 columns,
                 0,
                 0,
                 1,
                 1,
                 false};
  const Cut parts = cut(args, K);
  args.row_tasks = parts.row_tasks;
  args.column_tasks = parts.column_tasks;
  const scalar::Scratch<float> packed(scalar::panels_of(args) * kPanel * parts.depth);
  args.packed = packed;
  for (; args.first < K; args.first += parts.depth) {
    args.depth = std::min(parts.depth, K - args.first);
    args.gelu = gelu && args.first + args.depth == K;
    run(MAEFAST_KERNEL(linear_pack_kernel), args, scalar::panels_of(args), kPanel * args.depth * 8);
    const int64_t tasks = args.row_tasks * args.column_tasks;
    run(MAEFAST_KERNEL(linear_fwd_kernel), args, tasks, bytes_of_products(args) / tasks);
  }
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) { m.impl("linear_fwd", TORCH_BOX(&linear_fwd)); }

}  // namespace
}  // namespace maefast::cpu
#endif
