/* SPDX-License-Identifier: Apache-2.0 */
/* Promises 3 and 6 on a private KV link, with somebody in the middle of it who may read, change,
 * hold back, repeat and forge: blocks arrive bit for bit or not at all, and no ticket ends by what
 * he says. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/rand.h"
#include "engine/engine.h"
#include "handoff/push.h"
#include "handoff/receive.h"
#include "rpc/frame.h"
#include "rpc/mac.h"

#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-shared"

enum { BLOCKS = 3, PARTS_MAX = 64, ROWS = 64 };

static td_model *model;
static td_engine *engine[2];
static td_link *links[2]; /* decode, prefill */
static char dir[64];

/* ---- the one in the middle ---- */

typedef struct message {
    zmq_msg_t part[PARTS_MAX];
    uint32_t n;
} message;

typedef struct middle {
    void *context, *to_prefill, *to_decode;
    char endpoint[128];
    zmq_msg_t prefill; /* routing id of the last who spoke */
    int known;
    /* What to do to each message on its way. 1 pass it on, 0 keep it. */
    int (*on_push)(struct middle *m, message *msg);
    int (*on_ack)(struct middle *m, message *msg);
    int n_ack;
} middle;

static int take(void *socket, message *msg)
{
    int more = 1;
    msg->n = 0;
    while (more && msg->n < PARTS_MAX) {
        zmq_msg_init(&msg->part[msg->n]);
        if (zmq_msg_recv(&msg->part[msg->n], socket, ZMQ_DONTWAIT) < 0)
            return -1;
        more = zmq_msg_more(&msg->part[msg->n++]);
    }
    return 0;
}

static void give(void *socket, message *msg, uint32_t from)
{
    for (uint32_t i = 0; i < from; i++)
        zmq_msg_close(&msg->part[i]);
    for (uint32_t i = from; i < msg->n; i++)
        assert_true(zmq_msg_send(&msg->part[i], socket, i + 1 < msg->n ? ZMQ_SNDMORE : 0) >= 0);
}

static void forget(message *msg)
{
    for (uint32_t i = 0; i < msg->n; i++)
        zmq_msg_close(&msg->part[i]);
    msg->n = 0;
}

static void copy(message *to, message *from)
{
    to->n = from->n;
    for (uint32_t i = 0; i < from->n; i++) {
        zmq_msg_init_size(&to->part[i], zmq_msg_size(&from->part[i]));
        memcpy(zmq_msg_data(&to->part[i]), zmq_msg_data(&from->part[i]),
               zmq_msg_size(&from->part[i]));
    }
}

/* From the prefill worker part 0 is its routing id; it is not passed on. */
static void relay(middle *m)
{
    message msg;
    while (take(m->to_prefill, &msg) == 0) {
        zmq_msg_copy(&m->prefill, &msg.part[0]);
        m->known = 1;
        if (!m->on_push || m->on_push(m, &msg))
            give(m->to_decode, &msg, 1);
        else
            forget(&msg);
    }
    while (take(m->to_decode, &msg) == 0) {
        m->n_ack++;
        if (m->known && (!m->on_ack || m->on_ack(m, &msg))) {
            zmq_msg_t id;
            zmq_msg_init(&id);
            zmq_msg_copy(&id, &m->prefill);
            zmq_msg_send(&id, m->to_prefill, ZMQ_SNDMORE);
            give(m->to_prefill, &msg, 0);
        } else {
            forget(&msg);
        }
    }
}

static void middle_open(middle *m, const char *decode_endpoint)
{
    size_t n = sizeof m->endpoint;
    int linger = 0;
    memset(m, 0, sizeof *m);
    m->context = zmq_ctx_new();
    m->to_prefill = zmq_socket(m->context, ZMQ_ROUTER);
    m->to_decode = zmq_socket(m->context, ZMQ_DEALER);
    zmq_setsockopt(m->to_prefill, ZMQ_LINGER, &linger, sizeof linger);
    zmq_setsockopt(m->to_decode, ZMQ_LINGER, &linger, sizeof linger);
    zmq_msg_init(&m->prefill);
    assert_int_equal(zmq_bind(m->to_prefill, "tcp://127.0.0.1:*"), 0);
    assert_int_equal(zmq_getsockopt(m->to_prefill, ZMQ_LAST_ENDPOINT, m->endpoint, &n), 0);
    assert_int_equal(zmq_connect(m->to_decode, decode_endpoint), 0);
}

static void middle_close(middle *m)
{
    zmq_msg_close(&m->prefill);
    zmq_close(m->to_prefill);
    zmq_close(m->to_decode);
    zmq_ctx_term(m->context);
}

/* ---- the two ends ---- */

