/* SPDX-License-Identifier: Apache-2.0 */
/* Guards FP8 rows of the KV pool on the GPU backend, beside test_kernels_kv: rows that are loaded
 * 16 bytes at a time attend with the bits of the BF16 rows they stand for, at GLM-5.2's widths with
 * the heads of 4 and 8 ranks; whole models are near the reference kernels over such a pool, and a
 * prompt cut gives the same bytes. */
#include "tests/engine_util.h"
#include "tests/kernels/kernels_util.h"

#include "kernels/kv_row.h"

enum { POS = 100, BLOCKS = 2, C = 512, R = 64, HKV = 2, DH = 128, HEADS_MAX = 16 };

typedef struct pool {
    td_queue *q;
    td_step st;
    td_kv_row row;
    uint32_t positions[1], seq_of[1], table[BLOCKS];
} pool;

static void build(pool *p, td_kv_row row)
{
    *p = (pool){.q = open_queue(TD_BF16, 1), .row = row, .positions = {POS}, .table = {1, 0}};
    p->st = (td_step){.n_rows = 1,
                      .n_seqs = 1,
                      .max_context = POS + 1,
                      .positions = p->positions,
                      .seq_of = p->seq_of,
                      .tables = p->table,
                      .table_stride = BLOCKS,
                      .block_bytes = row.layer_bytes};
    p->st.kv_base = (uint8_t *)floats(BLOCKS * row.layer_bytes / 4);
}

/* The group of an element of parts of whole groups but the last: GLM-5.2's and GQA's of 128. */
static void fill(pool *f8, pool *half)
{
    for (uint32_t i = 0; i < BLOCKS * 64; i++) {
        size_t block = i / 64 * f8->st.block_bytes;
        uint8_t *codes = f8->st.kv_base + block + i % 64 * f8->row.bytes;
        float *scales = (float *)(void *)(f8->st.kv_base + block + f8->row.scales_at) +
                        i % 64 * f8->row.n_scales;
        uint8_t *to =
            half->st.kv_base + i / 64 * half->st.block_bytes + i % 64 * (size_t)half->row.bytes;
        for (uint32_t s = 0; s < f8->row.n_scales; s++)
            scales[s] = 0.001f + 0.004f * fabsf(value(0));
        for (uint32_t e = 0; e < f8->row.elems; e++) {
            codes[e] = (uint8_t)td_rng_next(&rng);
            codes[e] ^= (codes[e] & 0x7f) == 0x7f;
            float v = bf16_of(td_e4m3_to_f32(codes[e]) * scales[e / 128]);
            memcpy(to + 2ul * e, (char *)&v + 2, 2);
        }
    }
}

static void attend(pool *p, td_dtype kv, int mla, uint32_t heads, const float *q, float *o)
{
    td_attend_mla m = {.q_lat = q,
                       .q = q + HEADS_MAX * C,
                       .scale = 0.05f,
                       .n_heads = heads,
                       .latent = C,
                       .rope_dims = R,
                       .kv = kv,
                       .o_lat = o};
    td_attend_gqa g = {
        .q = q, .scale = 0.05f, .n_heads = heads, .n_kv_heads = HKV, .dims = DH, .kv = kv, .o = o};
    if (mla)
        under->attend_mla(p->q, &p->st, &m);
    else
        under->attend_gqa(p->q, &p->st, &g);
    assert_int_equal(under->finish(p->q), 0);
}

static void same_bits(int mla, uint32_t heads)
{
    pool p[2];
    for (int i = 0; i < 2; i++) {
        td_dtype kv = i ? TD_BF16 : TD_F8E4M3;
        build(&p[i], mla ? td_kv_row_mla(kv, C, R) : td_kv_row_gqa(kv, HKV, DH));
    }
    fill(&p[0], &p[1]);
    float *q = random_floats(HEADS_MAX * (C + R), 0), *o[2];
    size_t n = (size_t)heads * (mla ? C : DH);
    for (int i = 0; i < 2; i++) {
        o[i] = floats(n);
        attend(&p[i], i ? TD_BF16 : TD_F8E4M3, mla, heads, q, o[i]);
    }
    assert_memory_equal(o[0], o[1], n * sizeof(float));
    assert_true(fabsf(o[0][0]) > 0.0f);
    for (int i = 0; i < 2; i++)
        under->close(p[i].q);
    check_guards();
}

static void rows_in_whole_vectors_attend_as_the_bf16_rows_they_stand_for(void **state)
{
    same_bits(1, 64 / 4);
    same_bits(1, 64 / 8);
    same_bits(0, 8);
}

enum { PROMPT = 40, VOCAB = 256 };

static void run_model(const char *dir, const td_backend *be, uint32_t chunk, float logits[VOCAB])
{
    uint32_t ids[PROMPT];
    test_engine t = test_open((test_setup){.dir = dir,
                                           .backend = be,
                                           .type = TD_BF16,
                                           .kv_fp8 = 1,
                                           .threads = 1,
                                           .max_rows = 64,
                                           .max_seqs = 2,
                                           .n_blocks = 8});
    assert_non_null(strstr(t.info->profile, "kv=fp8\n"));
    test_random_ids(3, VOCAB, ids, PROMPT);
    td_seq *s = test_seq(&t, ids, PROMPT, PROMPT, (td_sampling){.temperature = 0.0f}, 2);
    test_prefill(&t, s, chunk, logits);
    td_seq_free(s);
    test_close(&t);
}

/* Operands and sums round as with BF16 rows; a row's element that lies at a border of e4m3 may fall
 * on its other side, which is 2^-4 of it. */
static void whole_models_are_near_and_pure(void **state)
{
    static const char *const models[] = {TD_SOURCE_DIR "/tests/goldens/models/glm-shared",
                                         TD_SOURCE_DIR "/tests/goldens/models/qwen3"};
    for (int m = 0; m < 2; m++) {
        float want[VOCAB], whole[VOCAB], cut[VOCAB];
        run_model(models[m], &td_backend_ref, PROMPT, want);
        run_model(models[m], under, PROMPT, whole);
        run_model(models[m], under, 7, cut);
        assert_memory_equal(cut, whole, sizeof whole);
        double worst = 0, size = 0;
        for (int i = 0; i < VOCAB; i++) {
            worst = fmax(worst, fabs((double)whole[i] - (double)want[i]));
            size = fmax(size, fabs((double)want[i]));
        }
        if (!(worst <= 0.05 * size))
            fail_msg("%s: logits are off by %g of the largest", models[m], worst / size);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_in_whole_vectors_attend_as_the_bf16_rows_they_stand_for),
        cmocka_unit_test(whole_models_are_near_and_pure),
    };
    RUN_EMULATED(tests);
}
