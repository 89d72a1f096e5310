/* SPDX-License-Identifier: Apache-2.0 */
/* Keeps a folder that has only headers a linkable library. */
typedef int td_empty_unit;
