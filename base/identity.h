/* SPDX-License-Identifier: Apache-2.0 */
/* What routers and workers compare before they speak: hashes of the model directory's small files.
 */
#ifndef TD_BASE_IDENTITY_H
#define TD_BASE_IDENTITY_H

#include <stdint.h>

#include "base/err.h"

/* config = BLAKE2b-256(config.json); tokenizer = BLAKE2b-256 over fields tokenizer.json,
 * tokenizer_config.json, chat_template.jinja (absent files count as empty). */
int td_identity_read(const char *dir, uint8_t ret_config[32], uint8_t ret_tokenizer[32],
                     td_err *reterr_err);

#endif
