/* SPDX-License-Identifier: Apache-2.0 */
/* The tokenizer of a random checkpoint: one token a byte, so any text has ids; made-up words above,
 * so any id has text. */
#include <errno.h>

#include "base/strbuf.h"
#include "cli/model.h"
#include "base/banned.h"

enum { BYTES = 256 };

/* GPT-2's alphabet: printable bytes are themselves, the others are characters from U+0100 on, in
 * order. */
static uint32_t letter_of(uint32_t byte)
{
    uint32_t hidden = 0;
    for (uint32_t b = 0;; b++) {
        int printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (b == byte)
            return printable ? b : 256 + hidden;
        hidden += !printable;
    }
}

/* Words of lower-case letters with a blank before them; no merge makes them, so encoding never
 * does. */
static void add_word(td_strbuf *b, uint32_t i)
{
    td_strbuf_adds(b, "\xc4\xa0"); /* the blank in GPT-2's alphabet */
    for (i += 26;; i = i / 26 - 1) {
        td_strbuf_addc(b, (char)('a' + i % 26));
        if (i < 26)
            break;
    }
}

static void add_vocab(td_strbuf *b, uint32_t vocab)
{
    for (uint32_t i = 0; i < BYTES; i++) {
        char text[4];
        int n = td_utf8_encode(letter_of(i), text);
        td_strbuf_addf(b, "%s\"", i ? "," : "");
        td_strbuf_add_json(b, text, (size_t)n);
        td_strbuf_addf(b, "\":%u", i);
    }
    for (uint32_t i = BYTES; i < vocab; i++) {
        td_strbuf_adds(b, ",\"");
        add_word(b, i - BYTES);
        td_strbuf_addf(b, "\":%u", i);
    }
}

static int put_tokenizer(const char *dir, const td_config *c, td_err *err)
{
    static const char byte_level[] =
        "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,"
        "\"use_regex\":false}";
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_addf(&b,
                   "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[],"
                   "\"normalizer\":null,\"pre_tokenizer\":%s,\"post_processor\":null,"
                   "\"decoder\":%s,\n\"model\":{\"type\":\"BPE\",\"dropout\":null,"
                   "\"unk_token\":null,\"continuing_subword_prefix\":null,"
                   "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,"
                   "\"ignore_merges\":false,\"vocab\":{",
                   byte_level, byte_level);
    add_vocab(&b, c->vocab);
    td_strbuf_adds(&b, "},\"merges\":[]}}\n");
    int r = b.failed ? td_err_set(err, -ENOMEM, "out of memory")
                     : td_model_put(dir, "tokenizer.json", b.data, b.len, err);
    td_strbuf_done(&b);
    return r;
}

int td_random_tokenizer(const char *dir, const td_config *c, td_err *reterr_err)
{
    static const char config[] = "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
                                 "  \"clean_up_tokenization_spaces\": false\n}\n";
    static const char chat[] = "{% for message in messages %}{{ message.role }}: "
                               "{{ message.content }}\n{% endfor %}assistant:";
    if (c->vocab < BYTES)
        return td_err_set(reterr_err, -EINVAL,
                          "config.json: vocab_size %u leaves no room for one token a byte (256); "
                          "give a tokenizer with --tokenizer DIR",
                          c->vocab);
    int r = put_tokenizer(dir, c, reterr_err);
    r = r < 0 ? r
              : td_model_put(dir, "tokenizer_config.json", config, sizeof config - 1, reterr_err);
    return r < 0 ? r : td_model_put(dir, "chat_template.jinja", chat, sizeof chat - 1, reterr_err);
}
