/* SPDX-License-Identifier: Apache-2.0 */
/* td_json_scan, then jansson. What the scan lets through must stay inside the limits it was given,
 * and what it refuses for its form jansson must refuse too: the scan may be looser than the parser,
 * never stricter. */
#include <errno.h>
#include <string.h>

#include "base/bug.h"
#include "base/json.h"
#include "base/banned.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static size_t count(const json_t *v, size_t depth, size_t *ret_depth)
{
    size_t n = 1, i;
    const char *key;
    json_t *child;
    if (json_is_object(v) || json_is_array(v))
        depth++;
    *ret_depth = TD_MAX(*ret_depth, depth);
    json_object_foreach((json_t *)(uintptr_t)v, key, child) n += 1 + count(child, depth, ret_depth);
    json_array_foreach(v, i, child) n += count(child, depth, ret_depth);
    return n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const td_json_limits limits = {.max_bytes = 65536, .max_depth = 8, .max_nodes = 200};
    td_err err = {0};
    json_t *root = NULL;
    const char *text = (const char *)data;
    int scanned = td_json_scan(text, size, &limits, &err);
    int r = td_json_parse(text, size, &limits, "input", &root, &err);
    TD_BUG_ON(scanned < 0 && r != scanned);
    if (r == 0) {
        size_t depth = 0;
        TD_BUG_ON(count(root, 0, &depth) > limits.max_nodes);
        TD_BUG_ON(depth > limits.max_depth);
        json_decref(root);
    } else if ((scanned == -EINVAL || scanned == -EILSEQ) && !(size && memchr(text, 0, size))) {
        /* jansson 2.14 swallows a NUL byte behind a number; the scan does not */
        root = json_loadb(text, size, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, NULL);
        TD_BUG_ON(root);
    }
    return 0;
}