typedef struct world {
    td_receive *receive;
    td_pusher *pusher;
    middle middle;
    td_push *push;
    td_seq *seq[2];
    td_receive_block blocks[BLOCKS];
    uint8_t ticket[16], mac_key[16];
    uint64_t late_us; /* added to the clock */
    int delivered, released, done;
    uint32_t id, code, push_code;
} world;

static void on_deliver(void *arg, void *user, const uint32_t *ids, uint32_t n,
                       const td_receive_figures *f)
{
    ((world *)arg)->delivered++;
    ((world *)arg)->id = ids[0];
}

static void on_release(void *arg, void *user, uint32_t code, td_drop why)
{
    ((world *)arg)->released++;
    ((world *)arg)->code = code;
}

static void on_done(void *arg, void *user, uint32_t code, const char *reason,
                    const td_push_figures *f)
{
    ((world *)arg)->done++;
    ((world *)arg)->push_code = code;
}

static void open_ends(world *w)
{
    td_err err = {0};
    const td_model_info *info = td_model_get_info(model);
    td_receive_config rc = {.endpoint = "tcp://127.0.0.1:0",
                            .pool = td_engine_pool(engine[1]),
                            .link = links[0],
                            .ops = {on_deliver, on_release},
                            .arg = w};
    td_pusher_config pc = {
        .pool = td_engine_pool(engine[0]), .link = links[1], .ops = {on_done}, .arg = w};
    memcpy(rc.model_hash, info->model_hash, 32);
    memcpy(rc.profile_id, info->profile_id, 16);
    memset(rc.epoch, 0xdd, 16);
    memcpy(pc.model_hash, info->model_hash, 32);
    memcpy(pc.profile_id, info->profile_id, 16);
    memset(pc.epoch, 0xaa, 16);
    if (td_receive_open(&rc, &w->receive, &err) < 0 || td_pusher_open(&pc, &w->pusher, &err) < 0)
        fail_msg("%s", err.text);
    middle_open(&w->middle, td_receive_endpoint(w->receive));
}

