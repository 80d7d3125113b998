#if defined(__x86_64__)
#define XLARANK_ISA kAvx512
#define XLARANK_LANES 16
#include "pool_kernel.inc"
#endif
