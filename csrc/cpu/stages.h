// The stages, compiled once per instruction set: BYTES is the width of a vector, ISA names the copy.
#include "forward.h"
#include "gradient.h"
#include "neighbors.h"
#include "rank.h"

#define NAME_(isa, real) isa##_##real
#define NAME(isa, real) NAME_(isa, real)

namespace bcl {

namespace {

template <class Real>
constexpr Stages<Real> STAGES = {neighbors<Real>, competition<Real>, inverse_norm<Real>, selection<Real>,
                                 targets<Real>,   forward<Real>,     pull<Real>,         gradient<Real>,
                                 rank<Real>};

}  // namespace

const Stages<float> NAME(ISA, float) = STAGES<float>;
const Stages<double> NAME(ISA, double) = STAGES<double>;

}  // namespace bcl
