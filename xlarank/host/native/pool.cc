#include "pool.h"

#include <cstring>

namespace xlarank {

const IsaFunctions* isa_functions(const char* isa) {
  const auto wants = [isa](const char* name) { return !std::strcmp(isa, name) || !std::strcmp(isa, "auto"); };
#if defined(__x86_64__)
  // The compiled forms use F16C too; without it a CPU takes the baseline.
  const bool f16c = __builtin_cpu_supports("f16c");
  if (wants("avx512") && f16c && __builtin_cpu_supports("avx512f")) return &kAvx512;
  if (wants("avx2") && f16c && __builtin_cpu_supports("avx2")) return &kAvx2;
#endif
  return wants("baseline") ? &kBaseline : nullptr;
}

}  // namespace xlarank
