/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: the forward pass is the model that transformers computes (tests/goldens/README.md), in
 * f32 to 2e-5 and in BF16 to 2e-2, at prompts below, at and above index_topk. Would catch: a wrong
 * rope pairing, a missing ReLU, head_dim read as the head's width, swapped nope and rope parts, a
 * bias that leaks into expert weights, a selection of another layer. */
#include "tests/engine_util.h"

#include <dirent.h>
#include <math.h>

#include "base/file.h"
#include "base/json.h"
#include "engine/probe.h"
#include "engine/safetensors.h"

enum { NAME = 256 };

typedef struct tolerance {
    const char *name;
    td_dtype type;
    double error, margin, gap; /* gap: top-1 must agree above it */
    int act_i8;                /* int8 operands: only for checkpoints in MXFP4 */
} tolerance;

enum { MAX_ROWS = 512 };

static const tolerance f32 = {"f32", TD_F32, 2e-5, 1e-4, 0.0, 0};
static const tolerance bf16 = {"bf16", TD_BF16, 2e-2, 4e-2, 4e-2, 0};
static const tolerance i8 = {"i8", TD_BF16, 4e-2, 8e-2, 8e-2, 1};

typedef struct golden {
    td_st *st;
    int prompt;
    const tolerance *tol;
    double margin; /* above it a choice must be the golden's */
    double gap;    /* top-1 must be equal above it */
    float scale;
    int norm;
    uint32_t injections, wrong;
} golden;

static const void *data(const golden *g, const char *what, uint64_t *ret_rows, uint64_t *ret_cols)
{
    char name[NAME];
    snprintf(name, sizeof name, "%d.%s", g->prompt, what);
    const td_st_tensor *t = td_st_find(g->st, name);
    if (!t)
        return NULL;
    if (ret_rows)
        *ret_rows = t->shape[0];
    if (ret_cols)
        *ret_cols = t->rank > 1 ? t->shape[1] : 1;
    return t->data;
}

static const void *layer_data(const golden *g, const char *what, uint32_t layer, uint64_t *ret_cols)
{
    char name[NAME];
    snprintf(name, sizeof name, "%s.%u", what, layer);
    return data(g, name, NULL, ret_cols);
}

/* At a safe margin the engine must have chosen what the golden says; else the golden's choice is
 * put in its place. */
static void decide(golden *g, const char *what, uint32_t layer, uint32_t position, double margin,
                   int same)
{
    if (same)
        return;
    if (margin >= g->margin) {
        fprintf(stderr, "  %s of layer %u at position %u differs at margin %g\n", what, layer,
                position, margin);
        g->wrong++;
    }
    g->injections++;
}

static void on_selected(void *arg, uint32_t layer, uint32_t position, uint32_t *selected,
                        uint32_t *n, uint32_t topk, float own)
{
    golden *g = arg;
    uint64_t cols;
    const int32_t *want = layer_data(g, "select", layer, &cols);
    const float *margin = layer_data(g, "select_margin", layer, NULL);
    if (!want)
        return;
    assert_int_equal(cols, topk);
    want += position * cols;
    uint32_t n_want = 0;
    while (n_want < topk && want[n_want] >= 0)
        n_want++;
    int same = n_want == *n && memcmp(want, selected, n_want * sizeof *want) == 0;
    decide(g, "selection", layer, position, (double)margin[position], same);
    memcpy(selected, want, n_want * sizeof *want);
    *n = n_want;
}

static int same_set(const int32_t *want, const uint32_t *got, uint32_t k)
{
    for (uint32_t i = 0; i < k; i++) {
        uint32_t j = 0;
        while (j < k && got[j] != (uint32_t)want[i])
            j++;
        if (j == k)
            return 0;
    }
    return 1;
}

static void on_routed(void *arg, uint32_t layer, uint32_t position, const float *scores,
                      uint32_t *experts, float *weights, uint32_t k, float own)
{
    golden *g = arg;
    uint64_t cols;
    const int32_t *want = layer_data(g, "experts", layer, &cols);
    const float *margin = layer_data(g, "experts_margin", layer, NULL);
    if (!want)
        return;
    assert_int_equal(cols, k);
    want += position * cols;
    int same = same_set(want, experts, k);
    decide(g, "experts", layer, position, (double)margin[position], same);
    if (same)
        return;
    float sum = 0.0f;
    for (uint32_t i = 0; i < k; i++)
        sum += scores[want[i]];
    for (uint32_t i = 0; i < k; i++) {
        experts[i] = (uint32_t)want[i];
        weights[i] = (g->norm ? scores[want[i]] / (sum + 1e-20f) : scores[want[i]]) * g->scale;
    }
}

