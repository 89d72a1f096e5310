/* SPDX-License-Identifier: Apache-2.0 */
/* Exact answers to a set of problems. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "cli/eval.h"

#include "base/banned.h"

enum { FILE_MAX = 256 << 20, BATCH = 16 };

static int add_problem(td_eval_set *s, const json_t *o, const char *what, td_err *err)
{
    const char *skill = NULL, *question = NULL, *answer = NULL;
    int64_t limit = 160;
    int a = td_json_get_str(o, what, "skill", &skill, err);
    int b = a < 0 ? a : td_json_get_str(o, what, "question", &question, err);
    int c = b < 0 ? b : td_json_get_str(o, what, "answer", &answer, err);
    int d = c < 0 ? c : td_json_get_int(o, what, "max_tokens", 1, 1000000, &limit, err);
    if (d < 0)
        return d;
    if (!skill || !question || !answer)
        return td_err_set(err, -EINVAL, "%s: skill, question or answer is missing", what);
    td_eval_problem *grown = realloc(s->data, (s->n + 1) * sizeof *grown);
    if (!grown)
        return td_err_set(err, -ENOMEM, "out of memory");
    s->data = grown;
    s->data[s->n++] = (td_eval_problem){.skill = strdup(skill),
                                        .question = strdup(question),
                                        .answer = strdup(answer),
                                        .max_tokens = (uint32_t)limit};
    const td_eval_problem *p = &s->data[s->n - 1];
    return p->skill && p->question && p->answer ? 0 : td_err_set(err, -ENOMEM, "out of memory");
}

int td_eval_set_load(const char *path, td_eval_set *ret, td_err *reterr_err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0, line = 0;
    *ret = (td_eval_set){0};
    int r = td_file_read(path, FILE_MAX, &text, &n, reterr_err);
    for (char *p = text; r >= 0 && *p;) {
        size_t len = strcspn(p, "\n");
        char what[300];
        snprintf(what, sizeof what, "%.250s:%zu", path, ++line);
        json_t *o = NULL;
        if (len) {
            r = td_json_parse(p, len, NULL, what, &o, reterr_err);
            r = r < 0 ? r : add_problem(ret, o, what, reterr_err);
            json_decref(o);
        }
        p += len + (p[len] == '\n');
    }
    if (r >= 0 && ret->n == 0)
        r = td_err_set(reterr_err, -EINVAL, "%s: no problems in it", path);
    if (r < 0)
        td_eval_set_done(ret);
    return r;
}

void td_eval_set_done(td_eval_set *s)
{
    for (size_t i = 0; i < s->n; i++) {
        free(s->data[i].skill);
        free(s->data[i].question);
        free(s->data[i].answer);
    }
    free(s->data);
    *s = (td_eval_set){0};
}

/* Ids of the chat with this one question. */
static int render(td_eval_model *m, const char *question, td_ids *out, td_err *err)
{
    td_strbuf text;
    td_strbuf_init(&text);
    json_t *vars = json_pack("{s:[{s:s, s:s}], s:b}", "messages", "role", "user", "content",
                             question, "add_generation_prompt", 1);
    int r = vars ? td_template_render(m->tpl, vars, NULL, &text, err) : -ENOMEM;
    json_decref(vars);
    if (r >= 0) {
        r = text.failed ? -ENOMEM : td_tokenizer_encode(m->tokenizer, text.data, text.len, 0, out);
        if (r < 0)
            td_err_set(err, r, "tokenizing a question: %s", td_errno_text(r));
    }
    td_strbuf_done(&text);
    return r;
}

/* The value X of the last "The answer is X.", blanks around it left out. */
static int says(const char *text, const char *answer)
{
    static const char key[] = "The answer is ";
    const char *at = NULL;
    for (const char *p = text; (p = strstr(p, key)); p++)
        at = p + sizeof key - 1;
    const char *end = at ? strchr(at, '.') : NULL;
    if (!end)
        return 0;
    at += strspn(at, " \t\n");
    while (end > at && strchr(" \t\n", end[-1]))
        end--;
    return (size_t)(end - at) == strlen(answer) && memcmp(at, answer, strlen(answer)) == 0;
}

