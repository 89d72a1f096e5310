/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/selftest.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/rand.h"
#include "cli/model.h"
#include "engine/engine.h"
#include "engine/golden.h"
#include "engine/model_files.h"

#include "base/banned.h"

/* More tokens than the built-in model's index_topk, so that some positions are left out. */
enum { PROMPT = 40, STEPS = 4, PIECE = 7, ROWS = 64, BLOCKS = 8 };

static const char config[] =
    "{\"architectures\": [\"GlmMoeDsaForCausalLM\"], \"model_type\": \"glm_moe_dsa\",\n"
    " \"dtype\": \"bfloat16\", \"attention_bias\": false, \"eos_token_id\": [0],\n"
    " \"hidden_act\": \"silu\", \"hidden_size\": 64, \"intermediate_size\": 128,\n"
    " \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 4,\n"
    " \"q_lora_rank\": 32, \"kv_lora_rank\": 32, \"qk_nope_head_dim\": 24,\n"
    " \"qk_rope_head_dim\": 8, \"v_head_dim\": 16, \"index_n_heads\": 4, \"index_head_dim\": 16,\n"
    " \"index_topk\": 32, \"indexer_types\": [\"full\", \"shared\"],\n"
    " \"mlp_layer_types\": [\"dense\", \"sparse\"], \"n_routed_experts\": 4,\n"
    " \"num_experts_per_tok\": 2, \"n_shared_experts\": 1, \"moe_intermediate_size\": 32,\n"
    " \"n_group\": 1, \"topk_group\": 1, \"norm_topk_prob\": true,\n"
    " \"routed_scaling_factor\": 2.5, \"max_position_embeddings\": 2048, \"rms_norm_eps\": 1e-5,\n"
    " \"rope_parameters\": {\"rope_theta\": 10000.0, \"rope_type\": \"default\"},\n"
    " \"rope_interleave\": true, \"indexer_rope_interleave\": true,\n"
    " \"tie_word_embeddings\": false, \"vocab_size\": 256}\n";

int td_selftest_model(char *path, size_t n, td_err *reterr_err)
{
    const char *tmp = getenv("TMPDIR");
    td_config c;
    td_random_list list = {0};
    snprintf(path, n, "%s/tandem-selftest-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(path))
        return td_err_set(reterr_err, -errno, "%s: %s", path, td_errno_text(-errno));
    int r = td_config_parse(config, sizeof config - 1, NULL, 0, &c, reterr_err);
    r = r < 0 ? r : td_model_put(path, "config.json", config, sizeof config - 1, reterr_err);
    r = r < 0 ? r : td_random_tokenizer(path, &c, reterr_err);
    if (r >= 0) {
        td_random_tensors(&c, &list);
        r = td_random_write(path, &list, 0, (uint64_t)1 << 30, NULL, reterr_err);
        td_random_list_done(&list);
    }
    if (r < 0)
        td_selftest_model_remove(path);
    return r;
}

void td_selftest_model_remove(const char *path)
{
    td_model_files_remove(path);
}

/* A model on a backend with one sequence. */
typedef struct subject {
    td_model *model;
    td_engine *engine;
    td_seq *seq;
    uint32_t vocab;
} subject;

static void close_subject(subject *s)
{
    td_seq_free(s->seq);
    td_engine_free(s->engine);
    td_model_free(s->model);
    *s = (subject){0};
}

static int open_subject(const char *dir, const td_backend *be, td_dtype type, subject *s,
                        td_err *err)
{
    td_model_options o = {.isa = "auto",
                          .backend = be,
                          .act = type,
                          .kv = type,
                          .index = type,
                          .n_threads = 1,
                          .n_ranks = 1};
    td_engine_limits limits = {.max_rows = ROWS, .max_seqs = 1, .n_blocks = BLOCKS};
    uint32_t ids[PROMPT];
    td_rng rng = {3, 0};
    int r = td_model_open(dir, &o, &s->model, err);
    r = r < 0 ? r : td_engine_open(s->model, &limits, &s->engine, err);
    if (r < 0)
        return r;
    s->vocab = td_model_get_info(s->model)->vocab_size;
    for (uint32_t i = 0; i < PROMPT; i++)
        ids[i] = (uint32_t)td_rng_below(&rng, s->vocab);
    td_seq_spec spec = {.ids = ids,
                        .n_ids = PROMPT,
                        .n_prompt = PROMPT,
                        .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f},
                        .max_tokens = STEPS + 1,
                        .ignore_eos = 1};
    return td_seq_new(s->engine, &spec, &s->seq, err);
}