static double row_error(const float *got, const float *want, uint32_t vocab)
{
    double diff = 0, max = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        double d = fabs((double)got[i] - (double)want[i]);
        diff = d > diff || isnan(d) ? d : diff;
        max = fabs((double)want[i]) > max ? fabs((double)want[i]) : max;
    }
    return diff / max;
}

/* Compute up to and including position p; its logits. */
static void compute_to(test_engine *t, td_seq *s, size_t p, float *logits)
{
    while (td_seq_computed(s) <= p) {
        size_t left = p + 1 - td_seq_computed(s);
        uint32_t n = left < MAX_ROWS ? (uint32_t)left : MAX_ROWS;
        td_step_item it = {.seq = s, .n_tokens = n, .want_logits = n == left, .ret_logits = logits};
        assert_int_equal(td_engine_step(t->engine, &it, 1, NULL), 0);
    }
}

static uint32_t argmax(const float *v, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (v[i] > v[best])
            best = i;
    return best;
}

/* Prefill the prompt (stopping at the rows whose logits are committed), then decode along the
 * golden's ids. Returns the largest error; every committed row is compared. */
static double follow(golden *g, test_engine *t, size_t n_prompt)
{
    uint64_t n_ids = 0, n_rows = 0, vocab = 0;
    const uint32_t *ids = data(g, "ids", &n_ids, NULL);
    const int32_t *rows = data(g, "rows", &n_rows, NULL);
    const float *want = data(g, "logits", NULL, &vocab), *gap = data(g, "gap", NULL, NULL);
    assert_int_equal(vocab, t->info->vocab_size);
    float *logits = malloc(vocab * sizeof *logits);
    td_seq *s = test_seq(t, ids, n_prompt, n_prompt, (td_sampling){0}, n_ids - n_prompt);
    assert_int_equal(td_seq_reserve(s, n_ids), 0);
    double worst = 0;
    size_t r = 0;
    for (size_t p = r < n_rows ? (size_t)rows[0] : n_prompt - 1; p + 1 < n_ids;) {
        compute_to(t, s, p, logits);
        if (r < n_rows && (size_t)rows[r] == p) {
            double e = row_error(logits, want + vocab * r++, (uint32_t)vocab);
            worst = e > worst || isnan(e) ? e : worst;
        }
        if (p + 1 >= n_prompt) {
            uint32_t id = argmax(logits, (uint32_t)vocab);
            if ((double)gap[p + 1 - n_prompt] > g->gap && id != ids[p + 1]) {
                fprintf(stderr, "  token %zu is %u, transformers says %u\n", p + 1, id, ids[p + 1]);
                g->wrong++;
            }
            td_seq_append(s, ids[p + 1]);
            p++;
        } else {
            p = r < n_rows && (size_t)rows[r] < n_prompt ? (size_t)rows[r] : n_prompt - 1;
        }
    }
    assert_int_equal(r, n_rows); /* a row that is never compared proves nothing */
    td_seq_free(s);
    free(logits);
    return worst;
}

static void check_prompt(const char *name, json_t *doc, td_st *st, int i, const tolerance *tol,
                         test_engine *t, float scale, int norm)
{
    json_t *p = json_array_get(json_object_get(doc, "prompts"), (size_t)i);
    json_int_t allowed = json_integer_value(json_object_get(p, tol == &f32  ? "injections"
                                                               : tol == &i8 ? "injections_i8"
                                                                            : "injections_bf16"));
    json_t *own = tol == &bf16 ? json_object_get(doc, "error_bf16") : NULL;
    json_t *flips = tol == &bf16 ? json_object_get(doc, "margin_bf16") : NULL;
    double error = own ? json_number_value(own) : tol->error;
    golden g = {.st = st,
                .margin = flips ? json_number_value(flips) : tol->margin,
                .prompt = i,
                .tol = tol,
                .gap = own ? 2 * error : tol->gap, /* two logits may each be off by that much */
                .scale = scale,
                .norm = norm};
    td_probe probe = {&g, on_selected, on_routed};
    td_engine_set_probe(t->engine, &probe);
    double worst = follow(&g, t, (size_t)json_integer_value(json_object_get(p, "n_prompt")));
    td_engine_set_probe(t->engine, NULL);
    printf("  %-12s %-5s %-12s error %.2e  injections %u (committed %d)\n", name, tol->name,
           json_string_value(json_object_get(p, "name")), worst, g.injections, (int)allowed);
    if (getenv("TD_GOLDEN_COUNT")) /* set it once to learn the figures that golden.json commits */
        return;
    assert_true(worst <= error);
    assert_int_equal(g.wrong, 0);
    assert_true(g.injections <= (uint32_t)allowed);
}

