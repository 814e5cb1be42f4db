// What every implementation of quailora::gram_ demands of its arguments.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>

#include <algorithm>
#include <optional>

namespace quailora {

// Sizes and strides may be symbolic: this is also all that happens to meta and fake tensors.
inline void check_gram(const at::Tensor& h, const at::Tensor& x, const std::optional<at::Tensor>& keep) {
  const auto holds = [](const c10::SymBool& condition) { return condition.expect_true(__FILE__, __LINE__); };
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

}  // namespace quailora
