/* SPDX-License-Identifier: Apache-2.0 */
/* Guards promise 3 at its root: a block is found only under the hash it was indexed with, never
 * while it may be overwritten; counts add up after any sequence of operations (checked against a
 * plain model by seed). */
#include "tests/engine_util.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "base/memory.h"

enum { N = 24, HASHES = 40 };

static td_kv_pool *open_pool(uint32_t n)
{
    td_kv_layout l = {.block_bytes = 4096, .n_groups = 1};
    td_kv_pool *p = NULL;
    td_err err = {0};
    if (td_kv_pool_open(&l, n, &p, &err) < 0)
        fail_msg("%s", err.text);
    return p;
}

static void hash_of(uint32_t i, uint8_t h[16])
{
    memset(h, 0, 16);
    memcpy(h + 4, &i, 4); /* equal first words: all in one bucket */
}

static void check_sum(td_kv_pool *p)
{
    td_kv_stats s;
    td_kv_pool_stats(p, &s);
    assert_int_equal(s.n_free + s.n_cached + s.n_used, s.n_blocks);
    assert_int_equal(td_kv_available(p), s.n_free + s.n_cached);
}

static void all_or_nothing(void **state)
{
    td_kv_pool *p = open_pool(4);
    td_block b[5];
    assert_int_equal(td_kv_alloc(p, 5, b), -ENOSPC);
    assert_int_equal(td_kv_available(p), 4);
    assert_int_equal(td_kv_alloc(p, 3, b), 0);
    assert_int_equal(td_kv_alloc(p, 2, b + 3), -ENOSPC);
    assert_int_equal(td_kv_available(p), 1);
    for (int i = 0; i < 3; i++)
        td_kv_unref(p, b[i]);
    check_sum(p);
    td_kv_pool_free(p);
}

/* Promise 5: memory that is not there is refused at start, not when a prompt needs it. */
static void more_than_the_machine_has(void **state)
{
    td_kv_layout l = {.block_bytes = 1 << 20, .n_groups = 1};
    uint64_t n = (td_memory_limit() >> 20) + 1;
    td_kv_pool *p = NULL;
    td_err err = {0};
    if (n > 1 << 24)
        skip(); /* 16 TiB */
    assert_int_equal(td_kv_pool_open(&l, (uint32_t)n, &p, &err), -ENOMEM);
    assert_non_null(strstr(err.text, "--kv-memory"));
    assert_null(p);
}

static void eviction_takes_the_least_recently_used(void **state)
{
    td_kv_pool *p = open_pool(3);
    td_block b[3], hit[3];
    uint8_t h[3][16];
    assert_int_equal(td_kv_alloc(p, 3, b), 0);
    for (uint32_t i = 0; i < 3; i++) {
        hash_of(i, h[i]);
        assert_int_equal(td_kv_index(p, b[i], h[i]), 0);
    }
    assert_int_equal(td_kv_index(p, b[0], h[1]), -EEXIST);
    for (int i = 0; i < 3; i++)
        td_kv_unref(p, b[i]);
    assert_int_equal(td_kv_lookup(p, h[0], 1, hit),
                     1); /* touches block 0: block 1 is the oldest now */
    td_kv_unref(p, hit[0]);
    assert_int_equal(td_kv_alloc(p, 1, b), 0);
    assert_int_equal(td_kv_peek(p, h[1], 1), 0);
    assert_int_equal(td_kv_peek(p, h[0], 1), 1);
    assert_int_equal(td_kv_peek(p, h[2], 1), 1);
    td_kv_unref(p, b[0]);
    assert_int_equal(td_kv_flush(p), 2);
    assert_int_equal(td_kv_peek(p, h[0], 3), 0);
    check_sum(p);
    td_kv_pool_free(p);
}

static void a_lookup_stops_at_the_first_miss(void **state)
{
    td_kv_pool *p = open_pool(4);
    td_block b[4], hit[4];
    uint8_t h[4][16];
    assert_int_equal(td_kv_alloc(p, 4, b), 0);
    for (uint32_t i = 0; i < 4; i++) {
        hash_of(i, h[i]);
        if (i != 1)
            assert_int_equal(td_kv_index(p, b[i], h[i]), 0);
    }
    assert_int_equal(td_kv_lookup(p, h[0], 4, hit), 1);
    assert_int_equal(td_kv_refs(p, b[0]), 2);
    assert_int_equal(td_kv_refs(p, b[2]), 1);
    td_kv_unref(p, b[0]);
    for (int i = 0; i < 4; i++)
        td_kv_unref(p, b[i]);
    td_kv_pool_free(p);
}

static void readers_of_the_descriptor_cannot_write(void **state)
{
    td_kv_pool *p = open_pool(2);
    int fd = td_kv_pool_memfd(p);
    assert_true(ftruncate(fd, 100) < 0);
    int seals = fcntl(fd, F_GET_SEALS);
    assert_true(seals & F_SEAL_SHRINK);
    assert_true(seals & F_SEAL_GROW);
    td_kv_data(p, 1)[5] = 42;
    uint8_t *view = mmap(NULL, 8192, PROT_READ, MAP_SHARED, fd, 0);
    assert_true(view != MAP_FAILED);
    assert_int_equal(view[4096 + 5], 42);
    munmap(view, 8192);
    td_kv_pool_free(p);
}