static void check_golden(const char *name, const char *isa, const tolerance *tol)
{
    char path[1024];
    td_err err = {0};
    json_t *doc = NULL, *config = NULL;
    td_st *st = NULL;
    snprintf(path, sizeof path, "%s/tests/goldens/%.200s/golden.json", TD_SOURCE_DIR, name);
    if (td_json_load(path, NULL, &doc, &err) < 0)
        fail_msg("%s", err.text);
    const char *dtype = json_string_value(json_object_get(doc, "dtype"));
    if (strcmp(dtype, "bf16") == 0 && tol == &f32) {
        json_decref(doc);
        return;
    }
    snprintf(path, sizeof path, "%s/tests/goldens/%.200s/golden.safetensors", TD_SOURCE_DIR, name);
    if (td_st_open_file(path, &st, &err) < 0)
        fail_msg("%s", err.text);
    snprintf(path, sizeof path, "%s/%s/config.json", TD_SOURCE_DIR,
             json_string_value(json_object_get(doc, "model")));
    assert_true(td_json_load(path, NULL, &config, &err) >= 0);
    double scale = json_number_value(json_object_get(config, "routed_scaling_factor"));
    int norm = !json_is_false(json_object_get(config, "norm_topk_prob"));
    path[strlen(path) - strlen("/config.json")] = 0;
    test_engine t = test_open((test_setup){.dir = path,
                                           .isa = isa,
                                           .type = tol->type,
                                           .act_i8 = tol->act_i8,
                                           .threads = 1,
                                           .max_rows = MAX_ROWS,
                                           .max_seqs = 2,
                                           .n_blocks = 64});
    size_t n = json_array_size(json_object_get(doc, "prompts"));
    for (size_t i = 0; i < n; i++)
        check_prompt(name, doc, st, (int)i, tol, &t, (float)scale, norm);
    test_close(&t);
    td_st_close(st);
    json_decref(config);
    json_decref(doc);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

static void check_all(const char *isa, const tolerance *tol)
{
    if (!test_has_isa(isa))
        return;
    printf(" %s\n", isa);
    char names[64][NAME];
    size_t n = 0;
    DIR *d = opendir(TD_SOURCE_DIR "/tests/goldens");
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) && n < 64;) {
        char path[1024];
        snprintf(path, sizeof path, "%s/tests/goldens/%.200s/golden.json", TD_SOURCE_DIR,
                 e->d_name);
        if (e->d_name[0] != '.' && access(path, R_OK) == 0)
            snprintf(names[n++], NAME, "%s", e->d_name);
    }
    closedir(d);
    assert_true(n >= 5);
    qsort(names, n, NAME, by_name);
    for (size_t i = 0; i < n; i++)
        if (!tol->act_i8 || strstr(names[i], "mxfp4"))
            check_golden(names[i], isa, tol);
}

static void goldens_in_f32(void **state)
{
    for (int i = 0; i < TEST_ISAS; i++)
        check_all(test_isas[i], &f32);
}

static void goldens_in_bf16(void **state)
{
    for (int i = 0; i < TEST_ISAS; i++)
        check_all(test_isas[i], &bf16);
}

static void goldens_in_int8(void **state)
{
    for (int i = 0; i < TEST_ISAS; i++)
        check_all(test_isas[i], &i8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(goldens_in_f32),
                                       cmocka_unit_test(goldens_in_bf16),
                                       cmocka_unit_test(goldens_in_int8)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
