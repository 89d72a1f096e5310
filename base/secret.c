/* SPDX-License-Identifier: Apache-2.0 */
#include "base/secret.h"

#include <sodium.h>

#include "base/banned.h"

int td_secret_equal(const void *a, const void *b, size_t n)
{
    return sodium_memcmp(a, b, n) == 0;
}

void td_secret_wipe(void *bytes, size_t n)
{
    if (n)
        sodium_memzero(bytes, n);
}
