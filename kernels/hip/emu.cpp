/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/hip/emu.hpp"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Save the callee-saved registers and the stack pointer, take up another fiber's. */
extern "C" void td_emu_swap(void **save, void *load);
asm(".text\n.globl td_emu_swap\n.type td_emu_swap,@function\ntd_emu_swap:\n"
    "endbr64\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size td_emu_swap,.-td_emu_swap\n");

namespace td_emu
{

enum { STACK = 128 << 10, WAVES_MAX = LANES_MAX / 32 };
enum state { READY, AT_WAVE, AT_BARRIER, DONE };

struct fiber {
    void *sp;
    state at;
};

struct wave {
    unsigned arrived, live, phase;
    wave_table table[2]; /* two, so that nobody overwrites what a slow lane has not read */
};

struct context {
    fiber lanes[LANES_MAX];
    wave waves[WAVES_MAX];
    void *home;
    char *stacks;
    unsigned char *lds;
    kernel_fn fn;
    const void *args;
    launch_dim dim;
    unsigned block, current, live, at_barrier;
    uint8_t order[LANES_MAX],
        place[LANES_MAX]; /* n-th lane to run; where a lane is in that order */
};

static thread_local context *ctx;

[[noreturn]] void die(const char *why)
{
    fprintf(stderr, "emulation: %s (block %u, thread %u)\n", why, ctx->block, ctx->current);
    abort();
}

/* Let the next lane in the order run that can; the current one waits or has ended. */
static void next()
{
    context *c = ctx;
    unsigned me = c->current, n = c->dim.block;
    for (unsigned i = 1; i <= n; i++) {
        unsigned lane = c->order[(c->place[me] + i) % n];
        if (c->lanes[lane].at != READY)
            continue;
        if (lane == me)
            return;
        c->current = lane;
        td_emu_swap(&c->lanes[me].sp, c->lanes[lane].sp);
        return;
    }
    if (c->live == 0)
        td_emu_swap(&c->lanes[me].sp, c->home);
    die("lanes wait at different points: a divergent barrier or wave operation");
}

static void release_wave(unsigned w, wave_fn fn)
{
    context *c = ctx;
    wave *v = &c->waves[w];
    fn(&v->table[v->phase]);
    v->arrived = 0;
    v->phase ^= 1;
    v->table[v->phase].who = 0;
    for (unsigned t = w * c->dim.wave; t < (w + 1) * c->dim.wave && t < c->dim.block; t++)
        if (c->lanes[t].at == AT_WAVE)
            c->lanes[t].at = READY;
}

static void release_block()
{
    context *c = ctx;
    c->at_barrier = 0;
    for (unsigned t = 0; t < c->dim.block; t++)
        if (c->lanes[t].at == AT_BARRIER)
            c->lanes[t].at = READY;
}

void wave_op(wave_fn fn, const void *in, size_t in_bytes, void *out, size_t out_bytes)
{
    context *c = ctx;
    unsigned t = c->current, w = t / c->dim.wave, lane = t % c->dim.wave;
    wave *v = &c->waves[w];
    wave_table *table = &v->table[v->phase];
    memcpy(table->in[lane], in, in_bytes);
    table->who |= 1ull << lane;
    if (++v->arrived == v->live) {
        release_wave(w, fn);
    } else {
        c->lanes[t].at = AT_WAVE;
        next();
    }
    memcpy(out, table->out[lane], out_bytes);
}

void block_sync()
{
    context *c = ctx;
    if (++c->at_barrier == c->live) {
        release_block();
    } else {
        c->lanes[c->current].at = AT_BARRIER;
        next();
    }
}

unsigned tid()
{
    return ctx->current;
}

unsigned block_id()
{
    return ctx->block;
}

unsigned grid_dim()
{
    return ctx->dim.grid;
}

void *lds()
{
    return ctx->lds;
}

static void entry()
{
    context *c = ctx;
    c->fn(c->args);
    wave *v = &c->waves[c->current / c->dim.wave];
    c->lanes[c->current].at = DONE;
    c->live--;
    v->live--;
    if (v->live && v->arrived)
        die("a lane ended while others of its wave wait for it");
    if (c->live && c->at_barrier == c->live)
        release_block();
    next();
    die("a lane that had ended ran on");
}

static void run_block(context *c, unsigned block)
{
    c->block = block;
    c->live = c->dim.block;
    c->at_barrier = 0;
    memset(c->lds, 0xff, c->dim.lds_bytes);
    for (unsigned w = 0; w * c->dim.wave < c->dim.block; w++) {
        wave *v = &c->waves[w];
        v->arrived = v->phase = 0;
        v->table[0].who = v->table[1].who = 0;
        v->live = c->dim.wave;
    }
    for (unsigned t = 0; t < c->dim.block; t++) {
        void **sp = (void **)(c->stacks + (size_t)(t + 1) * STACK - 64);
        *--sp = NULL;
        *--sp = (void *)entry;
        for (int i = 0; i < 6; i++)
            *--sp = NULL;
        c->lanes[t].sp = sp;
        c->lanes[t].at = READY;
    }
    c->current = c->order[0];
    td_emu_swap(&c->home, c->lanes[c->current].sp);
}

static void set_order(context *c)
{
    unsigned n = c->dim.block;
    for (unsigned i = 0; i < n; i++) {
        /* 29 is odd and n a power of two: a permutation */
        unsigned lane = c->dim.order == 0 ? i : c->dim.order == 1 ? n - 1 - i : (i * 29 + 7) % n;
        c->order[i] = (uint8_t)lane;
        c->place[lane] = (uint8_t)i;
    }
}

static context *context_new()
{
    context *c = (context *)aligned_alloc(64, (sizeof(context) + 63) / 64 * 64);
    void *stacks = mmap(NULL, (size_t)LANES_MAX * STACK, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!c || stacks == MAP_FAILED) {
        fprintf(stderr, "emulation: out of memory\n");
        abort();
    }
    c->stacks = (char *)stacks;
    return c;
}

void run(kernel_fn fn, const void *args, launch_dim dim)
{
    static thread_local context *mine; /* stacks are kept: pages stay mapped */
    if (dim.block == 0 || dim.block > LANES_MAX || dim.block % dim.wave ||
        (dim.block & (dim.block - 1))) {
        fprintf(stderr, "emulation: blocks of %u threads in waves of %u\n", dim.block, dim.wave);
        abort();
    }
    if (!mine)
        mine = context_new();
    ctx = mine;
    ctx->fn = fn;
    ctx->args = args;
    ctx->dim = dim;
    ctx->lds = (unsigned char *)aligned_alloc(64, (dim.lds_bytes + 64) / 64 * 64);
    set_order(ctx);
    for (unsigned b = 0; b < dim.grid; b++)
        run_block(ctx, b);
    free(ctx->lds);
    ctx->lds = NULL;
}

} // namespace td_emu
