// Prints the GFLOP/s of fused multiply-adds in registers on all OpenMP threads: the best of several runs. bench_ops.py
// compiles this file with -O3 -march=native -fopenmp.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include <omp.h>

#ifdef __AVX512F__
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kChains = 10;  // enough to hide the latency, few enough for 16 registers
constexpr long kSteps = 2000000;

float run(float start) {
  const Vec factor = Vec{} + 0.999f, term = Vec{} + start;
  Vec a = term, b = term, c = term, d = term, e = term, f = term, g = term, h = term, i = term, j = term;
  for (long step = 0; step < kSteps; ++step) {
    a = a * factor + term, b = b * factor + term, c = c * factor + term, d = d * factor + term, e = e * factor + term;
    f = f * factor + term, g = g * factor + term, h = h * factor + term, i = i * factor + term, j = j * factor + term;
#if defined(__x86_64__)
    asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j));
#endif
  }
  return (a + b + c + d + e + f + g + h + i + j)[0];
}

int main() {
  double best = 0.0;
  float sink = 0.0f;
  for (int repeat = 0; repeat < 8; ++repeat) {
    const auto began = std::chrono::steady_clock::now();
#pragma omp parallel reduction(+ : sink)
    sink += run(static_cast<float>(omp_get_thread_num()));
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    best = std::max(best, 2.0 * kLanes * kChains * kSteps * omp_get_max_threads() / took.count() / 1e9);
  }
  std::printf("%.1f\n", best);
  return sink == 1.0f;  // so that the compiler does not remove the computation
}
