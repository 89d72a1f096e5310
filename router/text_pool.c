/* SPDX-License-Identifier: Apache-2.0 */
#include "router/text_pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/banned.h"

enum { ARENA_FACTOR = 24, ARENA_FLOOR = 1 << 20 };

struct td_text_pool {
    td_loop *loop;
    td_io *io;
    int fd;                               /* eventfd: finished jobs wait */
    uint32_t n_threads, max_jobs, n_jobs; /* n_jobs: loop thread only */
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t more;
    td_text_job *head, **tail; /* waiting */
    td_text_job *done;         /* finished, newest first */
    int stop;
};

td_text_job *td_text_job_new(td_api api, const td_request_context *ctx, td_str body)
{
    td_text_job *job = calloc(1, sizeof *job);
    if (!job)
        return NULL;
    job->api = api;
    job->ctx = *ctx;
    job->body_len = body.len;
    job->body = malloc(body.len + 1);
    if (!job->body) {
        free(job);
        return NULL;
    }
    if (body.len)
        memcpy(job->body, body.ptr, body.len);
    job->body[body.len] = 0;
    td_arena_init(&job->arena, ARENA_FLOOR + body.len * ARENA_FACTOR);
    return job;
}

void td_text_job_free(td_text_job *job)
{
    if (!job)
        return;
    td_arena_done(&job->arena);
    json_decref(job->input);
    free(job->body);
    free(job);
}

static void run(td_text_job *job)
{
    if (job->rpc)
        job->result = td_request_finish(&job->ctx, job->api, job->input, &job->arena, &job->params,
                                        &job->error);
    else
        job->result = td_request_parse(&job->ctx, job->api, (td_str){job->body, job->body_len},
                                       &job->arena, &job->params, &job->error);
}

static void *worker(void *arg)
{
    td_text_pool *p = arg;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->head && !p->stop)
            pthread_cond_wait(&p->more, &p->lock);
        if (p->stop)
            break;
        td_text_job *job = p->head;
        p->head = job->next;
        if (!p->head)
            p->tail = &p->head;
        pthread_mutex_unlock(&p->lock);
        run(job);
        pthread_mutex_lock(&p->lock);
        job->next = p->done;
        p->done = job;
        uint64_t one = 1;
        (void)!write(p->fd, &one, sizeof one);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static void deliver(void *arg, int fd, int events)
{
    td_text_pool *p = arg;
    uint64_t n;
    (void)!read(fd, &n, sizeof n);
    pthread_mutex_lock(&p->lock);
    td_text_job *list = p->done, *in_order = NULL;
    p->done = NULL;
    pthread_mutex_unlock(&p->lock);
    while (list) { /* oldest first */
        td_text_job *next = list->next;
        list->next = in_order;
        in_order = list;
        list = next;
    }
    while (in_order) {
        td_text_job *job = in_order;
        in_order = job->next;
        p->n_jobs--;
        job->done(job->arg, job);
    }
}

int td_text_pool_new(td_loop *l, uint32_t n_threads, uint32_t max_jobs, td_text_pool **ret_pool,
                     td_err *reterr_err)
{
    td_text_pool *p = calloc(1, sizeof *p);
    if (!p)
        return td_err_set(reterr_err, -ENOMEM, "text pool: out of memory");
    json_object_seed(0); /* before threads: jansson seeds its hash on first use */
    p->loop = l;
    p->max_jobs = max_jobs;
    p->tail = &p->head;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->more, NULL);
    p->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    p->threads = calloc(n_threads, sizeof *p->threads);
    int r = p->fd < 0     ? -errno
            : !p->threads ? -ENOMEM
                          : td_io_add(l, p->fd, TD_IO_READ, deliver, p, &p->io);
    for (uint32_t i = 0; r == 0 && i < n_threads; i++) {
        r = -pthread_create(&p->threads[i], NULL, worker, p);
        p->n_threads += r == 0;
    }
    if (r < 0) {
        td_text_pool_free(p);
        return td_err_set(reterr_err, r, "text pool: %s", td_errno_text(r));
    }
    *ret_pool = p;
    return 0;
}

static void refuse_list(td_text_job *job)
{
    while (job) {
        td_text_job *next = job->next;
        job->result = -EINVAL;
        job->error = (td_request_error){.error = TD_ERROR_DRAINING};
        job->done(job->arg, job);
        job = next;
    }
}

void td_text_pool_free(td_text_pool *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    p->stop = 1;
    pthread_cond_broadcast(&p->more);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < p->n_threads; i++)
        pthread_join(p->threads[i], NULL);
    refuse_list(p->head);
    refuse_list(p->done);
    td_io_del(p->io);
    if (p->fd >= 0)
        close(p->fd);
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    free(p->threads);
    free(p);
}

int td_text_pool_submit(td_text_pool *p, td_text_job *job)
{
    if (p->n_jobs >= p->max_jobs)
        return -EAGAIN;
    p->n_jobs++;
    job->next = NULL;
    pthread_mutex_lock(&p->lock);
    *p->tail = job;
    p->tail = &job->next;
    pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->lock);
    return 0;
}
