/* SPDX-License-Identifier: Apache-2.0 */
/* How options become an engine's, in one place: every program that opens a model by --device,
 * --isa,
 * --act, --act-mxfp4, --kv, --index, --threads and --strict computes under the same profile. An
 * option that a program does not take has its default. */
#ifndef TD_ENGINE_OPTIONS_H
#define TD_ENGINE_OPTIONS_H

#include "base/options.h"
#include "engine/device.h"
#include "engine/model.h"

/* The strings are the options'. */
td_device_spec td_device_spec_from(const td_options *o);
/* On a device that was opened by that spec; one rank. */
td_model_options td_model_options_from(const td_options *o, const td_device *device);

#endif
