#include "pool.h"

#include <cstring>

namespace xlarank {

PoolFunction pool_function(const char* isa) {
  const auto wants = [isa](const char* name) { return !std::strcmp(isa, name) || !std::strcmp(isa, "auto"); };
#if defined(__x86_64__)
  if (wants("avx512") && __builtin_cpu_supports("avx512f")) return pool_avx512;
  if (wants("avx2") && __builtin_cpu_supports("avx2")) return pool_avx2;
#endif
  return wants("baseline") ? pool_baseline : nullptr;
}

}  // namespace xlarank
