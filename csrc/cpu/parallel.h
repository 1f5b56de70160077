// Threads for one call: started by it, joined by it.
//
// No OpenMP, whose second runtime would oversubscribe beside torch's, and no pool, which a fork
// (every DataLoader worker) would leave without its threads. Starting a thread costs some 20 us, so
// callers choose a grain that outweighs it.
#pragma once

#include <cstdint>

namespace rtk {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
void parallel_run(int64_t n, int64_t grain, int threads, RangeFn fn, void* context);

// Calls fn(begin, end) once for every [i * grain, (i + 1) * grain) of [0, n), on up to `threads`
// threads. The ranges do not depend on the number of threads, so partial sums per range do not either.
template <class Fn>
void parallel_for(int64_t n, int64_t grain, int threads, Fn&& fn) {
  parallel_run(
      n, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Fn*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace rtk
