// The stages for any processor: 16-byte vectors (SSE2, NEON, or what the compiler makes of them).
#define BYTES 16
#define ISA baseline
#include "stages.h"
