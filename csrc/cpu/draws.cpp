// CPU kernels of cape::seed_draws_, cape::draw_ones_ and cape::normal_: torch's own random numbers, faster. Each row of
// `states` is the Twister of one trial.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <cmath>
#include <cstring>
#include <mutex>

namespace cape {
// normal_avx2.cpp: Box-Muller in place, of 16 uniform numbers at a time.
void normals_avx2(float* data, int64_t sixteens, float mean, float std);
bool has_normals_avx2();
}  // namespace cape

namespace {

using at::Tensor;
using cape::Twister;

constexpr int64_t kStateWords = sizeof(Twister) / sizeof(int32_t);

Twister* twisters(const Tensor& states) {
  TORCH_CHECK(
      states.dim() == 2 && states.size(1) == kStateWords && states.is_contiguous() && states.scalar_type() == at::kInt,
      "The states of draws must be contiguous int32 [rows, ", kStateWords, "]; got ", states.sizes(), ".");
  return reinterpret_cast<Twister*>(states.data_ptr<int32_t>());
}

// Let autograd see that a tensor was written to.
void written(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

void seed_draws(const Tensor& states, int64_t row, int64_t seed) {
  TORCH_CHECK(row >= 0 && row < states.size(0), "There is no row ", row, " of draws.");
  twisters(states)[row].seed(uint64_t(seed));
  written(states);
}

void draw_ones(const Tensor& out, const Tensor& states, double probability) {
  TORCH_CHECK(out.dim() > 0 && out.is_contiguous() && out.size(0) <= states.size(0),
              "draw_ones_ fills a contiguous tensor with at most one row for each state.");
  TORCH_CHECK(probability >= 0.0 && probability <= 1.0, "cape: draw_ones_: the probability must lie in [0, 1], got ",
              probability, ".");
  Twister* all = twisters(states);
  if (out.numel() == 0) return;
  for (int64_t i = 0; i < out.size(0); ++i) {
    TORCH_CHECK(all[i].next >= 0 && all[i].next <= Twister::kBlock, "cape: draw_ones_: row ", i, " of the states has ",
                all[i].next, " used numbers of ", Twister::kBlock, "; begin it with seed_draws_.");
  }
  const int64_t size = out.numel() / out.size(0);
  const auto threshold = uint64_t(std::ceil(std::ldexp(probability, 53)));
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "draw_ones_", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    scalar_t* data = out.data_ptr<scalar_t>();
    at::parallel_for(0, out.size(0), std::max<int64_t>(1, 16384 / size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.draw_ones(all[i], threshold, data + i * size, size);
    });
  });
  written(out);
  written(states);
}

// torch writes uniform numbers, turns each 16 into normal ones, and draws the last 16 anew where some are left over.
void normal(const Tensor& out, double mean, double std, std::optional<at::Generator> generator) {
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == at::kFloat && out.numel() >= 16,
              "normal_ fills contiguous float32 tensors of 16 numbers or more.");
  TORCH_CHECK(std >= 0.0, "cape: normal_: std must not be negative, got ", std, ".");
  TORCH_CHECK(cape::has_normals_avx2(), "normal_ needs a processor with AVX2; use torch.Tensor.normal_.");
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::scoped_lock lock(source->mutex_);
  auto engine = source->engine();
  auto held = engine.data();
  Twister twister;
  std::memcpy(twister.block, held.state_.data(), sizeof(twister.block));
  twister.next = held.left_ == 1 ? Twister::kBlock : int32_t(held.next_);
  const auto& kernels = cape::kernels<float>();
  float* data = out.data_ptr<float>();
  const int64_t size = out.numel(), sixteens = size / 16;
  const auto spread = [&](float* from, int64_t count) {
    at::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
      cape::normals_avx2(from + 16 * begin, end - begin, float(mean), float(std));
    });
  };
  kernels.draw_uniform(twister, data, size);
  spread(data, sixteens);
  if (size % 16 != 0) {
    kernels.draw_uniform(twister, data + size - 16, 16);
    spread(data + size - 16, 1);
  }
  std::memcpy(held.state_.data(), twister.block, sizeof(twister.block));
  held.next_ = uint32_t(twister.next);
  held.left_ = Twister::kBlock + 1 - twister.next;
  engine.set_data(held);
  source->set_engine(engine);
  written(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) {
  m.impl("seed_draws_", seed_draws);
  m.impl("draw_ones_", draw_ones);
  m.impl("normal_", normal);
}
