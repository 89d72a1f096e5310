/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/ref/int8.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/formats.h"

#include "base/banned.h"

int td_ref_mx_alloc(ref_mx *w)
{
    size_t elems = (size_t)w->v.slabs * w->v.n_panels * w->v.k * LANES;
    w->doubled = calloc(elems ? elems : 1, 1);
    w->scales = calloc(elems / TD_MX_GROUP + 1, sizeof *w->scales);
    if (w->doubled && w->scales)
        return 0;
    td_ref_mx_free(w);
    return -ENOMEM;
}

void td_ref_mx_free(ref_mx *w)
{
    free(w->doubled);
    free(w->scales);
    w->doubled = NULL;
    w->scales = NULL;
}

static size_t first_of(const td_tensor *w, uint32_t slab, uint32_t panel)
{
    return ((size_t)slab * w->n_panels + panel) * w->k * LANES;
}

void td_ref_mx_fill(ref_mx *w, uint32_t slab, uint32_t n, const uint8_t *codes,
                    const uint8_t *scales)
{
    size_t first = first_of(&w->v, slab, n / LANES);
    int8_t *doubled = w->doubled + first + n % LANES;
    float *scale = w->scales + first / TD_MX_GROUP + n % LANES;
    for (uint32_t k = 0; k < w->v.k; k++)
        doubled[(size_t)k * LANES] = td_e2m1_doubled[codes[k / 2] >> (k % 2 * 4) & 15];
    for (uint32_t g = 0; g < w->v.k / TD_MX_GROUP; g++)
        scale[(size_t)g * LANES] = td_e8m0_to_f32(scales[g]);
}

/* 32 values to int8; returns half of their scale (weights are doubled). NaN makes it NaN. */
static float quantise(const float a[TD_MX_GROUP], int32_t ret_q[TD_MX_GROUP])
{
    float most = 0.0f;
    for (int i = 0; i < TD_MX_GROUP; i++)
        if (!(fabsf(a[i]) <= most) && !isnan(most))
            most = fabsf(a[i]);
    float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    for (int i = 0; i < TD_MX_GROUP; i++) {
        float r = rintf(a[i] * inverse);
        ret_q[i] = r >= -128.0f && r <= 127.0f ? (int32_t)r : -128; /* not of finite values */
    }
    return most / 127.0f * 0.5f;
}

static void dot_i8(const float *a, const ref_mx *w, uint32_t slab, uint32_t panel, uint32_t k0,
                   uint32_t k1, float out[LANES])
{
    size_t first = first_of(&w->v, slab, panel);
    float acc[LANES] = {0};
    for (uint32_t k = k0; k < k1; k += TD_MX_GROUP) {
        int32_t q[TD_MX_GROUP], sum[LANES] = {0};
        float half = quantise(a + k, q);
        const int8_t *x = w->doubled + first + (size_t)k * LANES;
        const float *scale = w->scales + (first + (size_t)k * LANES) / TD_MX_GROUP;
        for (uint32_t i = 0; i < TD_MX_GROUP; i++)
            for (uint32_t l = 0; l < LANES; l++)
                sum[l] += q[i] * x[i * LANES + l];
        for (uint32_t l = 0; l < LANES; l++)
            acc[l] = acc[l] + (float)sum[l] * half * scale[l];
    }
    memcpy(out, acc, sizeof acc);
}

void td_ref_meet1(const td_queue *q, const float *a, const td_tensor *w, uint32_t slab,
                  uint32_t panel, uint32_t k0, uint32_t k1, float out[LANES])
{
    if (ref_is_i8(q, w))
        dot_i8(a, (const ref_mx *)w, slab, panel, k0, k1, out);
    else
        td_ref_dot1(a, ref_panel(w, slab, panel), k0, k1, out);
}

void td_ref_meet2(const td_queue *q, const float *a, const float *b, const td_tensor *w,
                  uint32_t slab, uint32_t panel, uint32_t k0, uint32_t k1, float out[2 * LANES])
{
    if (ref_is_i8(q, w)) {
        dot_i8(a, (const ref_mx *)w, slab, panel, k0, k1, out);
        dot_i8(b, (const ref_mx *)w, slab, panel, k0, k1, out + LANES);
        return;
    }
    td_ref_dot2(a, b, ref_panel(w, slab, panel), k0, k1, out);
}
