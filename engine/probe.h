/* SPDX-License-Identifier: Apache-2.0 */
/* A window into the forward pass for tests and diagnosis: what the indexer selected and the router
 * chose, and the right to replace it before it is used. Lane thread only; not set in service. */
#ifndef TD_ENGINE_PROBE_H
#define TD_ENGINE_PROBE_H

#include <stdint.h>

#include "engine/engine.h"

typedef struct td_probe {
    void *arg;
    /* After index_select of a full layer, once per row of the step: selected [*n], margin as
     * kernels.h says. May rewrite both (at most topk entries, ascending). */
    void (*selected)(void *arg, uint32_t layer, uint32_t position, uint32_t *selected, uint32_t *n,
                     uint32_t topk, float margin);
    /* After route of a sparse layer: scores [E]; experts and weights [k] may be rewritten. */
    void (*routed)(void *arg, uint32_t layer, uint32_t position, const float *scores,
                   uint32_t *experts, float *weights, uint32_t k, float margin);
} td_probe;

/* probe is borrowed; NULL removes it. */
void td_engine_set_probe(td_engine *e, const td_probe *probe);

#endif
