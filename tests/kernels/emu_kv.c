/* SPDX-License-Identifier: Apache-2.0 */
/* Guards FP8 rows of the KV pool on the GPU backend, beside the checks of test_kernels_kv: whole
 * models are near the reference kernels over such a pool, and a prompt cut gives the same bytes. */
#include "tests/engine_util.h"
#include "tests/kernels/kernels_util.h"

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
        cmocka_unit_test(whole_models_are_near_and_pure),
    };
    RUN_EMULATED(tests);
}
