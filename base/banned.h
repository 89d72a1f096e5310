/* SPDX-License-Identifier: Apache-2.0 */
/* Include last in a .c file: unsafe libc calls become compile errors. */
#ifndef TD_BASE_BANNED_H
#define TD_BASE_BANNED_H

#define TD_BANNED(f) sorry_##f##_is_a_banned_function
#undef strcpy
#define strcpy(x, y) TD_BANNED(strcpy)
#undef strcat
#define strcat(x, y) TD_BANNED(strcat)
#undef strncpy
#define strncpy(x, y, n) TD_BANNED(strncpy)
#undef strncat
#define strncat(x, y, n) TD_BANNED(strncat)
#undef sprintf
#define sprintf(...) TD_BANNED(sprintf)
#undef vsprintf
#define vsprintf(...) TD_BANNED(vsprintf)
#undef gets
#define gets(x) TD_BANNED(gets)
#undef gmtime
#define gmtime(t) TD_BANNED(gmtime)
#undef localtime
#define localtime(t) TD_BANNED(localtime)
#undef strtok
#define strtok(a, b) TD_BANNED(strtok)
#undef atoi
#define atoi(a) TD_BANNED(atoi)
#undef alloca
#define alloca(n) TD_BANNED(alloca)

#endif
