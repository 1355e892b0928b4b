// Elementary functions on Vec.
#pragma once

#include <math.h>

namespace gpt2rt::GPT2RT_ISA {
namespace {

// exp(x) to about 1 ulp; 0 below -104, infinity above 88.8, NaN for NaN.
//
// Reduction of Cody & Waite (Software Manual for the Elementary Functions, 1980): x = n ln 2 + r with |r| <= ln(2) / 2
// and ln 2 in two parts, of which n times the first is exact. Then the Taylor polynomial of degree 7, whose remainder
// r^8 / 8! is below 6e-9, and a scaling by 2^n.
inline Vec exp(Vec x) {
  // in this order a NaN passes through both
  x = min(set1(89.0f), max(set1(-105.0f), x));
  const Vec n = round_to_int(mul(x, set1(1.44269504088896341f)));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440054690583e-4f), r);
  Vec p = set1(1.0f / 5040.0f);
  p = fma(p, r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_pow2(p, n);
}

// 2^x for x <= 0 to about 1 ulp; 0 below -150, NaN for NaN.
//
// x = n + r with |r| <= 1/2, exactly; 2^r = 1 + r q(r), where q of degree 5 keeps the relative error of 2^r below
// 2e-9, the least that its degree allows (found by Lawson's algorithm, Math. Comp. 18, 1964).
inline Vec exp2_nonpositive(Vec x) {
  // in this order a NaN passes
  x = max(set1(-150.0f), x);
  const Vec n = round_to_int(x);
  const Vec r = sub(x, n);
  Vec p = set1(0.00015353361959569156f);
  p = fma(p, r, set1(0.0013398873852565885f));
  p = fma(p, r, set1(0.00961843691766262f));
  p = fma(p, r, set1(0.055503323674201965f));
  p = fma(p, r, set1(0.24022647738456726f));
  p = fma(p, r, set1(0.6931471824645996f));
  p = fma(p, r, set1(1.0f));
  return scale_pow2(p, n);
}

// x / (1 + exp(-scale x)) = x sigmoid(scale x)
inline Vec x_sigmoid(Vec x, Vec scaled) { return div(x, add(set1(1.0f), exp(sub(zero(), scaled)))); }

// 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))), with 1 + tanh(z) = 2 sigmoid(2 z); arXiv:1606.08415
inline Vec gelu_new(Vec u) {
  const Vec cubic = fma(mul(mul(u, u), u), set1(0.044715f), u);
  return x_sigmoid(u, mul(set1(1.5957691216057308f), cubic));
}

inline Vec apply(Activation activation, Vec v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kGeluNew:
      return gelu_new(v);
    case Activation::kRelu:
      // in this order a NaN passes
      return max(zero(), v);
    case Activation::kSilu:
      return x_sigmoid(v, v);
    case Activation::kQuickGelu:
      return x_sigmoid(v, mul(set1(1.702f), v));
    case Activation::kGelu:
    case Activation::kTanh: {
      // rare in this family of models, so the C library's accuracy is taken before speed
      float lanes[kLanes];
      store(lanes, v);
      for (int i = 0; i < kLanes; ++i) {
        const float x = lanes[i];
        lanes[i] = activation == Activation::kTanh ? ::tanhf(x) : 0.5f * x * (1.0f + ::erff(x * 0.70710678118654752f));
      }
      return load(lanes);
    }
  }
  return v;
}

}  // namespace
}  // namespace gpt2rt::GPT2RT_ISA