static td_seq *make_seq(int which)
{
    uint32_t ids[BLOCKS * ROWS] = {0};
    td_err err = {0};
    td_seq *s;
    td_seq_spec spec = {.ids = ids,
                        .n_ids = BLOCKS * ROWS,
                        .n_prompt = BLOCKS * ROWS,
                        .max_tokens = 1,
                        .sampling = {.top_p = 1, .repetition_penalty = 1}};
    if (td_seq_new(engine[which], &spec, &s, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(td_seq_reserve(s, BLOCKS * ROWS), 0);
    return s;
}

/* A ticket for three full blocks, what is in them is random, and the way through the middle. */
static void world_init(world *w)
{
    size_t n;
    td_in_first first = {0};
    uint64_t bytes = td_model_get_info(model)->kv.block_bytes;
    memset(w, 0, sizeof *w);
    open_ends(w);
    for (int i = 0; i < 2; i++)
        w->seq[i] = make_seq(i);
    td_random_bytes(w->ticket, 16);
    td_random_bytes(w->mac_key, 16);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        w->blocks[i] =
            (td_receive_block){.block = td_seq_blocks(w->seq[1], &n)[i], .expect = {.rows = ROWS}};
        td_random_bytes(td_kv_data(td_engine_pool(engine[0]), td_seq_blocks(w->seq[0], &n)[i]),
                        bytes);
        memset(td_kv_data(td_engine_pool(engine[1]), w->blocks[i].block), 0, bytes);
    }
    td_receive_grant g = {.attempt = 1,
                          .generation = 3,
                          .mac_key = w->mac_key,
                          .blocks = w->blocks,
                          .n_blocks = BLOCKS,
                          .first = &first,
                          .n_first = 1,
                          .n_tokens = BLOCKS * ROWS,
                          .credit_bytes = 1 << 20,
                          .deadline_us = td_now_us() + 20 * TD_S};
    memcpy(g.ticket, w->ticket, 16);
    assert_int_equal(td_receive_grant_add(w->receive, &g, td_now_us()), 0);
}

static void begin(world *w)
{
    td_err err = {0};
    size_t n;
    uint32_t choice = 0, first = 4711;
    td_push_ticket k = {.attempt = 1,
                        .generation = 3,
                        .endpoint = w->middle.endpoint,
                        .mac_key = w->mac_key,
                        .credit_bytes = 1 << 20,
                        .deadline_us = td_now_us() + 20 * TD_S};
    memcpy(k.id, w->ticket, 16);
    memset(k.decode_epoch, 0xdd, 16);
    if (td_push_begin(w->pusher, &k, td_now_us(), &w->push, &err) < 0)
        fail_msg("%s", err.text);
    for (uint32_t i = 0; i < BLOCKS; i++) {
        td_push_block b = {.block = td_seq_blocks(w->seq[0], &n)[i], .index = i, .rows = ROWS};
        assert_int_equal(td_push_add(w->push, &b, 1, td_now_us()), 0);
    }
    td_push_commit(w->push, BLOCKS * ROWS, &choice, &first, 1, td_now_us());
}

static void turn(world *w)
{
    relay(&w->middle);
    td_receive_run(w->receive, td_now_us() + w->late_us);
    td_pusher_run(w->pusher, td_now_us() + w->late_us);
    usleep(500);
}

static void run(world *w, const int *until, uint64_t us)
{
    for (uint64_t end = td_now_us() + us; !*until && td_now_us() < end;)
        turn(w);
}

/* Everything arrived, bit for bit, and both ends know. */
static void expect_whole(world *w)
{
    size_t n;
    run(w, &w->done, 5 * TD_S);
    assert_int_equal(w->done, 1);
    assert_int_equal(w->push_code, TD_OK);
    assert_int_equal(w->delivered, 1);
    assert_int_equal(w->released, 0);
    assert_int_equal(w->id, 4711);
    for (uint32_t i = 0; i < BLOCKS; i++)
        assert_memory_equal(td_kv_data(td_engine_pool(engine[0]), td_seq_blocks(w->seq[0], &n)[i]),
                            td_kv_data(td_engine_pool(engine[1]), w->blocks[i].block),
                            td_model_get_info(model)->kv.block_bytes);
}

static void world_done(world *w)
{
    td_pusher_close(w->pusher);
    td_receive_close(w->receive);
    middle_close(&w->middle);
    for (int i = 0; i < 2; i++) {
        td_seq_free(w->seq[i]);
        td_kv_flush(td_engine_pool(engine[i]));
    }
}

static uint64_t dropped(const world *w)
{
    return atomic_load(&td_receive_get_stats(w->receive)->drops[TD_DROP_MAC]);
}

static uint8_t type_of(message *msg, uint32_t preamble)
{
    td_preamble p;
    assert_int_equal(td_preamble_unpack(zmq_msg_data(&msg->part[preamble]),
                                        zmq_msg_size(&msg->part[preamble]), &p),
                     0);
    return p.type;
}

/* ---- what he tries ---- */

static void test_read_only(void **state)
{
    world w;
    world_init(&w);
    begin(&w);
    expect_whole(&w);
    assert_int_equal(dropped(&w), 0);
    world_done(&w);
}

/* Every message twice: the second one changes nothing. */
static int send_twice(middle *m, message *msg)
{
    message again;
    copy(&again, msg);
    give(m->to_decode, &again, 1);
    return 1;
}

static void test_repeated(void **state)
{
    world w;
    world_init(&w);
    w.middle.on_push = send_twice;
    begin(&w);
    expect_whole(&w);
    assert_true(dropped(&w) > 0);
    world_done(&w);
}

/* A changed copy goes ahead of every message: of its payload, its head, its mac, or without one. */
static int send_changed_first(middle *m, message *msg)
{
    for (int how = 0; how < 4; how++) {
        message bad;
        copy(&bad, msg);
        uint32_t which = how == 0 ? bad.n - 2 : how == 1 ? 2 : bad.n - 1;
        uint8_t *bytes = zmq_msg_data(&bad.part[which]);
        if (how < 3)
            bytes[zmq_msg_size(&bad.part[which]) - 1] ^= 1;
        else
            zmq_msg_close(&bad.part[--bad.n]);
        give(m->to_decode, &bad, 1);
    }
    return 1;
}

static void test_changed(void **state)
{
    world w;
    world_init(&w);
    w.middle.on_push = send_changed_first;
    begin(&w);
    expect_whole(&w);
    assert_true(dropped(&w) >= 6);
    world_done(&w);
}

/* The commit's first token exchanged: without a mac nothing would notice, for CRCs are no secret.
 */
static int exchange_first(middle *m, message *msg)
{
    if (type_of(msg, 1) != TD_FRAME_KV_COMMIT)
        return 1;
    uint8_t *bytes = zmq_msg_data(&msg->part[2]);
    bytes[zmq_msg_size(&msg->part[2]) - 4] ^= 1;
    return 1;
}

static void test_other_first_token(void **state)
{
    world w;
    world_init(&w);
    w.middle.on_push = exchange_first;
    begin(&w);
    for (uint64_t end = td_now_us() + 5 * TD_S; !dropped(&w) && td_now_us() < end;)
        turn(&w);
    assert_true(dropped(&w) > 0);
    assert_int_equal(w.delivered, 0);
    w.middle.on_push = NULL; /* he lets go: the commit is repeated, and counts */
    expect_whole(&w);
    world_done(&w);
}

/* Forged answers: nobody's blocks are given back by them. */
static int change_ack(middle *m, message *msg)
{
    message bad;
    copy(&bad, msg);
    uint8_t *bytes = zmq_msg_data(&bad.part[1]);
    size_t state =
        0; /* the last 0x38 is the tag of KvAck.state: RECEIVING -> COMMITTED -> FAILED */
    for (size_t b = 0; b + 1 < zmq_msg_size(&bad.part[1]); b++)
        state = bytes[b] == 0x38 ? b + 1 : state;
    assert_int_not_equal(state, 0);
    bytes[state]++;
    zmq_msg_t id;
    zmq_msg_init(&id);
    zmq_msg_copy(&id, &m->prefill);
    zmq_msg_send(&id, m->to_prefill, ZMQ_SNDMORE);
    give(m->to_prefill, &bad, 0);
    return m->n_ack > 3; /* and the true ones are late */
}

static void test_forged_acks(void **state)
{
    world w;
    world_init(&w);
    w.middle.on_ack = change_ack;
    begin(&w);
    expect_whole(&w);
    assert_true(atomic_load(&td_pusher_get_stats(w.pusher)->drops[TD_DROP_MAC]) > 0);
    world_done(&w);
}

/* An end that holds another key than its ticket's is nobody. */
static void test_other_key(void **state)
{
    world w;
    world_init(&w);
    w.mac_key[15] ^= 1; /* the receiver's copy is the old one */
    begin(&w);
    run(&w, &w.done, TD_S / 2);
    assert_int_equal(w.delivered + w.released + w.done, 0);
    assert_true(dropped(&w) > 0);
    w.late_us = 30 * TD_S; /* both give up at the deadline */
    run(&w, &w.done, 5 * TD_S);
    assert_int_equal(w.delivered, 0);
    assert_int_equal(w.released, 1);
    assert_int_equal(w.done, 1);
    assert_int_not_equal(w.push_code, TD_OK);
    world_done(&w);
}

/* ---- set-up ---- */

static void write_file(const char *name, const char *text, mode_t mode)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fchmod(fileno(f), mode);
    fclose(f);
}

