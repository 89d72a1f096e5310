/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: what the service manager is told and when, drain on the first signal and end on the
 * second, inherited sockets, credentials that cannot escape their directory, and core lists. */
#include "net/service.h"

#include <errno.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/clock.h"

static td_loop *loop;
static td_service *service;
static int manager; /* the manager's end of NOTIFY_SOCKET */
static char dir[] = "/tmp/td-service-XXXXXX", path[64];
static int drained, stopped, healthy;

static void drain(void *arg)
{
    drained++;
}

static void stop(void *arg)
{
    stopped++;
}

static int is_healthy(void *arg)
{
    return healthy;
}

static const td_service_ops ops = {drain, stop, is_healthy};

static int setup(void **state)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(dir + sizeof dir - 7, "XXXXXX", 6);
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof path, "%s/notify", dir);
    snprintf(a.sun_path, sizeof a.sun_path, "%s", path);
    manager = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (bind(manager, (struct sockaddr *)&a, sizeof a))
        return -1;
    setenv("NOTIFY_SOCKET", path, 1);
    drained = stopped = 0;
    healthy = 1;
    return td_loop_new(&loop);
}

static int teardown(void **state)
{
    td_service_free(service);
    service = NULL;
    td_loop_free(loop);
    close(manager);
    unlink(path);
    rmdir(dir);
    unsetenv("NOTIFY_SOCKET");
    unsetenv("WATCHDOG_USEC");
    return 0;
}

/* Next datagram, "" when none. */
static const char *told(void)
{
    static char buf[512];
    ssize_t n = recv(manager, buf, sizeof buf - 1, 0);
    buf[n > 0 ? n : 0] = 0;
    return buf;
}

static void ready_and_status_are_told(void **state)
{
    assert_int_equal(td_service_new(loop, &ops, NULL, TD_S, &service), 0);
    td_service_status(service, "loading 3 of 10");
    assert_string_equal(told(), "STATUS=loading 3 of 10");
    td_service_ready(service, "serving on 127.0.0.1:8080");
    assert_string_equal(told(), "READY=1\nSTATUS=serving on 127.0.0.1:8080");
    assert_string_equal(told(), "");
}

static void works_without_a_manager(void **state)
{
    unsetenv("NOTIFY_SOCKET");
    assert_int_equal(td_service_new(loop, &ops, NULL, TD_S, &service), 0);
    td_service_ready(service, "x");
    assert_string_equal(told(), "");
}

static void first_signal_drains_second_ends(void **state)
{
    assert_int_equal(td_service_new(loop, &ops, NULL, 60 * TD_S, &service), 0);
    assert_int_equal(td_service_draining(service), 0);
    raise(SIGTERM);
    td_loop_run_once(loop, TD_S);
    assert_int_equal(drained, 1);
    assert_int_equal(stopped, 0);
    assert_int_equal(td_service_draining(service), 1);
    assert_string_equal(told(), "STOPPING=1\nSTATUS=draining");
    raise(SIGINT);
    assert_int_equal(td_loop_run(loop), 0);
    assert_int_equal(drained, 1);
    assert_int_equal(stopped, 1);
}

static void drain_that_takes_too_long_ends(void **state)
{
    assert_int_equal(td_service_new(loop, &ops, NULL, 20 * TD_MS, &service), 0);
    uint64_t start = td_now_us();
    raise(SIGINT);
    assert_int_equal(td_loop_run(loop), 0);
    assert_int_equal(stopped, 1);
    assert_true(td_now_us() - start >= 20 * TD_MS);
}

static void closed_pipes_do_not_kill(void **state)
{
    int p[2];
    assert_int_equal(td_service_new(loop, &ops, NULL, TD_S, &service), 0);
    assert_int_equal(pipe(p), 0);
    close(p[0]);
    assert_int_equal(write(p[1], "x", 1), -1);
    assert_int_equal(errno, EPIPE);
    close(p[1]);
}

