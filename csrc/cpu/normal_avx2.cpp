// Uniform numbers into normal ones by the functions that torch's own kernel uses (avx_mathfun.h), so that the results
// are the same bit for bit. CMakeLists.txt compiles this file for AVX2; elsewhere it is never called.
#include <c10/macros/Macros.h>

#include <cstdint>
#if defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY_AVX2
#include <ATen/native/cpu/avx_mathfun.h>
#endif

namespace cape {

void normals_avx2(float* data, int64_t sixteens, float mean, float std);
bool has_normals_avx2();

#if defined(__AVX2__) && defined(__FMA__)
void normals_avx2(float* data, int64_t sixteens, float mean, float std) {
  const __m256 two_pi = _mm256_set1_ps(6.283185307179586f), one = _mm256_set1_ps(1.0f);
  const __m256 means = _mm256_set1_ps(mean), deviations = _mm256_set1_ps(std);
  for (float* at = data; at < data + 16 * sixteens; at += 16) {
    const __m256 first = _mm256_sub_ps(one, _mm256_loadu_ps(at));  // (0, 1]
    const __m256 radius = _mm256_sqrt_ps(_mm256_mul_ps(_mm256_set1_ps(-2.0f), log256_ps(first)));
    __m256 sine, cosine;
    sincos256_ps(_mm256_mul_ps(two_pi, _mm256_loadu_ps(at + 8)), &sine, &cosine);
    _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_mul_ps(radius, cosine), deviations, means));
    _mm256_storeu_ps(at + 8, _mm256_fmadd_ps(_mm256_mul_ps(radius, sine), deviations, means));
  }
}
bool has_normals_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
void normals_avx2(float*, int64_t, float, float) {}
bool has_normals_avx2() { return false; }
#endif

}  // namespace cape
