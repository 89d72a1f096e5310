/* SPDX-License-Identifier: Apache-2.0 */
#include "base/identity.h"

#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/banned.h"

enum { FILE_BYTES_MAX = 256 << 20 };

static int add_file(td_hash *h, const char *dir, const char *name, int required, td_err *reterr_err)
{
    TD_AUTO_FREE char *path = td_path_join(dir, name);
    if (!path)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", dir);
    TD_AUTO_FREE char *data = NULL;
    size_t n = 0;
    int r = td_file_read(path, FILE_BYTES_MAX, &data, &n, reterr_err);
    if (r == -ENOENT && !required) {
        td_hash_add_field(h, "", 0);
        return 0;
    }
    if (r < 0)
        return r;
    td_hash_add_field(h, data, n);
    return 0;
}

int td_identity_read(const char *dir, uint8_t ret_config[32], uint8_t ret_tokenizer[32],
                     td_err *reterr_err)
{
    static const struct {
        const char *name;
        int required;
    } files[] = {{"tokenizer.json", 0}, {"tokenizer_config.json", 0}, {"chat_template.jinja", 0}};
    td_hash h, t;
    td_hash_init(&h, NULL, 0, 32);
    int r = add_file(&h, dir, "config.json", 1, reterr_err);
    if (r < 0)
        return r;
    td_hash_init(&t, NULL, 0, 32);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        r = add_file(&t, dir, files[i].name, files[i].required, reterr_err);
        if (r < 0)
            return r;
    }
    td_hash_final(&h, ret_config);
    td_hash_final(&t, ret_tokenizer);
    return 0;
}
