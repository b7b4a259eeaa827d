// The pointwise part of one step of a recurrent cell, for one sample; the products around it are the caller's.
#pragma once

#include <cape/isa/activations.h>

namespace cape {
namespace CAPE_ISA {

// A vector of a row with `n` numbers left; what is missing at its end reads as zero and is not written.
template <typename scalar>
struct Rows {
  using T = Tile<scalar>;
  typedef typename T::Vector Vector;

  static CAPE_INLINE Vector get(const scalar* p, int64_t n) {
    if (n >= T::kWidth) return T::load(p);
    Vector v = {};
    for (int64_t q = 0; q < n; ++q) v[q] = p[q];
    return v;
  }
  static CAPE_INLINE void put(scalar* p, int64_t n, Vector v) {
    if (n >= T::kWidth) return T::store(p, v);
    for (int64_t q = 0; q < n; ++q) p[q] = v[q];
  }
};

// gates [4h] hold the pre-activations of i, f, g, o and receive the activations; c and h are written.
template <typename scalar>
void lstm_step(scalar* gates, const scalar* c_prev, scalar* c, scalar* h, int64_t n) {
  using R = Rows<scalar>;
  using A = Activations<scalar>;
  for (int64_t j = 0; j < n; j += Tile<scalar>::kWidth) {
    const int64_t left = n - j;
    const auto i = A::sigmoid(R::get(gates + j, left)), f = A::sigmoid(R::get(gates + n + j, left));
    const auto g = A::tanh(R::get(gates + 2 * n + j, left)), o = A::sigmoid(R::get(gates + 3 * n + j, left));
    const auto cell = f * R::get(c_prev + j, left) + i * g;
    R::put(gates + j, left, i);
    R::put(gates + n + j, left, f);
    R::put(gates + 2 * n + j, left, g);
    R::put(gates + 3 * n + j, left, o);
    R::put(c + j, left, cell);
    R::put(h + j, left, o * A::tanh(cell));
  }
}

// For k cotangents, `step` numbers apart ([.., 4h], [.., h] each): dh holds what the next step sent back and `grad`
// what the output received (its own stride); dc is updated in place; d_pre is written.
template <typename scalar>
void lstm_step_back(const scalar* gates, const scalar* c_prev, const scalar* c, const scalar* dh, const scalar* grad,
                    int64_t grad_step, scalar* dc, scalar* d_pre, int64_t n, int64_t cotangents, int64_t batch) {
  using R = Rows<scalar>;
  using A = Activations<scalar>;
  for (int64_t j = 0; j < n; j += Tile<scalar>::kWidth) {
    const int64_t left = n - j;
    const auto i = R::get(gates + j, left), f = R::get(gates + n + j, left), g = R::get(gates + 2 * n + j, left),
               o = R::get(gates + 3 * n + j, left), was = R::get(c_prev + j, left), t = A::tanh(R::get(c + j, left));
    const auto to_o = t * o * (scalar(1) - o), to_c = o * (scalar(1) - t * t), to_i = g * i * (scalar(1) - i),
               to_f = was * f * (scalar(1) - f), to_g = i * (scalar(1) - g * g);
    for (int64_t k = 0; k < cotangents; ++k) {
      const int64_t at = k * batch * n + j;
      scalar* out = d_pre + 4 * k * batch * n + j;
      const auto back = R::get(dh + at, left) + R::get(grad + k * grad_step + j, left);
      const auto cell = R::get(dc + at, left) + back * to_c;
      R::put(out, left, cell * to_i);
      R::put(out + n, left, cell * to_f);
      R::put(out + 2 * n, left, cell * to_g);
      R::put(out + 3 * n, left, back * to_o);
      R::put(dc + at, left, cell * f);
    }
  }
}

// gates [3h] hold the input side of r, z, n and receive the activations; `hidden` [3h] is the hidden side; `side` keeps
// that of the new gate; h is written.
template <typename scalar>
void gru_step(scalar* gates, const scalar* hidden, const scalar* h_prev, scalar* side, scalar* h, int64_t n) {
  using R = Rows<scalar>;
  using A = Activations<scalar>;
  for (int64_t j = 0; j < n; j += Tile<scalar>::kWidth) {
    const int64_t left = n - j;
    const auto r = A::sigmoid(R::get(gates + j, left) + R::get(hidden + j, left));
    const auto z = A::sigmoid(R::get(gates + n + j, left) + R::get(hidden + n + j, left));
    const auto s = R::get(hidden + 2 * n + j, left);
    const auto g = A::tanh(R::get(gates + 2 * n + j, left) + r * s);
    R::put(gates + j, left, r);
    R::put(gates + n + j, left, z);
    R::put(gates + 2 * n + j, left, g);
    R::put(side + j, left, s);
    R::put(h + j, left, g + z * (R::get(h_prev + j, left) - g));
  }
}

// As lstm_step_back; dh becomes the part that goes straight to the previous state, d_side is what its product adds.
template <typename scalar>
void gru_step_back(const scalar* gates, const scalar* side, const scalar* h_prev, scalar* dh, const scalar* grad,
                   int64_t grad_step, scalar* d_pre, scalar* d_side, int64_t n, int64_t cotangents, int64_t batch) {
  using R = Rows<scalar>;
  for (int64_t j = 0; j < n; j += Tile<scalar>::kWidth) {
    const int64_t left = n - j;
    const auto r = R::get(gates + j, left), z = R::get(gates + n + j, left), g = R::get(gates + 2 * n + j, left),
               s = R::get(side + j, left), was = R::get(h_prev + j, left);
    const auto to_g = (scalar(1) - z) * (scalar(1) - g * g), to_z = (was - g) * z * (scalar(1) - z),
               to_r = s * r * (scalar(1) - r);
    for (int64_t k = 0; k < cotangents; ++k) {
      const int64_t at = k * batch * n + j, wide = 3 * k * batch * n + j;
      const auto back = R::get(dh + at, left) + R::get(grad + k * grad_step + j, left);
      const auto d_g = back * to_g, d_z = back * to_z, d_r = d_g * to_r;
      R::put(d_pre + wide, left, d_r);
      R::put(d_pre + wide + n, left, d_z);
      R::put(d_pre + wide + 2 * n, left, d_g);
      R::put(d_side + wide, left, d_r);
      R::put(d_side + wide + n, left, d_z);
      R::put(d_side + wide + 2 * n, left, d_g * r);
      R::put(dh + at, left, back * z);
    }
  }
}

}  // namespace CAPE_ISA
}  // namespace cape
