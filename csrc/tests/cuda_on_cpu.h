// Runs CUDA kernels on a processor, to test them: a fiber per thread, block after block. Right, not fast.
//
// - __syncthreads and the warp-wide functions suspend a fiber until all others have come; a thread that does not come
//   is an error. The order in which threads run can be forwards or backwards.
// - Shared memory starts each block as NaN. Asynchronous copies happen as late as the rules allow (when the thread
// waits
//   for them: a missing wait reads NaN) or as early (at once: a slot that is still being read changes under its
//   reader).
// - Tensor-core products follow the fragment layouts of the PTX manual, round operands to their format and truncate
// sums.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__

namespace emulation {

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  int valid, bytes;
};

struct Thread {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::ready;
  unsigned index = 0;
  const void* argument = nullptr;
  const char* operation = nullptr;
  std::vector<std::vector<Copy>> groups;  // committed copies that have not been waited for
  std::vector<Copy> open;
};

struct Machine {
  std::vector<Thread> threads;
  Thread* current = nullptr;
  Dim block, grid;
  unsigned size = 0;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  size_t shared_bytes = 0;
  std::function<void()> body;
  bool eager_copies = false, backwards = false;
  int64_t copies = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

[[noreturn]] inline void fail(const char* what) {
  std::printf("FAIL on the emulated device: %s (block %u, thread %u)\n", what, machine().block.x,
              machine().current ? machine().current->index : 0u);
  std::exit(1);
}

inline void run_thread() {
  for (;;) {
    machine().body();
    machine().current->state = State::done;
    if (_setjmp(machine().current->jump) == 0) _longjmp(machine().scheduler, 1);
  }
}

// Back to the scheduler until this thread is ready again.
__attribute__((noinline)) inline void suspend() {
  if (_setjmp(machine().current->jump) == 0) _longjmp(machine().scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread& t) {
  Machine& m = machine();
  m.current = &t;
  if (_setjmp(m.scheduler) == 0) {
    if (t.started) _longjmp(t.jump, 1);
    t.started = true;
    constexpr size_t kStack = 1 << 17;
    t.stack.reset(new char[kStack]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, run_thread, 0);
    setcontext(&t.context);
  }
}

inline void run_block() {
  Machine& m = machine();
  std::memset(m.shared_begin, 0xff, m.shared_bytes);  // NaN, in every format
  for (unsigned i = 0; i < m.size; ++i) {
    Thread& t = m.threads[i];
    t.state = State::ready;
    t.index = i;
    t.groups.clear();
    t.open.clear();
  }
  for (;;) {
    bool moved = false;
    unsigned done = 0, waiting = 0;
    for (unsigned n = 0; n < m.size; ++n) {
      Thread& t = m.threads[m.backwards ? m.size - 1 - n : n];
      if (t.state == State::ready) resume(t), moved = true;
    }
    for (unsigned n = 0; n < m.size; ++n) {
      done += m.threads[n].state == State::done;
      waiting += m.threads[n].state == State::at_barrier;
    }
    if (done == m.size) break;
    if (waiting == m.size) {
      for (unsigned n = 0; n < m.size; ++n) m.threads[n].state = State::ready;
    } else if (!moved) {
      fail("some threads wait for others that never come");
    }
  }
  for (unsigned n = 0; n < m.size; ++n) {
    if (!m.threads[n].open.empty()) fail("a copy was never committed");
    for (const auto& group : m.threads[n].groups) {
      if (!group.empty()) fail("a copy was never waited for");
    }
  }
}

inline void run(int64_t blocks, int threads, size_t shared, std::function<void()> body) {
  Machine& m = machine();
  if (threads % 32 != 0 || threads > 1024 || blocks >= (int64_t(1) << 31)) fail("no such launch");
  while (m.threads.size() < size_t(threads)) m.threads.emplace_back();
  m.size = unsigned(threads);
  m.body = std::move(body);
  m.grid = {unsigned(blocks), 1, 1};
  m.shared.assign(shared + 16, 0);
  m.shared_begin = m.shared.data() + (16 - reinterpret_cast<uintptr_t>(m.shared.data()) % 16) % 16;
  m.shared_bytes = shared;
  for (int64_t b = 0; b < blocks; ++b) {
    m.block = {unsigned(b), 0, 0};
    run_block();
  }
  m.current = nullptr;
}

// All 32 threads of a warp meet; the last one runs `work` with everybody's argument.
template <class Work>
void together(const char* operation, const void* argument, Work work) {
  Machine& m = machine();
  Thread& self = *m.current;
  self.argument = argument;
  self.operation = operation;
  self.state = State::in_warp;
  Thread* const warp = &m.threads[self.index / 32 * 32];
  for (int lane = 0; lane < 32; ++lane) {
    if (warp[lane].state != State::in_warp) return suspend();
    if (warp[lane].operation != operation) fail("the threads of a warp run different warp-wide functions");
  }
  const void* arguments[32];
  for (int lane = 0; lane < 32; ++lane) arguments[lane] = warp[lane].argument;
  work(arguments);
  for (int lane = 0; lane < 32; ++lane) warp[lane].state = State::ready;
}

inline void perform(const Copy& c) {
  std::memset(c.to, 0, size_t(c.bytes));
  std::memcpy(c.to, c.from, size_t(c.valid));
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// The float next to `value` on the side of zero.
inline float truncate(double value) {
  const float nearest = float(value);
  return std::abs(double(nearest)) > std::abs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

struct MmaArgument {
  float* c;
  const uint32_t *a, *b;
};

// D[16][8] += A[16][depth] B[depth][8] for a warp: a_of and b_of give (register, half) places; see the PTX manual,
// "Matrix Fragments for mma.m16n8k8" and "mma.m16n8k16".
template <int depth, class ReadA, class ReadB>
void warp_product(const void* const* arguments, ReadA read_a, ReadB read_b) {
  float a[16][depth], b[depth][8];
  const auto of = [&](int lane) { return static_cast<const MmaArgument*>(arguments[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    read_a(of(lane)->a, lane >> 2, lane & 3, a);
    read_b(of(lane)->b, lane >> 2, lane & 3, b);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = (lane >> 2) + (e >= 2 ? 8 : 0), col = 2 * (lane & 3) + (e & 1);
      double sum = double(of(lane)->c[e]);
      for (int k = 0; k < depth; ++k) sum += double(a[row][k]) * double(b[k][col]);
      of(lane)->c[e] = truncate(sum);
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::Dim{emulation::machine().current->index, 0, 0})
#define blockIdx (emulation::machine().block)
#define gridDim (emulation::machine().grid)

inline void __syncthreads() {
  emulation::machine().current->state = emulation::State::at_barrier;
  emulation::suspend();
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  if (mask != 0xffffffffu) emulation::fail("a shuffle of part of a warp");
  struct Argument {
    T in;
    T* out;
  };
  T result{};
  const Argument argument{value, &result};
  emulation::together("shuffle", &argument, [by](const void* const* arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      *static_cast<const Argument*>(arguments[lane])->out = static_cast<const Argument*>(arguments[lane ^ by])->in;
    }
  });
  return result;
}

inline float __uint_as_float(uint32_t bits) { return emulation::bits_to_float(bits); }

namespace cape::cuda {

inline unsigned char* dynamic_shared() { return emulation::machine().shared_begin; }

template <int bytes>
void copy_async(void* shared, const void* global, int valid) {
  using namespace emulation;
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  Machine& m = machine();
  const auto to = static_cast<unsigned char*>(shared);
  if (to < m.shared_begin || to + bytes > m.shared_begin + m.shared_bytes) fail("a copy outside shared memory");
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(global) % bytes) fail("a misaligned copy");
  if (valid < 0 || valid > bytes) fail("a copy of more than it holds");
  ++m.copies;
  m.current->open.push_back({shared, global, valid, bytes});
  if (m.eager_copies) perform(m.current->open.back());
}

inline void commit_copies() {
  emulation::Thread& t = *emulation::machine().current;
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

template <int pending>
void wait_copies() {
  emulation::Thread& t = *emulation::machine().current;
  while (t.groups.size() > size_t(pending)) {
    if (!emulation::machine().eager_copies) {
      for (const auto& copy : t.groups.front()) emulation::perform(copy);
    }
    t.groups.erase(t.groups.begin());
  }
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = emulation::float_to_bits(value);
  if (!std::isfinite(value)) return (bits & 0xffffe000u) | (std::isnan(value) ? 0x400000u : 0u);
  return (bits + 0x1000u) & 0xffffe000u;
}

inline uint32_t to_bf16(float value) {
  const uint32_t bits = emulation::float_to_bits(value);
  if (!std::isfinite(value)) return (bits >> 16) | (std::isnan(value) ? 0x40u : 0u);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulation::MmaArgument argument{c, a, b};
  emulation::together("mma_tf32", &argument, [](const void* const* arguments) {
    const auto tf32 = [](uint32_t bits) { return emulation::bits_to_float(bits & 0xffffe000u); };
    emulation::warp_product<8>(
        arguments,
        [&](const uint32_t* r, int group, int lane, float (&to)[16][8]) {
          for (int i = 0; i < 4; ++i) to[group + (i & 1) * 8][lane + (i >> 1) * 4] = tf32(r[i]);
        },
        [&](const uint32_t* r, int group, int lane, float (&to)[8][8]) {
          for (int i = 0; i < 2; ++i) to[lane + i * 4][group] = tf32(r[i]);
        });
  });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulation::MmaArgument argument{c, a, b};
  emulation::together("mma_bf16", &argument, [](const void* const* arguments) {
    const auto half = [](uint32_t bits, int which) {
      return emulation::bits_to_float(which ? bits & 0xffff0000u : bits << 16);
    };
    emulation::warp_product<16>(
        arguments,
        [&](const uint32_t* r, int group, int lane, float (&to)[16][16]) {
          for (int i = 0; i < 8; ++i) {
            to[group + ((i >> 1) & 1) * 8][lane * 2 + (i & 1) + (i >> 2) * 8] = half(r[i >> 1], i & 1);
          }
        },
        [&](const uint32_t* r, int group, int lane, float (&to)[16][8]) {
          for (int i = 0; i < 4; ++i) to[lane * 2 + (i & 1) + (i >> 1) * 8][group] = half(r[i >> 1], i & 1);
        });
  });
}

}  // namespace cape::cuda

namespace emulation {

// What the kernels' host code asks of a device.
class Launch {
 public:
  explicit Launch(int64_t processors = 4, size_t shared_limit = 227 << 10)
      : processors_(processors), shared_limit_(shared_limit) {}
  int64_t processors() const { return processors_; }
  size_t shared_limit() const { return shared_limit_; }
  double* doubles(int64_t n) { return static_cast<double*>(memory(size_t(n) * 8)); }
  template <typename scalar>
  scalar* scratch(int64_t n) {
    return static_cast<scalar*>(memory(size_t(n) * sizeof(scalar)));
  }
  template <class Kernel, class... Arguments>
  void run(Kernel kernel, int64_t blocks, int threads, size_t shared, Arguments... arguments) {
    if (shared > shared_limit_) fail("more shared memory than the device has");
    ++launches;
    emulation::run(blocks, threads, shared, [=] { kernel(arguments...); });
  }
  int launches = 0;

 private:
  // What is not written is NaN.
  void* memory(size_t bytes) {
    lent_.emplace_back(bytes / 8 + 1, std::nan(""));
    return lent_.back().data();
  }
  int64_t processors_;
  size_t shared_limit_;
  std::vector<std::vector<double>> lent_;
};

}  // namespace emulation
