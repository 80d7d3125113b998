#include "stamps.h"

#include <sched.h>

namespace xlarank {
namespace {

// Looks between two yields: more than a copy of a row takes, so that only a writer without a core is waited for
// in the kernel.
constexpr int kLooks = 256;

}  // namespace

uint32_t wait_until_written(const uint32_t* stamp) {
  for (;;) {
    for (int look = 0; look < kLooks; ++look) {
      const uint32_t found = __atomic_load_n(stamp, __ATOMIC_ACQUIRE);
      if (!(found & 1)) return found;
    }
    sched_yield();
  }
}

}  // namespace xlarank
