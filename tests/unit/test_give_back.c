/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: a loaded checkpoint is in memory once. What was copied into packed weights leaves the
 * page cache; a packed file, which is the weights, stays. */
#include "tests/engine_util.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "engine/model_files.h"
#include "engine/safetensors.h"
#include "tests/files_util.h"

static const char MODEL[] = TD_SOURCE_DIR "/tests/goldens/models/glm-fp8";
static char dir[64], packed[64];

/* Pages of a file, and how many of them are in memory; drop: after the system was asked for all. */
static size_t resident(const char *folder, const char *name, int drop, size_t *ret_pages)
{
    char path[256];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(fsync(fd), 0); /* what is not written yet cannot be given back */
    if (drop)
        assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    close(fd);
    static unsigned char there[1 << 12];
    size_t n = 0, pages = ((size_t)st.st_size + 4095) / 4096;
    assert_true(pages <= sizeof there);
    assert_int_equal(mincore(p, (size_t)st.st_size, there), 0);
    munmap(p, (size_t)st.st_size);
    for (size_t i = 0; i < pages; i++)
        n += there[i] & 1;
    *ret_pages = pages;
    return n;
}

static int make_copy(void **state)
{
    /* /tmp often lies in memory; where this one does too, the tests say that they saw nothing */
    snprintf(dir, sizeof dir, "/var/tmp/td_test_give_back_XXXXXX");
    snprintf(packed, sizeof packed, "/var/tmp/td_test_give_back_XXXXXX");
    if (!mkdtemp(dir) || !mkdtemp(packed))
        return -1;
    test_copy_file(MODEL, dir, "config.json");
    test_copy_file(MODEL, dir, "model.safetensors");
    return 0;
}

static int remove_copy(void **state)
{
    td_model_files_remove(dir);
    td_model_files_remove(packed);
    return 0;
}

static void need_a_page_cache(void)
{
    size_t pages;
    if (resident(dir, "model.safetensors", 1, &pages) == 0)
        return;
    printf("skipped: /var/tmp keeps every page in memory (tmpfs?), or mincore tells nothing\n");
    skip();
}

static td_model *opened(const char *from, const char *pack_to)
{
    td_err err = {0};
    td_model *m = NULL;
    td_model_options o = {.isa = "auto",
                          .act = TD_BF16,
                          .kv = TD_BF16,
                          .index = TD_BF16,
                          .n_threads = 2,
                          .n_ranks = 1,
                          .pack_to = pack_to};
    if (td_model_open(from, &o, &m, &err) < 0)
        fail_msg("%s", err.text);
    return m;
}

static void a_loaded_checkpoint_leaves_the_page_cache(void **state)
{
    size_t pages;
    need_a_page_cache();
    td_model *m = opened(dir, NULL);
    assert_int_equal(resident(dir, "model.safetensors", 0, &pages), 0);
    assert_true(pages > 100);
    td_model_free(m);
}

/* The test above proves nothing unless loading puts the pages there. */
static void reading_a_checkpoint_fills_the_page_cache(void **state)
{
    size_t pages;
    td_err err = {0};
    td_st *st = NULL;
    unsigned sum = 0;
    need_a_page_cache();
    assert_int_equal(td_st_open(dir, &st, &err), 0);
    for (size_t i = 0; i < td_st_count(st); i++)
        for (uint64_t at = 0; at < td_st_at(st, i)->bytes; at += 512)
            sum += td_st_at(st, i)->data[at];
    assert_true(resident(dir, "model.safetensors", 0, &pages) > pages * 9 / 10);
    td_st_give_back(st);
    assert_int_equal(resident(dir, "model.safetensors", 0, &pages), 0);
    for (size_t i = 0; i < td_st_count(st); i++) /* from the disk again, and the same */
        for (uint64_t at = 0; at < td_st_at(st, i)->bytes; at += 512)
            sum -= td_st_at(st, i)->data[at];
    assert_int_equal(sum, 0);
    td_st_close(st);
}

static void a_packed_model_stays(void **state)
{
    size_t pages;
    td_err err = {0};
    need_a_page_cache();
    if (!td_backend_get("auto")->layout)
        skip(); /* this machine has no packed kernels */
    td_model_free(opened(dir, packed));
    assert_int_equal(resident(dir, "model.safetensors", 0, &pages), 0);
    assert_int_equal(td_model_files_copy(dir, packed, 1, &err), 0);
    td_model *m = opened(packed, NULL);
    assert_true(resident(packed, "model.tdpack", 0, &pages) > pages * 9 / 10);
    td_model_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reading_a_checkpoint_fills_the_page_cache),
        cmocka_unit_test(a_loaded_checkpoint_leaves_the_page_cache),
        cmocka_unit_test(a_packed_model_stays),
    };
    return cmocka_run_group_tests(tests, make_copy, remove_copy);
}
