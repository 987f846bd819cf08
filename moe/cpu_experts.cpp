// The routed experts of one layer on a CPU: the loops of cpu_experts.py with the passes between products fused.
//
// Products are torch's own (at::mm_out). What is written here is what lies between them: rows are gathered and added
// with the next ones prefetched, and the activation, the gate and all their gradients take one pass over memory each.
// Nothing here decides anything: cpu_experts.py allocates by the same rules and gives the same result within rounding.
//
// Shape letters as there: N tokens, R rows, r rows of one expert, D model width, F expert width, E experts.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

namespace {

using at::Tensor;
template <typename T>
using Vec = at::vec::Vectorized<T>;

constexpr int64_t kCacheLine = 64;
constexpr int64_t kRowsAhead = 2;  // of a row in use, the one to fetch: rows of a token lie anywhere in memory
constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// Rows one cache line longer than their content. Widths are powers of two, and at such strides the rows of a block
// compete for the same few sets of the cache: products of padded rows are up to a tenth faster.
Tensor padded_rows(const Tensor& like, int64_t rows, int64_t width) {
  const int64_t padding = kCacheLine / like.element_size();
  return at::empty({rows, width + padding}, like.options()).narrow(1, 0, width);
}

template <typename T>
void prefetch_row(const T* row, int64_t width) {
#if defined(__GNUC__) || defined(__clang__)
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += kCacheLine) __builtin_prefetch(bytes + i);
#endif
}

template <typename T>
void gather_rows(const T* x_ND, const int64_t* tokens_r, int64_t rows, int64_t width, T* out, int64_t stride) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (r + kRowsAhead < end) prefetch_row(x_ND + tokens_r[r + kRowsAhead] * width, width);
      std::memcpy(out + r * stride, x_ND + tokens_r[r] * width, width * sizeof(T));
    }
  });
}

// Threads share the columns, not the rows: no two write to one element, and every sum has one order.
template <typename T>
void add_rows(T* y_ND, const int64_t* tokens_r, int64_t rows, int64_t width, const T* rows_rD, int64_t stride) {
  at::parallel_for(0, width, std::max<int64_t>(kCacheLine, kGrain / rows), [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; ++r) {
      if (r + kRowsAhead < rows) prefetch_row(y_ND + tokens_r[r + kRowsAhead] * width + begin, end - begin);
      T* y = y_ND + tokens_r[r] * width;
      const T* row = rows_rD + r * stride;
      for (int64_t i = begin; i < end; i += Vec<T>::size()) {
        const int64_t n = std::min<int64_t>(Vec<T>::size(), end - i);
        (Vec<T>::loadu(y + i, n) + Vec<T>::loadu(row + i, n)).store(y + i, n);
      }
    }
  });
}

// active = gate weight * silu(gate) * up
template <typename T>
void activate(const Tensor& gate_up_r2F, const T* gates_r, const Tensor& active_rF) {
  const int64_t rows = active_rF.size(0), width = active_rF.size(1);
  const int64_t in_stride = gate_up_r2F.stride(0), out_stride = active_rF.stride(0);
  const T* in = gate_up_r2F.const_data_ptr<T>();
  T* out = active_rF.data_ptr<T>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    const Vec<T> one(1);
    for (int64_t r = begin; r < end; ++r) {
      const T *gate = in + r * in_stride, *up = gate + width;
      const Vec<T> weight(gates_r[r]);
      for (int64_t i = 0; i < width; i += Vec<T>::size()) {
        const int64_t n = std::min<int64_t>(Vec<T>::size(), width - i);
        const auto g = Vec<T>::loadu(gate + i, n);
        (g / (one + g.neg().exp()) * Vec<T>::loadu(up + i, n) * weight).store(out + r * out_stride + i, n);
      }
    }
  });
}

// In: the gradient of the weighted activation, in `active_rF`. Out: there the weighted activation itself, the gradient
// of gate and up in `d_inner_r2F`, and that of the gate weight, the product of gradient and activation.
template <typename T>
void activate_backward(
    const Tensor& gate_up_r2F, const T* gates_r, const Tensor& active_rF, const Tensor& d_inner_r2F, T* d_gates_r) {
  const int64_t rows = active_rF.size(0), width = active_rF.size(1);
  const int64_t in_stride = gate_up_r2F.stride(0), active_stride = active_rF.stride(0);
  const int64_t inner_stride = d_inner_r2F.stride(0);
  const T* in = gate_up_r2F.const_data_ptr<T>();
  T *active = active_rF.data_ptr<T>(), *d_inner = d_inner_r2F.data_ptr<T>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    const Vec<T> one(1);
    for (int64_t r = begin; r < end; ++r) {
      const T *gate = in + r * in_stride, *up = gate + width;
      T *a = active + r * active_stride, *d_gate = d_inner + r * inner_stride, *d_up = d_gate + width;
      const Vec<T> weight(gates_r[r]);
      Vec<T> products(0);
      for (int64_t i = 0; i < width; i += Vec<T>::size()) {
        const int64_t n = std::min<int64_t>(Vec<T>::size(), width - i);
        const auto g = Vec<T>::loadu(gate + i, n), u = Vec<T>::loadu(up + i, n), da = Vec<T>::loadu(a + i, n);
        const auto sigmoid = one / (one + g.neg().exp());
        const auto silu = g * sigmoid;
        const auto unweighted = silu * u, d_weighted = da * weight;
        products = products + unweighted * da;
        (unweighted * weight).store(a + i, n);
        (d_weighted * silu).store(d_up + i, n);
        (d_weighted * u * (sigmoid + silu * (one - sigmoid))).store(d_gate + i, n);
      }
      T lanes[Vec<T>::size()];
      products.store(lanes);
      T sum = 0;
      for (const T lane : lanes) sum += lane;
      d_gates_r[r] = sum;
    }
  });
}

