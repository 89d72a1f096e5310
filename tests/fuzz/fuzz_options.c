/* SPDX-License-Identifier: Apache-2.0 */
/* The INI file: any bytes give options or an error that names a file and a line, never a crash. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/options.h"
#include "base/strbuf.h"
#include "base/banned.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A memfd is a regular file with a name under /proc: nothing is left behind. */
static int file_of(const uint8_t *data, size_t size)
{
    int fd = memfd_create("ini", MFD_CLOEXEC);
    TD_BUG_ON(fd < 0);
    TD_BUG_ON(write(fd, data, size) != (ssize_t)size);
    return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int sections[] = {TD_SEC_COMMON | TD_SEC_ROUTER, TD_SEC_COMMON | TD_SEC_DECODE,
                                   TD_SEC_SERVE};
    if (size > 1 << 16)
        return 0;
    clearenv();
    int fd = file_of(data, size);
    char arg[64];
    snprintf(arg, sizeof arg, "--config=/proc/self/fd/%d", fd);
    for (size_t i = 0; i < TD_ARRAY_LEN(sections); i++) {
        td_options o;
        td_err err = {0};
        char *argv[] = {arg};
        int r = td_options_parse(&o, sections[i], 1, argv, &err);
        TD_BUG_ON(r < 0 && !strstr(err.text, "/proc/self/fd/"));
        TD_BUG_ON(!td_utf8_valid(err.text, strlen(err.text)) &&
                  td_utf8_valid((const char *)data, size));
        if (r == 0)
            td_options_done(&o);
    }
    close(fd);
    return 0;
}
