// torch.ops.quailora.gram_ and quantize_columns for CPU and meta tensors. csrc/gram_cuda.cpp adds gram_ for CUDA.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "check.h"
#include "cpu/columns.h"
#include "cpu/gram.h"

namespace quailora {
namespace {

// Units go to whichever thread is free: tiles on the diagonal are half the work of the others. In a thread that is a
// worker of torch's own, parallel_for makes one call, and that thread does all of them.
void on_torch_threads(int64_t units, const std::function<void(int64_t)>& unit) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(units, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < units;) unit(i);
  });
}

// Where the rows of x (..., n) begin, in values after its first one; of those that `keep` (...) admits.
std::vector<int64_t> row_offsets(const at::Tensor& x, const std::optional<at::Tensor>& keep) {
  std::vector<int64_t> offsets{0};
  for (int64_t d = 0; d < x.dim() - 1; ++d) {
    std::vector<int64_t> inner;
    inner.reserve(offsets.size() * x.size(d));
    for (const int64_t offset : offsets)
      for (int64_t i = 0; i < x.size(d); ++i) inner.push_back(offset + i * x.stride(d));
    offsets = std::move(inner);
  }
  if (!keep) return offsets;
  const at::Tensor flat = keep->contiguous();
  const bool* admitted = flat.const_data_ptr<bool>();
  size_t kept = 0;
  for (size_t i = 0; i < offsets.size(); ++i)
    if (admitted[i]) offsets[kept++] = offsets[i];
  offsets.resize(kept);
  return offsets;
}

Dtype dtype_of(const at::Tensor& x) {
  if (x.scalar_type() == at::kBFloat16) return Dtype::bfloat16;
  return x.scalar_type() == at::kHalf ? Dtype::float16 : Dtype::float32;
}

// The one that CPU tensors take.
std::atomic<const Path*>& path() {
  static std::atomic<const Path*> chosen{&path_named("")};
  return chosen;
}

void gram_cpu(const at::Tensor& h, const at::Tensor& x, const std::optional<at::Tensor>& keep) {
  check_gram(h, x, keep);
  check_overlap(h, x);
  const at::Tensor rows = x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
  const auto offsets = row_offsets(rows, keep);
  const Tokens tokens{rows.const_data_ptr(), dtype_of(rows), rows.size(-1), offsets.data(),
                      static_cast<int64_t>(offsets.size())};
  add_gram(tokens, *path(), on_torch_threads, h.mutable_data_ptr<float>(), h.stride(0));
}

using Found = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Found empty_columns(const at::Tensor& weight, int64_t group) {
  const auto m = weight.sym_size(0), k = weight.sym_size(1);
  const auto floats = weight.options(), bytes = floats.dtype(at::kByte);
  return {at::empty_symint({m, k}, bytes), at::empty_symint({m, k / group}, floats),
          at::empty_symint({m, k / group}, bytes), at::empty_symint({m, k}, floats)};
}

Found quantize_columns_meta(const at::Tensor& weight, const at::Tensor& feedback, const at::Tensor& factor,
                            const at::Tensor& importance, int64_t group, int64_t bits, bool /*symmetric*/,
                            at::ArrayRef<double> /*clips*/, const std::optional<at::Tensor>& scales,
                            const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& levels) {
  check_columns(weight, feedback, factor, importance, group, bits, scales, zeros, levels);
  return empty_columns(weight, group);
}

// A view where the values of a row lie side by side.
at::Tensor with_rows(const at::Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

template <class Value>
Rows<const Value> rows_in(const at::Tensor& x) {
  return {x.const_data_ptr<Value>(), x.stride(0)};
}

template <class Value>
Rows<Value> rows_out(const at::Tensor& x) {
  return {x.mutable_data_ptr<Value>(), x.stride(0)};
}

Found quantize_columns_cpu(const at::Tensor& weight, const at::Tensor& feedback, const at::Tensor& factor,
                           const at::Tensor& importance, int64_t group, int64_t bits, bool symmetric,
                           at::ArrayRef<double> clips, const std::optional<at::Tensor>& scales,
                           const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& levels) {
  check_columns(weight, feedback, factor, importance, group, bits, scales, zeros, levels);
  const at::Tensor w = with_rows(weight), f = with_rows(feedback), u = with_rows(factor), d = importance.contiguous();
  const at::Tensor given = scales ? with_rows(*scales) : at::Tensor(), zero = zeros ? with_rows(*zeros) : at::Tensor(),
                   table = levels ? levels->contiguous() : at::Tensor();
  const ColumnsIn in{
      rows_in<float>(w),
      rows_in<float>(f),
      rows_in<float>(u),
      d.const_data_ptr<float>(),
      w.size(0),
      w.size(1),
      group,
      static_cast<int>(bits),
      symmetric,
      clips.data(),
      static_cast<int64_t>(clips.size()),
      scales ? rows_in<float>(given) : Rows<const float>{},
      zeros ? rows_in<uint8_t>(zero) : Rows<const uint8_t>{},
      levels ? table.const_data_ptr<float>() : nullptr,
  };
  Found found = empty_columns(weight, group);
  const auto& [codes, found_scales, found_zeros, errors] = found;
  const ColumnsOut out{rows_out<uint8_t>(codes), rows_out<float>(found_scales), rows_out<uint8_t>(found_zeros),
                       rows_out<float>(errors)};
  quantize_columns(in, out, *path(), on_torch_threads);
  return found;
}

TORCH_LIBRARY(quailora, m) {
  m.def("gram_(Tensor(a!) h, Tensor x, Tensor? keep=None) -> ()");
  m.def(
      "quantize_columns(Tensor weight, Tensor feedback, Tensor factor, Tensor importance, *, int group, int bits, "
      "bool symmetric, float[] clips, Tensor? scales=None, Tensor? zeros=None, Tensor? levels=None) "
      "-> (Tensor codes, Tensor scales, Tensor zeros, Tensor errors)");
}
TORCH_LIBRARY_IMPL(quailora, CPU, m) {
  m.impl("gram_", gram_cpu);
  m.impl("quantize_columns", quantize_columns_cpu);
}
TORCH_LIBRARY_IMPL(quailora, Meta, m) {
  m.impl("gram_", check_gram);
  m.impl("quantize_columns", quantize_columns_meta);
}

}  // namespace
}  // namespace quailora

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Importing it declares torch.ops.quailora.gram_ and quantize_columns.";
  m.def("cpu_path", [] { return quailora::name(*quailora::path()); }, "The path that CPU tensors take.");
  m.def("use_cpu_path", [](const std::string& name) { quailora::path() = &quailora::path_named(name); },
        "Let CPU tensors take the path of this name; of no name, the best here. ValueError if there is none such.");
  m.def("cpu_paths", &quailora::paths_here, "The paths this processor runs, the best first.");
}
