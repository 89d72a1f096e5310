/* SPDX-License-Identifier: Apache-2.0 */
/* Who this build is: told by `tandem version`, HELLO and /version. */
#ifndef TD_BASE_VERSION_H
#define TD_BASE_VERSION_H

const char *td_version(void); /* "0.1.0" */
const char *td_commit(void);  /* "1a2b3c4d5e6f", or "unknown" outside a checkout */
const char *td_build(void);   /* "0.1.0+1a2b3c4d5e6f" */

#endif