/* Compute what is not computed, in pieces; logits and token of the last id. */
static int compute(subject *s, uint32_t piece, float *logits, uint32_t *ret_id)
{
    size_t n;
    td_sample out = {0};
    td_seq_ids(s->seq, &n);
    int r = td_seq_reserve(s->seq, n);
    while (r >= 0 && td_seq_computed(s->seq) < n) {
        size_t left = n - td_seq_computed(s->seq);
        uint32_t len = left < piece ? (uint32_t)left : piece;
        td_step_item it = {.seq = s->seq,
                           .n_tokens = len,
                           .n_samples = len == left,
                           .want_logits = len == left,
                           .ret_logits = logits};
        r = td_engine_step(s->engine, &it, 1, &out);
    }
    *ret_id = out.id;
    return r;
}

/* STEPS rows of logits into *ret_logits (heap); ids: taken where forced, else drawn. */
static int trace(const char *dir, const td_backend *be, td_dtype type, uint32_t piece, int forced,
                 uint32_t ids[STEPS], float **ret_logits, uint32_t *ret_vocab, td_err *err)
{
    subject s = {0};
    int r = open_subject(dir, be, type, &s, err);
    float *logits = r < 0 ? NULL : calloc((size_t)STEPS * s.vocab, sizeof *logits);
    if (r >= 0 && !logits)
        r = td_err_set(err, -ENOMEM, "out of memory");
    for (int i = 0; r >= 0 && i < STEPS; i++) {
        uint32_t id = 0;
        r = compute(&s, piece, logits + (size_t)i * s.vocab, &id);
        if (r < 0)
            td_err_set(err, r, "step %d on %s: %s", i, be->isa, td_errno_text(r));
        if (!forced)
            ids[i] = id;
        if (r >= 0)
            td_seq_append(s.seq, ids[i]);
    }
    *ret_vocab = s.vocab;
    close_subject(&s);
    if (r < 0) {
        free(logits);
        return r;
    }
    *ret_logits = logits;
    return 0;
}

static double error_of(const float *got, const float *want, uint32_t n)
{
    double worst = 0, size = 0;
    for (uint32_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - (double)want[i]);
        worst = e > worst || isnan(e) ? e : worst;
        size = fmax(size, fabs((double)want[i]));
    }
    return worst / (size > 0 ? size : 1);
}

static void judge(const float *want, const float *got, const float *pieces, uint32_t vocab,
                  td_selftest_result *ret)
{
    for (int i = 0; i < STEPS; i++) {
        double e = error_of(got + (size_t)i * vocab, want + (size_t)i * vocab, vocab);
        ret->error = e > ret->error || isnan(e) ? e : ret->error;
    }
    if (!(ret->error <= ret->bound))
        snprintf(ret->failed, sizeof ret->failed,
                 "logits differ from the reference kernels by %g, at most %g", ret->error,
                 ret->bound);
    else if (memcmp(got, pieces, (size_t)STEPS * vocab * sizeof *got) != 0)
        snprintf(ret->failed, sizeof ret->failed,
                 "a prompt computed %d tokens at a time gives other bytes", PIECE);
}

static void against_reference(const char *dir, const td_backend *be, td_dtype type,
                              td_selftest_report report, void *arg)
{
    float *want = NULL, *got = NULL, *pieces = NULL;
    uint32_t ids[STEPS], vocab = 0;
    td_err err = {0};
    /* sums in another order; BF16 also rounds some operands to the other side */
    td_selftest_result out = {.bound = type == TD_F32 ? 2e-5 : 2e-2};
    snprintf(out.name, sizeof out.name, "logits and bytes of a model, %s", td_dtype_name(type));
    int r = trace(dir, &td_backend_ref, type, PROMPT, 0, ids, &want, &vocab, &err);
    r = r < 0 ? r : trace(dir, be, type, PROMPT, 1, ids, &got, &vocab, &err);
    r = r < 0 ? r : trace(dir, be, type, PIECE, 1, ids, &pieces, &vocab, &err);
    if (r >= 0)
        judge(want, got, pieces, vocab, &out);
    else
        snprintf(out.failed, sizeof out.failed, "%.299s", err.text);
    report(arg, &out);
    free(want);
    free(got);
    free(pieces);
}

/* ---- a golden of other software ---- */

/* The nearest folder above dir in which the golden's model lies. */
static int find_model(const char *dir, const td_golden *g, char *ret, size_t n, td_err *err)
{
    const char *model = td_golden_model(g);
    TD_AUTO_FREE char *real = realpath(dir, NULL);
    if (!real)
        return td_err_set(err, -errno, "%s: %s", dir, td_errno_text(-errno));
    if (model[0] == '/' || strstr(model, ".."))
        return td_err_set(err, -EINVAL, "%s/golden.json: model '%.100s' is not a path below a tree",
                          dir, model);
    for (char *slash; (slash = strrchr(real, '/'));) {
        *slash = 0;
        int len = snprintf(ret, n, "%s/%s/config.json", real, model);
        if (len > 0 && (size_t)len < n && access(ret, R_OK) == 0) {
            ret[len - (int)strlen("/config.json")] = 0;
            return 0;
        }
    }
    return td_err_set(err, -ENOENT,
                      "%s/golden.json is of the checkpoint '%.100s', which no folder above it "
                      "holds; put golden.json and golden.safetensors beside the checkpoint",
                      dir, model);
}

