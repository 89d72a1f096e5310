/* SPDX-License-Identifier: Apache-2.0 */
/* ZMQ_FD is edge-triggered, and every libzmq call may swallow the edge. Here the answer to HELLO
 * arrives in the worst moment: after the dialling side found nothing to read, and just before it
 * asks the socket whether it can be written to. The link line wraps zmq_getsockopt for that. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/rand.h"
#include "proto/rpc.pb-c.h"
#include "rpc/codec.h"
#include "rpc/rpc.h"
#include "rpc/zmq_ctx.h"

int __real_zmq_getsockopt(void *socket, int option, void *value, size_t *bytes);
int __wrap_zmq_getsockopt(void *socket, int option, void *value, size_t *bytes);

static void *binder; /* a bare ROUTER */
static unsigned n_hellos, n_up;

static void send_welcome(zmq_msg_t *route)
{
    uint8_t epoch[16] = {7}, preamble[TD_PREAMBLE_BYTES], body[128];
    Tandem__V1__Welcome m = TANDEM__V1__WELCOME__INIT;
    m.epoch = (ProtobufCBinaryData){.len = sizeof epoch, .data = epoch};
    m.session = n_hellos;
    m.ping_ms = 5000;
    m.dead_ms = 60000;
    m.credit_bytes = 1 << 20;
    td_preamble p = {.major = 1, .type = TD_FRAME_WELCOME, .session = n_hellos};
    td_preamble_pack(&p, preamble);
    size_t n = tandem__v1__welcome__pack(&m, body);
    assert_true(zmq_msg_send(route, binder, ZMQ_SNDMORE) >= 0);
    assert_true(zmq_send(binder, preamble, sizeof preamble, ZMQ_SNDMORE) >= 0);
    assert_true(zmq_send(binder, body, n, 0) >= 0);
}

/* Answer a HELLO that lies there, and wait until the answer lies at the other side. */
static void answer_hello(void)
{
    td_preamble p;
    zmq_msg_t route, preamble, body;
    zmq_msg_init(&route);
    if (zmq_msg_recv(&route, binder, ZMQ_DONTWAIT) < 0)
        return;
    zmq_msg_init(&preamble);
    zmq_msg_init(&body);
    assert_true(zmq_msg_recv(&preamble, binder, 0) >= 0);
    assert_true(zmq_msg_recv(&body, binder, 0) >= 0);
    assert_int_equal(td_preamble_unpack(zmq_msg_data(&preamble), zmq_msg_size(&preamble), &p), 0);
    if (p.type == TD_FRAME_HELLO) {
        n_hellos++;
        send_welcome(&route);
        usleep(50000);
    }
    zmq_msg_close(&route);
    zmq_msg_close(&preamble);
    zmq_msg_close(&body);
}

int __wrap_zmq_getsockopt(void *socket, int option, void *value, size_t *bytes)
{
    if (option == ZMQ_EVENTS && socket != binder) {
        usleep(20000); /* a HELLO under way arrives */
        answer_hello();
    }
    return __real_zmq_getsockopt(socket, option, value, bytes);
}

static void on_up(void *arg, td_session *s)
{
    (void)arg;
    (void)s;
    n_up++;
}

static void test_welcome_in_the_worst_moment(void **state)
{
    (void)state;
    char dir[] = "/tmp/td-wake-XXXXXX", endpoint[64];
    td_loop *loop;
    td_rpc *rpc;
    td_err err = {0};
    int zero = 0;
    Tandem__V1__Hello hello = TANDEM__V1__HELLO__INIT;
    assert_non_null(mkdtemp(dir));
    snprintf(endpoint, sizeof endpoint, "ipc://%s/s", dir);
    binder = zmq_socket(td_zmq_context_ref(), ZMQ_ROUTER);
    assert_int_equal(zmq_bind(binder, endpoint), 0);
    assert_int_equal(td_loop_new(&loop), 0);
    td_rpc_config c = {.endpoint = endpoint, .dial = 1, .hello = &hello, .ops = {.on_up = on_up}};
    td_random_bytes(c.epoch, sizeof c.epoch);
    assert_int_equal(td_rpc_open(loop, &c, &rpc, &err), 0);
    for (uint64_t end = td_now_us() + 20 * TD_S; n_up == 0 && td_now_us() < end;)
        td_loop_run_once(loop, 5000);
    assert_int_equal(n_up, 1);
    usleep(100000);
    answer_hello();
    assert_int_equal(n_hellos,
                     1); /* no second HELLO: the first answer was seen before the time-out */
    td_rpc_close(rpc);
    td_loop_free(loop);
    zmq_setsockopt(binder, ZMQ_LINGER, &zero, sizeof zero);
    zmq_close(binder);
    td_zmq_context_unref();
    unlink(endpoint + strlen("ipc://"));
    rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_welcome_in_the_worst_moment)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
