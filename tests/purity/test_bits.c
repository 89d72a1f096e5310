/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: bits do not change silently. tests/goldens/bits.txt holds, per model and numerics
 * profile, a hash of the logits of a fixed input; it must come out under gcc and clang, at -O1 and
 * -O3. A kernel that changes bits on purpose raises its op's revision in kernels/profile.c: then
 * the profile's id is new and a line is added. */
#include "tests/engine_util.h"

#include "base/hash.h"

enum { PROMPT = 600, VOCAB = 256 }; /* past one split of 512 ranks */

/* What a line is about, beside the model. */
typedef struct setting {
    const char *isa;
    td_dtype type;
    int act_i8, kv_fp8;
} setting;

static void hash_of(const char *dir, const setting *s0, char *line, size_t size, const char *name)
{
    uint32_t ids[PROMPT];
    float logits[VOCAB];
    uint8_t sum[16];
    char id[33], hex[33];
    td_hash h;
    test_engine t = test_open((test_setup){.dir = dir,
                                           .isa = s0->isa,
                                           .type = s0->type,
                                           .act_i8 = s0->act_i8,
                                           .kv_fp8 = s0->kv_fp8,
                                           .threads = 1,
                                           .max_rows = PROMPT,
                                           .max_seqs = 1,
                                           .n_blocks = 16});
    test_random_ids(42, t.info->vocab_size, ids, PROMPT);
    td_seq *s = test_seq(&t, ids, PROMPT, PROMPT, (td_sampling){0}, 32);
    td_hash_init(&h, NULL, 0, sizeof sum);
    for (int i = 0; i < 16; i++) {
        td_seq_append(s, test_prefill(&t, s, PROMPT, logits));
        td_hash_add(&h, logits, sizeof logits);
    }
    td_hash_final(&h, sum);
    snprintf(line, size, "%s %s %s %s", name, td_dtype_name(s0->type),
             td_hex(t.info->profile_id, 16, id), td_hex(sum, 16, hex));
    td_seq_free(s);
    test_close(&t);
}

static int listed(const char *line)
{
    char have[256];
    int found = 0;
    FILE *f = fopen(TD_SOURCE_DIR "/tests/goldens/bits.txt", "r");
    assert_non_null(f);
    while (!found && fgets(have, sizeof have, f)) {
        have[strcspn(have, "\n")] = 0;
        found = strcmp(have, line) == 0;
    }
    fclose(f);
    return found;
}

static int missing_line(const char *name, setting s)
{
    char dir[512], line[256];
    snprintf(dir, sizeof dir, "%s/tests/goldens/models/%s", TD_SOURCE_DIR, name);
    hash_of(dir, &s, line, sizeof line, name);
    if (listed(line))
        return 0;
    printf("%s\n", line);
    return 1;
}

static int missing_lines(const char *isa)
{
    static const char *const names[] = {"glm-shared", "glm-groups", "glm-mixed",    "qwen3",
                                        "qwen3-tied", "glm-fp8",    "glm-mxfp4-all"};
    int missing = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (td_dtype type = TD_F32; type <= TD_BF16; type++)
            missing += missing_line(names[i], (setting){.isa = isa, .type = type});
    missing += missing_line("glm-mxfp4-all", (setting){isa, TD_BF16, .act_i8 = 1});
    missing += missing_line("glm-shared", (setting){isa, TD_BF16, .kv_fp8 = 1});
    missing += missing_line("qwen3", (setting){isa, TD_BF16, .kv_fp8 = 1});
    return missing;
}

static void logits_have_their_committed_bits(void **state)
{
    int missing = 0;
    for (int i = 0; i < TEST_ISAS; i++)
        if (test_has_isa(test_isas[i]))
            missing += missing_lines(test_isas[i]);
    if (missing)
        fail_msg("%d lines above are not in tests/goldens/bits.txt: an op changed bits; raise its "
                 "revision in "
                 "kernels/profile.c and commit the new lines",
                 missing);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(logits_have_their_committed_bits)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
