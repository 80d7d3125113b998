#if defined(__x86_64__)
#define XLARANK_ISA kAvx2
#define XLARANK_LANES 8
#include "pool_kernel.inc"
#endif
