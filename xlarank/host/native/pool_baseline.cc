#define XLARANK_ISA kBaseline
#define XLARANK_LANES 4
#include "pool_kernel.inc"