static void watchdog_is_fed_only_when_healthy(void **state)
{
    setenv("WATCHDOG_USEC", "40000", 1);
    assert_int_equal(td_service_new(loop, &ops, NULL, TD_S, &service), 0);
    int pings = 0;
    for (uint64_t end = td_now_us() + 2 * TD_S; pings < 3 && td_now_us() < end;) {
        td_loop_run_once(loop, 5 * TD_MS);
        pings += !strcmp(told(), "WATCHDOG=1");
    }
    assert_true(pings >= 3);
    healthy = 0;
    td_loop_run_once(loop, 0);
    while (*told())
        ;
    for (uint64_t end = td_now_us() + 60 * TD_MS; td_now_us() < end;)
        td_loop_run_once(loop, 5 * TD_MS);
    assert_string_equal(told(), "");
}

static void watchdog_of_another_process_is_not_ours(void **state)
{
    setenv("WATCHDOG_USEC", "2000", 1);
    setenv("WATCHDOG_PID", "1", 1);
    assert_int_equal(td_service_new(loop, &ops, NULL, TD_S, &service), 0);
    td_loop_run_once(loop, 10 * TD_MS);
    assert_string_equal(told(), "");
    unsetenv("WATCHDOG_PID");
}

static void inherited_sockets_are_found(void **state)
{
    char pid[16];
    assert_int_equal(td_service_inherited(0), -ENOENT);
    snprintf(pid, sizeof pid, "%d", getpid());
    /* sd_listen_fds() marks the descriptors close-on-exec, so 3 must be open */
    int at3 = dup2(manager, 3);
    setenv("LISTEN_PID", pid, 1);
    setenv("LISTEN_FDS", "1", 1);
    assert_int_equal(td_service_inherited(0), 3);
    assert_int_equal(td_service_inherited(1), -ENOENT);
    setenv("LISTEN_PID", "1", 1);
    assert_int_equal(td_service_inherited(0), -ENOENT);
    unsetenv("LISTEN_PID");
    unsetenv("LISTEN_FDS");
    if (at3 != manager)
        close(at3);
}

static void credentials_stay_in_their_directory(void **state)
{
    char file[80];
    unsetenv("CREDENTIALS_DIRECTORY");
    assert_null(td_service_credential("api-keys"));
    setenv("CREDENTIALS_DIRECTORY", dir, 1);
    assert_null(td_service_credential("api-keys"));
    snprintf(file, sizeof file, "%s/api-keys", dir);
    fclose(fopen(file, "w"));
    char *p = td_service_credential("api-keys");
    assert_string_equal(p, file);
    free(p);
    assert_null(td_service_credential(".."));
    assert_null(td_service_credential("../etc/passwd"));
    assert_null(td_service_credential(""));
    unlink(file);
    unsetenv("CREDENTIALS_DIRECTORY");
}

static void core_lists(void **state)
{
    int c[8];
    td_err err;
    assert_int_equal(td_cores_parse("0-3,6", c, 8, &err), 5);
    assert_int_equal(c[3], 3);
    assert_int_equal(c[4], 6);
    assert_int_equal(td_cores_parse("5", c, 8, &err), 1);
    static const char *const bad[] = {"",    "a",   "1,",  ",1",    "3-1",  "1-",          "-1",
                                      "1 2", "0-8", "1,1", "0-2,2", "1024", "99999999999", "1;2"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        err.text[0] = 0;
        assert_int_equal(td_cores_parse(bad[i], c, 8, &err), -EINVAL);
        assert_memory_equal(err.text, "cores `", 7);
    }
}

static void pinning(void **state)
{
    int c[1024], one[1024];
    int n = td_cores_granted(c, 1024);
    assert_true(n >= 1);
    cpu_set_t before;
    sched_getaffinity(0, sizeof before, &before);
    assert_int_equal(td_core_pin(c[n - 1]), 0);
    assert_int_equal(td_cores_granted(one, 1024), 1);
    assert_int_equal(one[0], c[n - 1]);
    sched_setaffinity(0, sizeof before, &before);
    assert_int_equal(td_core_pin(-1), -EINVAL);
    assert_int_equal(td_core_pin(100000), -EINVAL);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(ready_and_status_are_told),
        T(works_without_a_manager),
        T(first_signal_drains_second_ends),
        T(drain_that_takes_too_long_ends),
        T(closed_pipes_do_not_kill),
        T(watchdog_is_fed_only_when_healthy),
        T(watchdog_of_another_process_is_not_ours),
        T(inherited_sockets_are_found),
        T(credentials_stay_in_their_directory),
        T(core_lists),
        T(pinning),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
