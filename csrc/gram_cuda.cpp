// torch.ops.quailora.gram_ for CUDA tensors: on the current stream of their device, without waiting for it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "check.h"
#include "cuda/launch.h"

namespace quailora {
namespace {

cuda::Element element_of(const at::Tensor& x) {
  if (x.scalar_type() == at::kBFloat16) return cuda::Element::bfloat16;
  return x.scalar_type() == at::kHalf ? cuda::Element::float16 : cuda::Element::float32;
}

void check_cuda(int error, const at::Tensor& h, const at::Tensor& x) {
  TORCH_CHECK(error == 0, "gram_: launching the kernel for h ", h.sizes(), " and x ", x.sizes(), " of ",
              x.scalar_type(), " on ", h.device(), ", CUDA reports: ", cuda::error_string(error));
}

void gram_cuda(const at::Tensor& h, const at::Tensor& x, const std::optional<at::Tensor>& keep) {
  check_gram(h, x, keep);
  check_overlap(h, x);
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(h.device());

  // Views of x and keep where their strides allow it: where not, copying takes a small part of what multiplying does,
  // and masked rows are copied and go no further. Copies come from the same stream's memory, so the allocator hands
  // it on, like the scratch, only to what is queued after the kernel.
  const int64_t features = x.size(-1);
  at::Tensor tokens = x.reshape({-1, features});
  if (features > 1 && tokens.stride(1) != 1) tokens = tokens.contiguous();
  const at::Tensor admitted = keep ? keep->reshape({-1}).contiguous() : at::Tensor();

  const cuda::Gram gram{
      element_of(tokens),
      tokens.const_data_ptr(),
      tokens.stride(0),
      keep ? reinterpret_cast<const uint8_t*>(admitted.const_data_ptr<bool>()) : nullptr,
      tokens.size(0),
      static_cast<int>(features),
      h.mutable_data_ptr<float>(),
      h.stride(0),
  };
  size_t bytes = 0;
  check_cuda(cuda::scratch_bytes(gram, &bytes), h, x);
  const at::Tensor scratch = at::empty({static_cast<int64_t>(bytes)}, h.options().dtype(at::kByte));
  check_cuda(cuda::gram_(gram, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()), h, x);
}

TORCH_LIBRARY_IMPL(quailora, CUDA, m) { m.impl("gram_", gram_cuda); }

}  // namespace
}  // namespace quailora
