/* SPDX-License-Identifier: Apache-2.0 */
/* A libcuda that is too old: it has one call and lacks all others. For the loader's test only. */
int cuInit(unsigned flags);

__attribute__((visibility("default"))) int cuInit(unsigned flags)
{
    return (int)flags;
}
