#if defined(__x86_64__)
#define XLARANK_POOL pool_avx2
#define XLARANK_LANES 8
#include "pool_kernel.inc"
#endif