static void freed_blocks_are_poisoned_in_tests(void **state)
{
    td_kv_pool *p = open_pool(1);
    td_block b;
    assert_int_equal(td_kv_alloc(p, 1, &b), 0);
    memset(td_kv_data(p, b), 1, 4096);
    td_kv_unref(p, b);
    assert_int_equal(td_kv_data(p, b)[0], 0xff);
    assert_int_equal(td_kv_data(p, b)[4095], 0xff);
    td_kv_pool_free(p);
}

/* Random operations against what they must mean. content[b] = the hash last indexed on block b's
 * bytes. */
static void random_operations_keep_the_books(void **state)
{
    td_kv_pool *p = open_pool(N);
    td_rng rng = {9, 0};
    uint32_t refs[N] = {0};
    for (int step = 0; step < 20000; step++) {
        uint32_t what = (uint32_t)td_rng_below(&rng, 4), i = (uint32_t)td_rng_below(&rng, HASHES);
        td_block b[N];
        uint8_t h[16];
        hash_of(i, h);
        if (what == 0) {
            uint32_t n = 1 + (uint32_t)td_rng_below(&rng, 4), used = 0;
            for (uint32_t k = 0; k < N; k++)
                used += refs[k] != 0;
            int r = td_kv_alloc(p, n, b);
            assert_int_equal(r, used + n > N ? -ENOSPC : 0);
            for (uint32_t k = 0; r == 0 && k < n; k++) {
                assert_int_equal(refs[b[k]], 0); /* never hands out a block in use */
                refs[b[k]] = 1;
                memset(td_kv_data(p, b[k]), 0, 8);
            }
        } else if (what == 1) {
            uint32_t k = (uint32_t)td_rng_below(&rng, N);
            if (refs[k]) {
                refs[k]--;
                td_kv_unref(p, k);
            }
        } else if (what == 2) {
            uint32_t k = (uint32_t)td_rng_below(&rng, N), zero = 0;
            if (refs[k] && memcmp(td_kv_data(p, k), &zero, 4) == 0) {
                uint32_t mark = i + 1;
                if (td_kv_index(p, k, h) == 0)
                    memcpy(td_kv_data(p, k), &mark, 4);
            }
        } else if (td_kv_lookup(p, h, 1, b) == 1) {
            uint32_t mark;
            memcpy(&mark, td_kv_data(p, b[0]), 4);
            assert_int_equal(mark, i + 1); /* found under its own hash, bytes intact */
            refs[b[0]]++;
        }
        check_sum(p);
    }
    for (uint32_t k = 0; k < N; k++)
        assert_int_equal(td_kv_refs(p, k), refs[k]);
    td_kv_pool_free(p);
}

/* A layout as the architecture draws it: contiguous groups of at most 1 MiB, index keys for full
 * layers only. FP8 rows: a byte an element, and f32 scales inside the layer's range. */
static void layout_with(int kv_fp8, uint64_t row_bytes)
{
    test_engine t = test_open((test_setup){.dir = TD_SOURCE_DIR "/tests/goldens/models/glm-shared",
                                           .type = TD_BF16,
                                           .kv_fp8 = kv_fp8,
                                           .threads = 1,
                                           .max_rows = 4,
                                           .max_seqs = 1,
                                           .n_blocks = 2});
    const td_kv_layout *l = &t.info->kv;
    uint64_t at = 0, latent = 0, index = 0;
    for (uint32_t i = 0; i < l->n_groups; i++) {
        assert_int_equal(l->groups[i].offset, at);
        assert_true(l->groups[i].bytes <= 1 << 20);
        at += l->groups[i].bytes;
        int is_index = l->groups[i].kind == TD_KV_INDEX;
        *(is_index ? &index : &latent) += l->groups[i].n_layers;
        assert_int_equal(l->groups[i].scale_bytes, kv_fp8 && !is_index ? 64 * 2 * 4 : 0);
    }
    assert_int_equal(at, l->block_bytes);
    assert_int_equal(latent, 4);
    assert_int_equal(index, 2);
    assert_int_equal(l->block_bytes, 64 * (4 * row_bytes + 2 * 16 * 2));
    test_close(&t);
}

static void layout_is_contiguous(void **state)
{
    layout_with(0, 40 * 2);
    layout_with(1, 40 + 2 * 4);
}

int main(void)
{
    setenv("TD_KV_POISON", "1", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_or_nothing),
        cmocka_unit_test(more_than_the_machine_has),
        cmocka_unit_test(eviction_takes_the_least_recently_used),
        cmocka_unit_test(a_lookup_stops_at_the_first_miss),
        cmocka_unit_test(readers_of_the_descriptor_cannot_write),
        cmocka_unit_test(freed_blocks_are_poisoned_in_tests),
        cmocka_unit_test(random_operations_keep_the_books),
        cmocka_unit_test(layout_is_contiguous),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
