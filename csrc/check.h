// What every implementation of an operator demands of its arguments.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

namespace quailora {

// Sizes and strides may be symbolic: meta and fake tensors are checked too.
inline bool holds(const c10::SymBool& condition) { return condition.expect_true(__FILE__, __LINE__); }

inline void check_gram(const at::Tensor& h, const at::Tensor& x, const std::optional<at::Tensor>& keep) {
  TORCH_CHECK_VALUE(h.dim() == 2 && h.scalar_type() == at::kFloat, "gram_: expected h (n, n) of float32, got ",
                    h.sym_sizes(), " of ", h.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, "gram_: expected x (..., n), got a scalar");
  TORCH_CHECK_VALUE(
      x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf || x.scalar_type() == at::kFloat,
      "gram_: expected x of bfloat16, float16 or float32, got ", x.scalar_type());
  const auto n = x.sym_size(-1);
  TORCH_CHECK_VALUE(holds(h.sym_size(0).sym_eq(n).sym_and(h.sym_size(1).sym_eq(n))), "gram_: expected h [", n, ", ", n,
                    "] for x ", x.sym_sizes(), ", got ", h.sym_sizes());
  TORCH_CHECK_VALUE(holds(h.sym_stride(1).sym_eq(1).sym_or(n.sym_le(1))),
                    "gram_: expected the values of a row of h side by side, got strides ", h.sym_strides());
  TORCH_CHECK_VALUE(holds(h.sym_stride(0).sym_ge(n).sym_or(n.sym_le(1))),
                    "gram_: expected the rows of h not to overlap, got strides ", h.sym_strides());
  TORCH_CHECK_VALUE(h.device() == x.device(), "gram_: expected h and x on one device, got ", h.device(), " and ",
                    x.device());
  if (!keep) return;
  TORCH_CHECK_VALUE(keep->scalar_type() == at::kBool, "gram_: expected keep of bool, got ", keep->scalar_type());
  TORCH_CHECK_VALUE(keep->device() == x.device(), "gram_: expected keep and x on one device, got ", keep->device(),
                    " and ", x.device());
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  c10::SymBool fits = keep->dim() == x.dim() - 1;
  for (int64_t d = 0; d < std::min(keep->dim(), x.dim() - 1); ++d)
    fits = fits.sym_and(keep->sym_size(d).sym_eq(leading[d]));
  TORCH_CHECK_VALUE(holds(fits), "gram_: expected keep ", leading, " for x ", x.sym_sizes(), ", got ",
                    keep->sym_sizes());
}

// What those demand that write to memory. (Where both are contiguous; what lies in gaps is not looked for.)
inline void check_overlap(const at::Tensor& h, const at::Tensor& x) {
  const auto status = at::get_overlap_status(h, x);
  TORCH_CHECK_VALUE(status != at::MemOverlapStatus::Full && status != at::MemOverlapStatus::Partial,
                    "gram_: expected h and x apart in memory, got h ", h.sizes(), " at ", h.const_data_ptr(), " and x ",
                    x.sizes(), " at ", x.const_data_ptr());
}

inline void check_columns(const at::Tensor& weight, const at::Tensor& feedback, const at::Tensor& factor,
                          const at::Tensor& importance, int64_t group, int64_t bits,
                          const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& zeros,
                          const std::optional<at::Tensor>& levels) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.scalar_type() == at::kFloat,
                    "quantize_columns: expected weight (m, k) of float32, got ", weight.sym_sizes(), " of ",
                    weight.scalar_type());
  const auto m = weight.sym_size(0), k = weight.sym_size(1);
  TORCH_CHECK_VALUE(1 <= bits && bits <= 8, "quantize_columns: expected bits from 1 to 8, got ", bits);
  TORCH_CHECK_VALUE(group >= 1 && holds((k % group).sym_eq(0)), "quantize_columns: expected a group that divides the ",
                    k, " columns, got ", group);
  const auto expect = [&](const char* name, const at::Tensor& x, at::ScalarType dtype,
                          std::initializer_list<c10::SymInt> sizes) {
    c10::SymBool fits = x.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const auto& size : sizes)
      if (d < x.dim()) fits = fits.sym_and(x.sym_size(d++).sym_eq(size));
    TORCH_CHECK_VALUE(x.scalar_type() == dtype && holds(fits), "quantize_columns: expected ", name, " ",
                      c10::SymIntArrayRef(sizes), " of ", dtype, ", got ", x.sym_sizes(), " of ", x.scalar_type());
    TORCH_CHECK_VALUE(x.device() == weight.device(), "quantize_columns: expected ", name, " and weight on one device, ",
                      "got ", x.device(), " and ", weight.device());
  };
  expect("feedback", feedback, at::kFloat, {m, k});
  expect("factor", factor, at::kFloat, {k, k});
  expect("importance", importance, at::kFloat, {k});
  if (scales) expect("scales", *scales, at::kFloat, {m, k / group});
  if (zeros) expect("zeros", *zeros, at::kByte, {m, k / group});
  if (levels) expect("levels", *levels, at::kFloat, {int64_t{1} << bits});
  TORCH_CHECK_VALUE(scales || !zeros, "quantize_columns: expected scales with zeros");
  TORCH_CHECK_VALUE(scales || !levels, "quantize_columns: expected scales with levels");
}

}  // namespace quailora