/* One of the questions that are being answered. */
typedef struct slot {
    td_seq *seq; /* NULL: free */
    size_t problem;
    td_sample last;
    int drawn; /* last is new: append it */
} slot;

static int start(td_eval_model *m, const td_eval_set *set, size_t problem, slot *s, td_err *err)
{
    const td_eval_problem *p = &set->data[problem];
    td_ids ids = {0};
    int r = render(m, p->question, &ids, err);
    td_seq_spec spec = {.ids = ids.data,
                        .n_ids = ids.n,
                        .n_prompt = ids.n,
                        .max_tokens = p->max_tokens,
                        .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    *s = (slot){.problem = problem};
    r = r < 0 ? r : td_seq_new(m->engine, &spec, &s->seq, err);
    if (r >= 0 && (r = td_seq_reserve(s->seq, ids.n + p->max_tokens)) < 0)
        td_err_set(err, r, "a question of %zu tokens does not fit", ids.n);
    td_ids_done(&ids);
    return r;
}

static int judge(td_eval_model *m, const td_eval_set *set, slot *s, uint8_t *right)
{
    size_t n, n_prompt = td_seq_n_prompt(s->seq);
    const uint32_t *ids = td_seq_ids(s->seq, &n);
    td_strbuf text;
    td_strbuf_init(&text);
    int r = td_tokenizer_decode(m->tokenizer, ids + n_prompt, n - n_prompt, 1, &text);
    if (r >= 0)
        right[s->problem] = !text.failed && says(text.data, set->data[s->problem].answer);
    td_strbuf_done(&text);
    td_seq_free(s->seq);
    s->seq = NULL;
    return r;
}

/* One step of every running question; those that ended are judged. Prompts take what the step's
 * rows leave beside one row for each question. */
static int step(td_eval_model *m, const td_eval_set *set, slot *slots, uint8_t *right, td_err *err)
{
    td_step_item items[BATCH];
    td_sample samples[BATCH];
    slot *of[BATCH];
    uint32_t n = 0, n_drawn = 0, room = m->rows - BATCH;
    for (int i = 0; i < BATCH; i++) {
        slot *s = &slots[i];
        size_t ids;
        if (!s->seq)
            continue;
        if (s->drawn && td_seq_append(s->seq, s->last.id) != TD_FINISH_NONE) {
            int r = judge(m, set, s, right);
            if (r < 0)
                return td_err_set(err, r, "decoding an answer: %s", td_errno_text(r));
            continue;
        }
        td_seq_ids(s->seq, &ids);
        size_t left = ids - td_seq_computed(s->seq);
        uint32_t len = left <= room + 1 ? (uint32_t)left : room + 1;
        s->drawn = len == left;
        room -= len - 1;
        items[n++] =
            (td_step_item){.seq = s->seq, .n_tokens = len, .n_samples = (uint32_t)s->drawn};
        if (s->drawn)
            of[n_drawn++] = s;
    }
    int r = n ? td_engine_step(m->engine, items, n, samples) : 0;
    for (uint32_t i = 0; r >= 0 && i < n_drawn; i++)
        of[i]->last = samples[i];
    return r < 0 ? td_err_set(err, r, "a step failed: %s", td_errno_text(r)) : (int)n;
}

int td_eval_ask(td_eval_model *m, const td_eval_set *set, void (*progress)(double fraction),
                uint8_t *right, td_err *reterr_err)
{
    slot slots[BATCH] = {0};
    size_t next = 0;
    int r = m->tpl ? 1 : td_err_set(reterr_err, -ENOENT, "the model has no chat template");
    while (r > 0) {
        /* one new question a step: its prompt and the others' tokens share the step's rows */
        for (int i = 0; r > 0 && i < BATCH && next < set->n; i++)
            if (!slots[i].seq) {
                r = start(m, set, next++, &slots[i], reterr_err) < 0 ? -1 : 1;
                break;
            }
        if (r > 0)
            r = step(m, set, slots, right, reterr_err);
        if (r == 0 && next < set->n)
            r = 1;
        if (progress)
            progress((double)next / (double)set->n);
    }
    for (int i = 0; i < BATCH; i++)
        td_seq_free(slots[i].seq);
    return r;
}
