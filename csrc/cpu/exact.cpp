// Whether this library was built with arithmetic as it is written: its loader refuses one that was not.
#include <cstdint>
#include <cstring>

extern "C" __attribute__((visibility("default"))) int bcl_cpu_exact() {
    volatile float zero = 0, one = 1, three = 3, ten = 10, little = 0x1p-25f;  // so that the compiler knows no value
    const float nan = zero / zero, a = one, b = little, sum = -zero + 0.0f;
    const bool nan_differs = nan != nan;                     // not with -ffinite-math-only
    const bool order_stands = (a + b) - a != b;              // not with -fassociative-math
    const bool quotient_is_one = ten / 3.0f == ten / three;  // not with -freciprocal-math
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);                   // not 0 with -fno-signed-zeros
    return nan_differs && order_stands && quotient_is_one && bits == 0;
}
