// linear: a matrix product with bias in fp32, as fast as oneDNN's on CPUs that MKL slows down, and as accurate as MKL's: the
// summed dimension goes in short parts, where oneDNN makes chains of a thousand additions.
//
// The weight is packed into panels of columns that lie together in memory, a few MB of it at a time; then a task is a block of
// rows times some panels, with its part of x packed for the first caches.
#include "gelu.h"
#include "isa.h"
#include "product.h"

namespace maefast::cpu {

// Element (i, k) at i * stride + k, or the transpose of that.
struct Matrix {
  const float* data;
  int64_t stride;
  bool transposed;
};

struct LinearFwd {
  Matrix x, weight;   // [rows, K], [columns, K]
  const float* bias;  // [columns] or null
  float* y;           // [rows, columns]
  float* packed;      // the weight's columns [first, first + depth), in panels [depth][a panel's columns, padded]
  int64_t rows, columns, first, depth, panels_per_task;
  bool gelu;  // of the whole sum, when the last part of it is stored
};

constexpr int64_t kPanel = 48;   // columns: vectors of every width, in tiles that fill the registers
constexpr int64_t kRows = 144;   // of a task: whole tiles
constexpr int64_t kDepth = 768;  // at a time: a task's part of x stays in the second cache

namespace MAEFAST_ISA {
namespace {

inline int64_t lesser(int64_t n, int64_t most) { return n < most ? n : most; }

// A panel of the product into y: on top of what is there, or of the bias, if there is one; through GELU where it is the last
// part.
template <bool kGelu>
inline void store_panel(const float* product, const LinearFwd& args, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const bool more = args.first > 0;
  for (int64_t i = 0; i < rows; ++i, product += round_up(columns, kLanes)) {
    float* y = args.y + (row + i) * args.columns + column;
    const float* onto = more ? y : args.bias == nullptr ? nullptr : args.bias + column;
    int64_t j = 0;
    const auto finished = [](Vec v) {
      if constexpr (kGelu) return gelu(v, tail_of<false>(v));
      return v;
    };
    for (; j + kLanes <= columns; j += kLanes)
      store(y + j, finished(onto == nullptr ? load(product + j) : load(product + j) + load(onto + j)));
    if (j == columns) continue;
    const Vec last = onto == nullptr ? load(product + j) : load(product + j) + load_first(onto + j, columns - j);
    store_first(y + j, finished(last), columns - j);
  }
}

}  // namespace

// Units: panels.
void linear_pack_kernel(const LinearFwd& args, int64_t begin, int64_t end) {
  const Matrix& weight = args.weight;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kPanel, columns = lesser(args.columns - column, kPanel);
    float* out = args.packed + column * args.depth;
    if (weight.transposed) {
      pack_rows<false>(weight.data + args.first * weight.stride + column, weight.stride, args.depth, columns, out,
                       round_up(columns, kLanes));
    } else {
      pack_columns<false>(weight.data + column * weight.stride + args.first, weight.stride, columns, args.depth, out);
    }
  }
}

// Units: blocks of kRows rows times panels_per_task panels.
void linear_fwd_kernel(const LinearFwd& args, int64_t begin, int64_t end) {
  const Matrix& x = args.x;
  const int64_t depth = args.depth, task_columns = args.panels_per_task * kPanel;
  const int64_t tasks = (args.columns + task_columns - 1) / task_columns;
  Scratch<float> block(round_up(kRows, kLanes) * round_up(depth, kLanes)), product(kRows * kPanel);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / tasks * kRows, rows = lesser(args.rows - row, kRows);
    const int64_t stride = round_up(x.transposed ? rows : depth, kLanes);
    if (x.transposed) {
      pack_rows<false>(x.data + args.first * x.stride + row, x.stride, depth, rows, block, stride);
    } else {
      pack_rows<false>(x.data + row * x.stride + args.first, x.stride, rows, depth, block, stride);
    }
    const int64_t a_row = x.transposed ? 1 : stride, a_depth = x.transposed ? stride : 1;
    const int64_t from = unit % tasks * task_columns, to = lesser(from + task_columns, args.columns);
    for (int64_t column = from; column < to; column += kPanel) {
      const int64_t columns = lesser(to - column, kPanel), padded = round_up(columns, kLanes);
      multiply<false>({block, a_row, a_depth, args.packed + column * depth, padded, product, padded, depth, false}, rows, padded);
      args.gelu ? store_panel<true>(product, args, row, rows, column, columns)
                : store_panel<false>(product, args, row, rows, column, columns);
    }
  }
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
  Matrix matrix() const { return {static_cast<const float*>(rows_.rows.data), rows_.rows.stride, transposed_}; }

 private:
  bool transposed_;
  RowsInput rows_;
};

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  check(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == weight.size(1), "x must be (..., in) for a weight (out, in)");
  check(x.scalar_type() == weight.scalar_type(), "x must have the dtype of weight");
  check(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == weight.scalar_type()),
        "bias must be (out,) in the dtype of weight");
  if (x.scalar_type() != ScalarType::Float || x.numel() == 0 || weight.numel() == 0) {
    const Tensor y = call_op("aten::linear", x, weight, bias);  // oneDNN's, for 16 bits as fast as can be
    return gelu ? call_op("aten::gelu", y, std::string("none")) : y;
  }
  const int64_t columns = weight.size(0), K = weight.size(1), rows = x.numel() / K;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  Tensor y = empty_cpu(IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), ScalarType::Float);
  const MatrixInput x_matrix("x", x), weight_matrix("weight", weight);
  const FloatInput bias_values("bias", bias ? *bias : y, bias ? columns : y.numel());

  constexpr int64_t kPacked = 8 << 20, kPart = 64, kPanelsPerTask = 11;
  const int64_t panels = (columns + kPanel - 1) / kPanel, depth_bytes = panels * kPanel * 4;
  const int64_t chunk = std::min(K, std::clamp<int64_t>(kPacked / depth_bytes / kPart * kPart, kPart, kDepth));
  const int64_t column_tasks = (panels + kPanelsPerTask - 1) / kPanelsPerTask;
  const scalar::Scratch<float> packed(panels * kPanel * chunk);
  LinearFwd args{x_matrix.matrix(),
                 weight_matrix.matrix(),
                 bias ? bias_values.data : nullptr,
                 static_cast<float*>(y.mutable_data_ptr()),
                 packed,
                 rows,
                 columns,
                 0,
                 0,
                 (panels + column_tasks - 1) / column_tasks,
                 false};
  const int64_t row_tasks = (rows + kRows - 1) / kRows;
  for (; args.first < K; args.first += chunk) {
    args.depth = std::min(chunk, K - args.first);
    args.gelu = gelu && args.first + args.depth == K;
    run(MAEFAST_KERNEL(linear_pack_kernel), args, panels, kPanel * args.depth * 8);
    run(MAEFAST_KERNEL(linear_fwd_kernel), args, row_tasks * column_tasks, kRows * args.depth * 8);
  }
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(maefast, CPU, m) { m.impl("linear_fwd", TORCH_BOX(&linear_fwd)); }

}  // namespace
}  // namespace maefast::cpu
#endif
