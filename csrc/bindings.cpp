// Torch's side of the extension: checks, allocation and the operator.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "lowrank_statistics.h"

namespace dbpkern {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> lowrank_statistics_cuda(const at::Tensor& x, const at::Tensor& Q) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected shape [L, n, d], got ", x.sizes());
  TORCH_CHECK_VALUE(Q.dim() == 3, "Q: expected shape [L, d, r], got ", Q.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat,
                   "x: expected bfloat16 or float32, got ", x.scalar_type());
  TORCH_CHECK_TYPE(Q.scalar_type() == at::kFloat, "Q: expected float32, got ", Q.scalar_type());
  TORCH_CHECK_VALUE(x.is_cuda() && Q.device() == x.device(), "expected x and Q on one GPU, got x on ", x.device(),
                    " and Q on ", Q.device());
  TORCH_CHECK_VALUE(Q.size(0) == x.size(0) && Q.size(1) == x.size(2), "Q: expected shape [L, d, r] with L = ",
                    x.size(0), " and d = ", x.size(2), ", got ", Q.sizes());

  const c10::cuda::CUDAGuard guard(x.device());
  const Problem problem{x.size(0), x.size(1), x.size(2), Q.size(2), static_cast<int>(x.element_size())};
  const Plan plan = make_plan(problem, current_device());

  const at::Tensor rows = x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous();
  const at::Tensor Q_rows = Q.contiguous();
  const auto floats = Q.options();
  at::Tensor B = at::empty({problem.layers, problem.rank, problem.rank}, floats);
  at::Tensor Y = at::empty({problem.layers, problem.features, problem.rank}, floats);
  at::Tensor c = at::empty({problem.layers, problem.features}, floats);
  // Freed when this returns, but given to others on this stream alone, after the kernel.
  const at::Tensor workspace = at::empty({plan.workspace_bytes}, floats.dtype(at::kByte));
  const LowrankStatistics tensors{rows.const_data_ptr(), rows.stride(1), rows.stride(0),
                                  Q_rows.const_data_ptr<float>(), B.mutable_data_ptr<float>(),
                                  Y.mutable_data_ptr<float>(), c.mutable_data_ptr<float>()};
  launch(tensors, problem, plan, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
  return {B, Y, c};
}

}  // namespace
}  // namespace dbpkern

TORCH_LIBRARY(dbpkern_cuda, m) {
  m.def("lowrank_statistics(Tensor x, Tensor Q) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dbpkern_cuda, CUDA, m) { m.impl("lowrank_statistics", &dbpkern::lowrank_statistics_cuda); }