static void open_links(void)
{
    static const char *const roles[] = {"decode", "prefill"};
    char peers[512] = "", path[128], secret[128], text[TD_CURVE_TEXT_BYTES];
    td_err err = {0};
    for (int i = 0; i < 2; i++) {
        td_curve_pair pair;
        assert_int_equal(td_curve_generate(&pair, &err), 0);
        td_curve_text(pair.secret_key, text);
        write_file(roles[i], text, 0600);
        td_curve_text(pair.public_key, text);
        size_t n = strlen(peers);
        snprintf(peers + n, sizeof peers - n, "%s %s %s\n", roles[i], roles[i], text);
    }
    write_file("peers", peers, 0600);
    snprintf(path, sizeof path, "%s/peers", dir);
    for (int i = 0; i < 2; i++) {
        snprintf(secret, sizeof secret, "%s/%s", dir, roles[i]);
        td_link_config c = {.secret = secret,
                            .peers = path,
                            .self = i ? TD_ROLE_PREFILL : TD_ROLE_DECODE,
                            .kv_private = "127.0.0.0/8"};
        if (td_link_open(&c, &links[i], &err) < 0)
            fail_msg("%s", err.text);
    }
}

static int set_up(void **state)
{
    td_err err = {0};
    td_model_options mo = {.isa = "auto",
                           .act = TD_BF16,
                           .kv = TD_BF16,
                           .index = TD_BF16,
                           .n_threads = 1,
                           .n_ranks = 1};
    td_engine_limits limits = {.max_rows = 64, .max_seqs = 1, .n_blocks = 8};
    if (td_model_open(MODEL, &mo, &model, &err) < 0 ||
        td_engine_open(model, &limits, &engine[0], &err) < 0 ||
        td_engine_open(model, &limits, &engine[1], &err) < 0)
        fail_msg("%s", err.text);
    snprintf(dir, sizeof dir, "/tmp/tandem-test-XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    open_links();
    return 0;
}

static int tear_down(void **state)
{
    char command[128];
    td_link_close(links[0]);
    td_link_close(links[1]);
    td_engine_free(engine[0]);
    td_engine_free(engine[1]);
    td_model_free(model);
    snprintf(command, sizeof command, "rm -r %s", dir);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read_only),   cmocka_unit_test(test_repeated),
        cmocka_unit_test(test_changed),     cmocka_unit_test(test_other_first_token),
        cmocka_unit_test(test_forged_acks), cmocka_unit_test(test_other_key),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
