// CPU kernel of cape::conv_sq_norms: per sample and group, the cheapest of the direct form (windows read in place),
// the Gram form (few output positions) and plain dot products (narrow groups).
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <cape/conv_windows.h>
#include <cape/sample_norms.h>

namespace {

using at::IntArrayRef;
using at::Tensor;

cape::ConvShape shape_of(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, int64_t groups) {
  const int64_t spatial = int64_t(kernel.size());
  TORCH_CHECK(spatial >= 1 && spatial <= 3 && int64_t(stride.size()) == spatial && int64_t(padding.size()) == spatial &&
                  int64_t(dilation.size()) == spatial,
              "conv_sq_norms: kernel, stride, padding and dilation must have 1 to 3 entries each.");
  TORCH_CHECK(x.dim() == spatial + 3 && g.dim() == spatial + 3,
              "conv_sq_norms: x must be [B, F, C, *S] and g "
              "[B, F, O, *L]; got ",
              x.sizes(), " and ", g.sizes(), ".");
  TORCH_CHECK(x.size(0) == g.size(0) && x.size(1) == g.size(1), "conv_sq_norms: x ", x.sizes(), " and g ", g.sizes(),
              " must agree in their first two dimensions.");
  TORCH_CHECK(x.scalar_type() == g.scalar_type(), "conv_sq_norms: x is ", x.scalar_type(), " but g is ",
              g.scalar_type(), ".");
  TORCH_CHECK(groups >= 1 && x.size(2) % groups == 0 && g.size(2) % groups == 0, "conv_sq_norms: ", groups,
              " groups do not divide ", x.size(2), " and ", g.size(2), " channels.");
  cape::ConvShape s{x.size(1), x.size(2), g.size(2), groups,    {1, 1, 1},
                    {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, {1, 1, 1}};
  for (int64_t i = 0; i < spatial; ++i) {
    const size_t to = size_t(3 - spatial + i);
    s.size[to] = x.size(3 + i);
    s.kernel[to] = kernel[i];
    s.stride[to] = stride[i];
    s.padding[to] = padding[i];
    s.dilation[to] = dilation[i];
    s.out[to] = g.size(3 + i);
    TORCH_CHECK(s.kernel[to] >= 1 && s.stride[to] >= 1 && s.padding[to] >= 0 && s.dilation[to] >= 1 &&
                    (s.out[to] == 0 || (s.out[to] - 1) * s.stride[to] + (s.kernel[to] - 1) * s.dilation[to] <
                                           s.size[to] + 2 * s.padding[to]),
                "conv_sq_norms: windows of kernel ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ",
                dilation, " over ", x.sizes(), " do not reach the positions of ", g.sizes(), ".");
  }
  return s;
}

enum class Way { direct, gram, narrow };

// Counts multiply-accumulates as the tiles run them, padding included.
template <typename scalar_t>
Way choose(const cape::Tiles<scalar_t>& tile, const cape::ConvShape& s) {
  const double t = double(s.positions()), taps = double(s.taps());
  const double c = double(s.group_channels()), o = double(s.group_outputs());
  const double direct = t * taps * double(cape::round_up(s.group_channels(), tile.rows)) *
                        double(cape::round_up(s.group_outputs(), tile.cols));
  const double ld = double(cape::gram_stride(tile, s.positions()));
  // Tiles on the diagonal are computed whole, and unfolding moves c * taps * t numbers.
  const double gram = 0.5 * ld * (ld + tile.cols) * (c * taps + o) + 8.0 * c * taps * t;
  const double narrow = 6.0 * t * taps * c * o;  // dot products run at about a sixth of the tiles' rate
  if (narrow < direct && narrow < gram) return Way::narrow;
  return gram < direct ? Way::gram : Way::direct;
}

template <typename scalar_t>
class Sample {
 public:
  Sample(const cape::ConvShape& shape, Way way)
      : s_(shape), way_(way), tile_(cape::tiles<scalar_t>()), width_(cape::round_up(s_.group_channels(), tile_.rows)) {
    if (way == Way::direct) {
      windows_ = cape::window_offsets(s_, width_);
      taps_ = cape::tap_offsets(s_, width_);
    }
  }

  double operator()(cape::Scratch<scalar_t>& scratch, const scalar_t* x, const scalar_t* g) const {
    double total = 0.0;
    for (int64_t group = 0; group < s_.groups; ++group) {
      total += way_ == Way::narrow ? cape::narrow_squares(s_, x, g, group)
               : way_ == Way::gram ? gram(scratch, x, g, group)
                                   : direct(scratch, x, g, group);
    }
    return total;
  }

 private:
  double direct(cape::Scratch<scalar_t>& scratch, const scalar_t* x, const scalar_t* g, int64_t group) const {
    const int64_t t = s_.positions(), p = s_.group_outputs(), pixels = t / s_.frames;
    scalar_t* images = scratch.grow(scratch.a, s_.frames * s_.padded_pixels() * width_);
    cape::channels_last(s_, x, group * s_.group_channels(), s_.group_channels(), width_, images);
    scalar_t* panels = scratch.grow(scratch.g, t * cape::round_up(p, tile_.cols));
    for (int64_t j = 0; j < p; j += tile_.cols) {
      for (int64_t f = 0; f < s_.frames; ++f) {
        const scalar_t* from = g + (f * s_.outputs + group * p + j) * pixels;
        cape::pack(from, int64_t(1), pixels, pixels, std::min<int64_t>(tile_.cols, p - j), int64_t(tile_.cols),
                   panels + (j / tile_.cols) * t * tile_.cols + f * pixels * tile_.cols);
      }
    }
    double total = 0.0;
    for (const int64_t tap : taps_) {
      total += cape::direct_squares(tile_, images + tap, windows_.data(), width_, panels, t, p);
    }
    return total;
  }

  double gram(cape::Scratch<scalar_t>& scratch, const scalar_t* x, const scalar_t* g, int64_t group) const {
    const int64_t t = s_.positions(), p = s_.group_outputs(), c = s_.group_channels(), pixels = t / s_.frames;
    const int64_t ld = cape::gram_stride(tile_, t);
    scalar_t* rows = scratch.grow(scratch.a, c * s_.taps() * ld);
    cape::unfold_rows(s_, x, group * c, c, ld, rows);
    scalar_t* out = scratch.grow(scratch.g, p * ld);
    for (int64_t o = 0; o < p; ++o) {
      for (int64_t f = 0; f < s_.frames; ++f) {
        const scalar_t* from = g + (f * s_.outputs + group * p + o) * pixels;
        std::copy(from, from + pixels, out + o * ld + f * pixels);
      }
      std::fill(out + o * ld + t, out + (o + 1) * ld, scalar_t(0));
    }
    return cape::gram_squares(tile_, scratch, rows, c * s_.taps(), out, p, ld, t);
  }

  cape::ConvShape s_;
  Way way_;
  const cape::Tiles<scalar_t>& tile_;
  int64_t width_;
  std::vector<int64_t> windows_, taps_;
};

Tensor one_cotangent(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, int64_t groups) {
  const cape::ConvShape s = shape_of(x, g, kernel, stride, padding, dilation, groups);
  const int64_t batch = x.size(0);
  Tensor out = at::empty({batch}, x.options().dtype(at::kDouble));
  if (s.positions() == 0 || s.channels == 0 || s.outputs == 0) return out.zero_();
  const Tensor xc = x.contiguous(), gc = g.contiguous();
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_sq_norms", [&] {
    const Sample<scalar_t> sample(s, choose(cape::tiles<scalar_t>(), s));
    const scalar_t* x_data = xc.const_data_ptr<scalar_t>();
    const scalar_t* g_data = gc.const_data_ptr<scalar_t>();
    const int64_t x_step = s.frames * s.channels * s.pixels(), g_step = s.outputs * s.positions();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      cape::Scratch<scalar_t> scratch;
      for (int64_t b = begin; b < end; ++b) result[b] = sample(scratch, x_data + b * x_step, g_data + b * g_step);
    });
  });
  return out;
}

Tensor conv_sq_norms(const Tensor& x, const Tensor& g, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, int64_t groups, c10::string_view) {
  std::vector<Tensor> norms;
  for (const Tensor& cotangent : g.unbind()) {
    norms.push_back(one_cotangent(x, cotangent, kernel, stride, padding, dilation, groups));
  }
  return at::stack(norms);
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) { m.impl("conv_sq_norms", &conv_sq_norms); }
