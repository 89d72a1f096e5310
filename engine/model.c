/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/model.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/identity.h"
#include "engine/internal.h"
#include "kernels/profile.h"

#include "base/banned.h"

enum { THREADS_MAX = 256 };

static int check_type(const char *name, td_dtype t, int fp8_too, td_err *err)
{
    if (t == TD_F32 || t == TD_BF16 || (fp8_too && t == TD_F8E4M3))
        return 0;
    return td_err_set(err, -EINVAL, "--%s %s is not supported; use f32%s bf16%s", name,
                      td_row_type_name(t), fp8_too ? "," : " or", fp8_too ? " or fp8" : "");
}

static uint32_t granted_cores(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return n < 1 ? 1 : n > THREADS_MAX ? THREADS_MAX : (uint32_t)n;
}

static int take_options(td_model *m, const td_model_options *o, td_err *err)
{
    m->backend = o->backend ? o->backend : td_backend_get(o->isa);
    if (!m->backend && td_backend_known(o->isa))
        return td_err_set(err, -ENOTSUP, "--isa %s: this processor cannot run it; use auto",
                          o->isa);
    if (!m->backend)
        return td_err_set(err, -EINVAL,
                          "--isa %s is not known; use auto, ref, avx2, avx512 or avx512bf16vnni",
                          o->isa);
    if (o->n_ranks > 1 || o->rank > 0)
        return td_err_set(err, -ENOTSUP,
                          "rank %u of %u: tensor parallelism is not supported yet; use n_ranks = 1",
                          o->rank, o->n_ranks);
    int r = check_type("act", o->act, 0, err);
    r = r < 0 ? r : check_type("kv", o->kv, 1, err);
    r = r < 0 ? r : check_type("index", o->index, 0, err);
    if (r < 0)
        return r;
    m->shard = (td_shard){0, 1};
    m->act = o->act;
    m->act_i8 = o->act_i8 && o->act == TD_BF16 && m->backend->act_i8;
    m->act_fp8 = o->act_fp8;
    if (m->act_fp8 && (o->act != TD_BF16 || !m->backend->act_fp8))
        return td_err_set(err, -ENOTSUP,
                          "--act-mxfp4 fp8 needs --act bf16 on a GPU of gfx950, whose matrix "
                          "instruction takes scales, not %s on %s; use act",
                          td_dtype_name(o->act), m->backend->isa);
    m->kv = o->kv;
    m->index = o->index;
    m->n_cores = o->cores ? o->n_cores : 0;
    m->n_threads = o->n_threads ? o->n_threads : m->n_cores ? m->n_cores : granted_cores();
    if (m->n_threads > THREADS_MAX)
        return td_err_set(err, -EINVAL, "--threads %u: at most %d", m->n_threads, THREADS_MAX);
    if (m->n_cores) {
        m->cores = malloc(m->n_cores * sizeof *m->cores);
        if (!m->cores)
            return td_err_set(err, -ENOMEM, "out of memory");
        memcpy(m->cores, o->cores, m->n_cores * sizeof *m->cores);
    }
    return 0;
}

static int fill_info(td_model *m, td_err *err)
{
    const td_config *c = &m->config;
    td_model_info *i = &m->info;
    i->arch = td_arch_name(c->arch);
    i->n_layers = c->n_layers;
    i->hidden = c->hidden;
    i->vocab_size = c->vocab;
    i->max_context = c->max_context;
    i->index_topk = c->index_topk;
    i->n_eos = c->n_eos;
    memcpy(i->eos_ids, c->eos, sizeof c->eos);
    td_profile_spec spec = {.backend = m->backend,
                            .formats = m->formats,
                            .act = m->act,
                            .act_i8 = m->act_i8,
                            .act_fp8 = m->act_fp8,
                            .kv = m->kv,
                            .index = m->index};
    m->profile = td_profile_text(&spec, i->profile_id);
    i->profile = m->profile;
    return m->profile ? 0 : td_err_set(err, -ENOMEM, "out of memory");
}

int td_model_open(const char *dir, const td_model_options *options, td_model **ret_model,
                  td_err *reterr_err)
{
    td_model *m = calloc(1, sizeof *m);
    if (!m)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    int r = take_options(m, options, reterr_err);
    r = r < 0 ? r : td_config_load(dir, &m->config, reterr_err);
    r = r < 0 ? r : td_identity_read(dir, m->info.config_hash, m->info.tokenizer_hash, reterr_err);
    if (r >= 0) {
        m->layers = calloc(m->config.n_layers, sizeof *m->layers);
        r = m->layers ? 0 : td_err_set(reterr_err, -ENOMEM, "out of memory");
    }
    if (r >= 0) {
        td_kv_layout_make(&m->config, m->kv, m->index, m->layers, &m->info.kv);
        r = td_weights_load(m, dir, options, reterr_err);
    }
    r = r < 0 ? r : fill_info(m, reterr_err);
    if (r < 0) {
        td_model_free(m);
        return r;
    }
    *ret_model = m;
    return 0;
}

void td_model_free(td_model *m)
{
    if (!m)
        return;
    td_weights_free(m);
    free(m->layers);
    free(m->cores);
    free(m->profile);
    free(m);
}

const td_model_info *td_model_get_info(const td_model *m)
{
    return &m->info;
}
