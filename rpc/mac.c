/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/mac.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/secret.h"
#include "base/banned.h"

enum { HEAD_BYTES = 3, COUNTER_BYTES = 8, TAG_BYTES = 16, NONCE_BYTES = 12 };

/* Tag of field 16 (length-delimited) and its length. */
static const uint8_t head[HEAD_BYTES] = {0x82, 0x01, COUNTER_BYTES + TAG_BYTES};
TD_STATIC_ASSERT(HEAD_BYTES + COUNTER_BYTES + TAG_BYTES == TD_MAC_PART_BYTES);

struct td_mac {
    EVP_CIPHER *cipher;
    EVP_CIPHER_CTX *context;
    uint64_t counter;
};

int td_mac_new(td_mac **ret_mac, td_err *reterr_err)
{
    td_mac *m = calloc(1, sizeof *m);
    if (m) {
        m->cipher = EVP_CIPHER_fetch(NULL, "AES-128-GCM", NULL);
        m->context = EVP_CIPHER_CTX_new();
    }
    if (!m || !m->context) {
        td_mac_free(m);
        return td_err_set(reterr_err, -ENOMEM, "KV link: out of memory");
    }
    if (!m->cipher || EVP_EncryptInit_ex2(m->context, m->cipher, NULL, NULL, NULL) != 1) {
        td_mac_free(m);
        return td_err_set(reterr_err, -ENOTSUP,
                          "KV link: this libcrypto has no AES-128-GCM: use kv-link = curve");
    }
    *ret_mac = m;
    return 0;
}

void td_mac_free(td_mac *m)
{
    if (!m)
        return;
    EVP_CIPHER_CTX_free(m->context);
    EVP_CIPHER_free(m->cipher);
    free(m);
}

void td_mac_derive(const uint8_t ticket_key[TD_MAC_KEY_BYTES], const uint8_t prefill_epoch[16],
                   const uint8_t decode_epoch[16], uint8_t ret_key[TD_MAC_KEY_BYTES])
{
    td_hash h;
    td_hash_init(&h, ticket_key, TD_MAC_KEY_BYTES, TD_MAC_KEY_BYTES);
    td_hash_add(&h, prefill_epoch, 16);
    td_hash_add(&h, decode_epoch, 16);
    td_hash_final(&h, ret_key);
}

static void put_u64(uint8_t *out, uint64_t v)
{
    for (int i = 0; i < 8; i++)
        out[i] = (uint8_t)(v >> 8 * i);
}

static uint64_t get_u64(const uint8_t *p)
{
    uint64_t v = 0;
    for (int i = 0; i < 8; i++)
        v |= (uint64_t)p[i] << 8 * i;
    return v;
}

static int begin(td_mac *m, const uint8_t *key, td_mac_way way, uint64_t counter)
{
    uint8_t nonce[NONCE_BYTES] = {(uint8_t)way};
    put_u64(nonce + NONCE_BYTES - COUNTER_BYTES, counter);
    return EVP_EncryptInit_ex2(m->context, NULL, key, nonce, NULL) == 1 ? 0 : -EIO;
}

/* Each part goes in behind its length: parts cannot be cut elsewhere. */
static int feed(td_mac *m, const void *data, size_t n)
{
    uint8_t length[8];
    int out;
    TD_BUG_ON(n > TD_BULK_PART_BYTES_MAX);
    put_u64(length, n);
    if (EVP_EncryptUpdate(m->context, NULL, &out, length, sizeof length) != 1)
        return -EIO;
    return n == 0 || EVP_EncryptUpdate(m->context, NULL, &out, data, (int)n) == 1 ? 0 : -EIO;
}

static int finish(td_mac *m, uint8_t tag[TAG_BYTES])
{
    uint8_t none[TAG_BYTES];
    int out;
    if (EVP_EncryptFinal_ex(m->context, none, &out) != 1 ||
        EVP_CIPHER_CTX_ctrl(m->context, EVP_CTRL_GCM_GET_TAG, TAG_BYTES, tag) != 1)
        return -EIO;
    return 0;
}

int td_mac_sign(td_mac *m, const uint8_t key[TD_MAC_KEY_BYTES], td_mac_way way,
                const td_bulk_part *parts, uint32_t n, uint8_t ret_part[TD_MAC_PART_BYTES])
{
    /* the clock is monotonic: a ticket that is pushed again by a new td_mac of this process repeats
     * no nonce */
    m->counter = TD_MAX(m->counter + 1, td_now_us() << 8);
    int r = begin(m, key, way, m->counter);
    for (uint32_t i = 0; r == 0 && i < n; i++)
        r = feed(m, parts[i].data, parts[i].n);
    memcpy(ret_part, head, HEAD_BYTES);
    put_u64(ret_part + HEAD_BYTES, m->counter);
    return r < 0 ? r : finish(m, ret_part + HEAD_BYTES + COUNTER_BYTES);
}

int td_mac_check(td_mac *m, const uint8_t key[TD_MAC_KEY_BYTES], td_mac_way way, const td_bulk *b,
                 uint32_t n, uint64_t *inout_counter)
{
    uint8_t tag[TAG_BYTES];
    size_t size;
    if (n < 2)
        return -EBADMSG;
    const uint8_t *part = td_bulk_part_data(b, n - 1, &size);
    if (size != TD_MAC_PART_BYTES || memcmp(part, head, HEAD_BYTES) != 0)
        return -EBADMSG;
    uint64_t counter = get_u64(part + HEAD_BYTES);
    int r = counter > *inout_counter ? begin(m, key, way, counter) : -EBADMSG;
    for (uint32_t i = 0; r == 0 && i < n - 1; i++) {
        const void *data = td_bulk_part_data(b, i, &size);
        r = size <= TD_BULK_PART_BYTES_MAX ? feed(m, data, size) : -EBADMSG;
    }
    if (r < 0 || finish(m, tag) < 0 ||
        !td_secret_equal(tag, part + HEAD_BYTES + COUNTER_BYTES, sizeof tag))
        return -EBADMSG;
    *inout_counter = counter;
    return 0;
}
