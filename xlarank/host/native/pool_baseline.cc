#define XLARANK_POOL pool_baseline
#define XLARANK_LANES 4
#include "pool_kernel.inc"
