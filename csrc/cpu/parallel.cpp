#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace rtk {

void parallel_run(int64_t n, int64_t grain, int threads, RangeFn fn, void* context) {
  const int64_t ranges = (n + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_lock;

  auto work = [&] {
    try {
      for (int64_t range; (range = next.fetch_add(1)) < ranges;) {
        fn(context, range * grain, std::min(n, (range + 1) * grain));
      }
    } catch (...) {
      next = ranges;
      const std::lock_guard<std::mutex> hold(failure_lock);
      failure = std::current_exception();
    }
  };

  std::vector<std::thread> helpers;
  const int64_t helper_count = std::min<int64_t>(threads, ranges) - 1;
  try {
    for (int64_t i = 0; i < helper_count; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No thread to be had: the ones there are take all ranges.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace rtk
