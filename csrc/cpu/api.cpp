// The C interface of the CPU backend, and the choice of instruction set. It knows nothing of torch.
#include <cstdlib>
#include <cstring>

#include "interface.h"

#define API extern "C" __attribute__((visibility("default")))

namespace bcl {
namespace {

const char* isa = "baseline";

template <class Real> const Stages<Real>& baseline();
template <> const Stages<float>& baseline<float>() { return baseline_float; }
template <> const Stages<double>& baseline<double>() { return baseline_double; }
#if defined(__x86_64__)
template <class Real> const Stages<Real>& avx2();
template <> const Stages<float>& avx2<float>() { return avx2_float; }
template <> const Stages<double>& avx2<double>() { return avx2_double; }
template <class Real> const Stages<Real>& avx512();
template <> const Stages<float>& avx512<float>() { return avx512_float; }
template <> const Stages<double>& avx512<double>() { return avx512_double; }
#endif

// The widest that this processor has; BCL_FAST_ISA=avx2 or baseline takes a narrower one, for tests.
template <class Real>
const Stages<Real>& choose() {
#if defined(__x86_64__)
    const char* asked = getenv("BCL_FAST_ISA");
    const bool any = !asked || !*asked;
    __builtin_cpu_init();
    if ((any || !strcmp(asked, "avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
        isa = "avx512";
        return avx512<Real>();
    }
    if ((any || !strcmp(asked, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        isa = "avx2";
        return avx2<Real>();
    }
#endif
    return baseline<Real>();
}

const Stages<float>& stages_float = choose<float>();
const Stages<double>& stages_double = choose<double>();

}  // namespace
}  // namespace bcl

// The number changes with any function of the library, with any struct of interface.h, and with what a Status means.
API int bcl_cpu_abi() { return 8; }
API const char* bcl_cpu_isa() { return bcl::isa; }

#define STAGE(name, Struct)                                                                                   \
    API int bcl_cpu_##name##_f32(const bcl::Struct<float>* s, int threads) {                                  \
        return bcl::stages_float.name(*s, threads);                                                           \
    }                                                                                                         \
    API int bcl_cpu_##name##_f64(const bcl::Struct<double>* s, int threads) {                                 \
        return bcl::stages_double.name(*s, threads);                                                          \
    }

STAGE(neighbors, Neighbors)
STAGE(competition, Competition)
STAGE(inverse_norm, InverseNorm)
STAGE(selection, Selection)
STAGE(targets, Targets)
STAGE(forward, Forward)
STAGE(pull, Pull)
STAGE(gradient, Gradient)
STAGE(rank, Rank)
