/* SPDX-License-Identifier: Apache-2.0 */
/* Quantiles, and the stamp of a result. */
#ifndef TD_BENCH_FIGURES_H
#define TD_BENCH_FIGURES_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static inline int bench_by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts v. 0 when there is none. */
static inline double bench_quantile(double *v, unsigned n, double q)
{
    if (!n)
        return 0;
    qsort(v, n, sizeof *v, bench_by_value);
    return v[(unsigned)(q * (n - 1) + 0.5)];
}

/* "day,commit,machine", without another comma. */
static inline void bench_stamp(char *out, size_t n)
{
    char cpu[128] = "?", commit[64] = "?", line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "model name : %127[^\n]", cpu) == 1)
            break;
    if (f)
        fclose(f);
    FILE *g = popen("git rev-parse --short=12 HEAD 2>/dev/null", "r");
    if (g && fgets(commit, sizeof commit, g))
        commit[strcspn(commit, "\n")] = 0;
    if (g)
        pclose(g);
    for (char *p = cpu; *p; p++)
        if (*p == ',')
            *p = ' ';
    time_t t = time(NULL);
    struct tm tm;
    char day[16];
    strftime(day, sizeof day, "%Y-%m-%d", gmtime_r(&t, &tm));
    snprintf(out, n, "%s,%s,%s x%ld", day, commit, cpu, sysconf(_SC_NPROCESSORS_ONLN));
}

#endif
