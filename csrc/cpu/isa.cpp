#include <cstdlib>
#include <stdexcept>

#include "build_config.h"
#include "rtk.h"

namespace rtk {

namespace base {
extern const CpuOps ops;
}
#ifdef RTK_X86
namespace avx2 {
extern const CpuOps ops;
}
namespace avx512 {
extern const CpuOps ops;
}
#endif

namespace {

struct Isa {
  const char* name;
  bool supported;
  const CpuOps* ops;
};

std::vector<Isa> best_first() {
  return {
#ifdef RTK_X86
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       &avx512::ops},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::ops},
#endif
      {"default", true, &base::ops},
  };
}

Isa choose() {
  const char* forced = std::getenv("RTK_CPU_ISA");
  const std::string wanted = forced ? forced : "";
  std::string names;
  for (const Isa& isa : best_first()) {
    if (isa.supported && (wanted.empty() || wanted == isa.name)) return isa;
    if (isa.supported) names = isa.name + (names.empty() ? "" : ", " + names);
  }
  throw std::runtime_error("RTK_CPU_ISA=" + wanted + ": this machine and build have " + names);
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const CpuOps& cpu_ops() { return *chosen().ops; }

std::string cpu_isa() { return chosen().name; }

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : best_first()) names.insert(names.begin(), isa.name);
  return names;
}

}  // namespace rtk
