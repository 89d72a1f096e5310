/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: no tokenizer.json, however damaged, crashes the reader; what it accepts encodes and
 * decodes without a crash. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "text/tokenizer.h"
#include "text/tokenizer_load.h"
#include "base/banned.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char text[] = "Hi there, it's <|user|>\xC3\xA9 12345 \xF0\x9F\x98\x80 \n\n x";
    td_tokenizer *t = NULL;
    td_err err = {0};
    if (td_tokenizer_parse("fuzz", (const char *)data, size, NULL, 5000, &t, &err) < 0)
        return 0;
    td_ids ids = {0};
    td_strbuf out;
    td_strbuf_init(&out);
    if (td_tokenizer_encode(t, text, sizeof text - 1, TD_ENCODE_SPECIAL, &ids) == 0)
        td_tokenizer_decode(t, ids.data, ids.n, 0, &out);
    td_ids_done(&ids);
    td_strbuf_done(&out);
    td_tokenizer_free(t);
    return 0;
}