static int is_there(const char *dir, const char *name)
{
    TD_AUTO_FREE char *path = td_path_join(dir, name);
    return path && access(path, R_OK) == 0;
}

int td_selftest_golden_open(const char *dir, td_selftest_golden *ret, td_err *reterr_err)
{
    *ret = (td_selftest_golden){0};
    if (snprintf(ret->model, sizeof ret->model, "%s", dir) >= (int)sizeof ret->model)
        return td_err_set(reterr_err, -ENAMETOOLONG, "%.100s...: path too long", dir);
    if (!is_there(dir, "golden.json"))
        return 0;
    int r = td_golden_open(dir, &ret->golden, reterr_err);
    if (r >= 0 && !is_there(dir, "config.json"))
        r = find_model(dir, ret->golden, ret->model, sizeof ret->model, reterr_err);
    if (r < 0)
        td_selftest_golden_done(ret);
    return r;
}

void td_selftest_golden_done(td_selftest_golden *g)
{
    td_golden_close(g->golden);
    g->golden = NULL;
}

static int open_for(const td_selftest_golden *g, const td_backend *be, td_golden_kind kind,
                    subject *s, td_err *err)
{
    td_dtype type = kind == TD_GOLDEN_F32 ? TD_F32 : TD_BF16;
    td_model_options o = {.isa = "auto",
                          .backend = be,
                          .act = type,
                          .act_i8 = kind == TD_GOLDEN_INT8,
                          .kv = type,
                          .index = type,
                          .n_threads = 1,
                          .n_ranks = 1};
    size_t most = 0;
    for (size_t i = 0; i < td_golden_prompts(g->golden); i++)
        most = td_golden_ids(g->golden, i) > most ? td_golden_ids(g->golden, i) : most;
    td_engine_limits limits = {
        .max_rows = TD_GOLDEN_MAX_ROWS, .max_seqs = 1, .n_blocks = (uint32_t)(most / 64) + 2};
    int r = td_model_open(g->model, &o, &s->model, err);
    return r < 0 ? r : td_engine_open(s->model, &limits, &s->engine, err);
}

static void tell(const td_golden_outcome *o, int counted, char *failed, size_t n)
{
    if (!(o->error <= o->bound))
        snprintf(failed, n, "logits are off by %g, at most %g", o->error, o->bound);
    else if (o->wrong)
        snprintf(failed, n, "%u ids or choices differ, the first: %s", o->wrong, o->first_wrong);
    else if (!td_golden_agrees(o, counted))
        snprintf(failed, n, "%u near ties fell to the other side, at most %u", o->injections,
                 o->allowed);
}

static void against_golden(const td_selftest_golden *g, const td_backend *be, td_golden_kind kind,
                           td_selftest_report report, void *arg)
{
    subject s = {0};
    td_err err = {0};
    int r = open_for(g, be, kind, &s, &err);
    for (size_t i = 0; i < td_golden_prompts(g->golden); i++) {
        td_golden_outcome o = {0};
        td_selftest_result out = {0};
        r = r < 0 ? r : td_golden_follow(g->golden, i, kind, s.engine, &o, &err);
        snprintf(out.name, sizeof out.name, "%.24s: %u ids, %u rows, %u near ties, %s",
                 td_golden_name(g->golden, i), o.tokens, o.rows, o.injections,
                 td_golden_kind_name(kind));
        out.error = o.error;
        out.bound = o.bound;
        if (r < 0)
            snprintf(out.failed, sizeof out.failed, "%.299s", err.text);
        else
            tell(&o, !be->transfer || kind == TD_GOLDEN_F32, out.failed, sizeof out.failed);
        report(arg, &out);
        if (r < 0)
            break;
    }
    close_subject(&s);
}

void td_selftest_run(const td_selftest_golden *g, const td_backend *be, td_selftest_report report,
                     void *arg)
{
    for (td_dtype type = TD_F32; !g->golden && type <= TD_BF16; type++)
        against_reference(g->model, be, type, report, arg);
    for (td_golden_kind k = TD_GOLDEN_F32; g->golden && k < TD_GOLDEN_KINDS; k++)
        if (td_golden_has(g->golden, k) && (k != TD_GOLDEN_INT8 || be->act_i8))
            against_golden(g, be, k, report, arg);
}
