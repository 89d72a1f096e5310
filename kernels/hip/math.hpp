/* SPDX-License-Identifier: Apache-2.0 */
/* exp and what is made of it: the host's own source (kernels/math_body.inc), so that a weight of
 * the sampler has the same bits on every device. */
#ifndef TD_KERNELS_HIP_MATH_HPP
#define TD_KERNELS_HIP_MATH_HPP

#include "kernels/hip/port.hpp"

#define TD_BODY(name) k_##name
#if defined(TD_EMU)
#define TD_BODY_TARGET
#else
#define TD_BODY_TARGET __attribute__((device))
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* the host uses more of it */
#include "kernels/math_body.inc"
#pragma GCC diagnostic pop

K_DEV float k_exp(float x)
{
    return k_exp1(x);
}

K_DEV float k_sigmoid(float x)
{
    return 1.0f / (1.0f + k_exp1(-x));
}

K_DEV float k_silu_mul(float x, float u)
{
    return x / (1.0f + k_exp1(-x)) * u;
}

#endif