int64_t largest(at::IntArrayRef counts) {
  return counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
}

// y [N, D], and the input of the activation [R, 2F] if `keep`.
std::tuple<Tensor, Tensor> experts_forward(
    const Tensor& x_ND, const Tensor& gates_R, const Tensor& gate_up, const Tensor& down, const Tensor& token_of_row_R,
    at::IntArrayRef counts, bool keep) {
  const int64_t width = x_ND.size(1), intermediate = down.size(1), most = largest(counts);
  const Tensor gathered = padded_rows(x_ND, most, width), outputs = padded_rows(x_ND, most, width);
  const Tensor active = padded_rows(x_ND, most, intermediate);
  const Tensor kept = padded_rows(x_ND, keep ? token_of_row_R.size(0) : most, 2 * intermediate);
  Tensor y_ND = at::zeros_like(x_ND, at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES(x_ND.scalar_type(), "experts_forward", [&] {
    const auto* tokens_R = token_of_row_R.const_data_ptr<int64_t>();
    int64_t start = 0;
    for (int64_t expert = 0; expert < static_cast<int64_t>(counts.size()); start += counts[expert++]) {
      const int64_t rows = counts[expert];
      if (rows == 0) continue;
      const auto *tokens_r = tokens_R + start;
      Tensor x_r = gathered.narrow(0, 0, rows), y_r = outputs.narrow(0, 0, rows), a_r = active.narrow(0, 0, rows);
      Tensor gate_up_r = kept.narrow(0, keep ? start : 0, rows);
      gather_rows(x_ND.const_data_ptr<scalar_t>(), tokens_r, rows, width, x_r.data_ptr<scalar_t>(), x_r.stride(0));
      at::mm_out(gate_up_r, x_r, gate_up[expert]);
      activate(gate_up_r, gates_R.const_data_ptr<scalar_t>() + start, a_r);
      at::mm_out(y_r, a_r, down[expert]);
      add_rows(y_ND.data_ptr<scalar_t>(), tokens_r, rows, width, y_r.const_data_ptr<scalar_t>(), y_r.stride(0));
    }
  });
  return {y_ND, kept};
}

// Gradients of x [N, D], gates [R], gate_up and down.
std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& dy_ND, const Tensor& x_ND, const Tensor& gates_R, const Tensor& gate_up, const Tensor& down,
    const Tensor& token_of_row_R, at::IntArrayRef counts, const Tensor& kept) {
  const int64_t width = x_ND.size(1), intermediate = down.size(1), most = largest(counts);
  const Tensor gathered = padded_rows(x_ND, most, width), moved = padded_rows(x_ND, most, width);
  const Tensor active = padded_rows(x_ND, most, intermediate), inner = padded_rows(x_ND, most, 2 * intermediate);
  Tensor dx_ND = at::zeros_like(x_ND, at::MemoryFormat::Contiguous), d_gates_R = at::empty_like(gates_R);
  Tensor d_gate_up = at::empty_like(gate_up), d_down = at::empty_like(down);
  AT_DISPATCH_FLOATING_TYPES(x_ND.scalar_type(), "experts_backward", [&] {
    const auto* tokens_R = token_of_row_R.const_data_ptr<int64_t>();
    int64_t start = 0;
    for (int64_t expert = 0; expert < static_cast<int64_t>(counts.size()); start += counts[expert++]) {
      const int64_t rows = counts[expert];
      Tensor d_gate_up_e = d_gate_up[expert], d_down_e = d_down[expert];
      if (rows == 0) {
        d_gate_up_e.zero_();
        d_down_e.zero_();
        continue;
      }
      const auto *tokens_r = tokens_R + start;
      Tensor rows_r = gathered.narrow(0, 0, rows), dx_r = moved.narrow(0, 0, rows);
      Tensor a_r = active.narrow(0, 0, rows), d_inner_r = inner.narrow(0, 0, rows);
      auto* out = rows_r.data_ptr<scalar_t>();
      gather_rows(dy_ND.const_data_ptr<scalar_t>(), tokens_r, rows, width, out, rows_r.stride(0));
      at::mm_out(a_r, rows_r, down[expert].t());
      activate_backward(
          kept.narrow(0, start, rows), gates_R.const_data_ptr<scalar_t>() + start, a_r, d_inner_r,
          d_gates_R.data_ptr<scalar_t>() + start);
      at::mm_out(d_down_e, a_r.t(), rows_r);
      gather_rows(x_ND.const_data_ptr<scalar_t>(), tokens_r, rows, width, out, rows_r.stride(0));
      at::mm_out(d_gate_up_e, rows_r.t(), d_inner_r);
      at::mm_out(dx_r, d_inner_r, gate_up[expert].t());
      add_rows(dx_ND.data_ptr<scalar_t>(), tokens_r, rows, width, dx_r.const_data_ptr<scalar_t>(), dx_r.stride(0));
    }
  });
  return {dx_ND, d_gates_R, d_gate_up, d_down};
}

}  // namespace

TORCH_LIBRARY(evenkeel, library) {
  library.def(
      "experts_forward(Tensor x, Tensor gates, Tensor gate_up, Tensor down, Tensor token_of_row, int[] counts, "
      "bool keep) -> (Tensor, Tensor)");
  library.def(
      "experts_backward(Tensor dy, Tensor x, Tensor gates, Tensor gate_up, Tensor down, Tensor token_of_row, "
      "int[] counts, Tensor kept) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(evenkeel, CPU, library) {
  library.impl("experts_forward", &experts_forward);
  library.impl("experts_backward", &experts_backward);
}
