/* ReLU with local response normalisation, forward and backward, each in one pass over memory, where torch takes many.

   Rows are the maps of one tower at one pixel (channels last): windows end with their row. float32 arithmetic, maps as
   float32 or bfloat16. Threads are those of torch's own OpenMP: the library is linked without one and finds torch's. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { ROOM = 4096, MOST_MAPS = 2048, MOST_HALF = 8 }; /* a block of rows: a few buffers fit the first-level cache */

typedef struct {
    ptrdiff_t num_rows;
    int num_maps, n, relu, bf16, num_threads;
    float k, scale, coefficient; /* coefficient: 2 * scale * beta */
} Lrn;

static inline float from_bf16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static inline uint16_t to_bf16(float value) /* to the nearest, ties to even */
{
    uint32_t word;
    memcpy(&word, &value, 4);
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

static inline void load(float *to, const void *from, ptrdiff_t start, int num, int bf16)
{
    if (bf16)
        for (int i = 0; i < num; i++)
            to[i] = from_bf16(((const uint16_t *)from)[start + i]);
    else
        memcpy(to, (const float *)from + start, (size_t)num * 4);
}

static inline void store(void *to, const float *from, ptrdiff_t start, int num, int bf16)
{
    if (bf16)
        for (int i = 0; i < num; i++)
            ((uint16_t *)to)[start + i] = to_bf16(from[i]);
    else
        memcpy((float *)to + start, from, (size_t)num * 4);
}

/* sums[i] of the n numbers from spread[i] on; rows in `spread` have n / 2 zeros before, between and after them */
static inline void sum_windows(float *sums, const float *spread, int num, int n)
{
    if (n == 5) {
        for (int i = 0; i < num; i++)
            sums[i] = spread[i] + spread[i + 1] + spread[i + 2] + spread[i + 3] + spread[i + 4];
        return;
    }
    for (int i = 0; i < num; i++)
        sums[i] = spread[i] + spread[i + 1];
    for (int shift = 2; shift < n; shift++)
        for (int i = 0; i < num; i++)
            sums[i] += spread[i + shift];
}

/* a: the block's maps, after the ReLU; spread: their squares */
static inline void begin_block(const Lrn *lrn, const void *x, ptrdiff_t start, int rows, float *a, float *spread)
{
    const int maps = lrn->num_maps, half = lrn->n / 2;
    load(a, x, start * maps, rows * maps, lrn->bf16);
    if (lrn->relu)
        for (int i = 0; i < rows * maps; i++)
            a[i] = a[i] < 0 ? 0 : a[i]; /* what is not a number stays so, as in torch */
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < maps; i++)
            spread[r * (maps + half) + half + i] = a[r * maps + i] * a[r * maps + i];
}

static int rows_at_once(const Lrn *lrn)
{
    int rows = (ROOM - 4 * MOST_HALF) / (lrn->num_maps + lrn->n / 2);
    return rows < 1 ? 1 : rows;
}

/* out = a / (k + scale * sum of a^2)^0.75 */
void lrn_forward(const Lrn *lrn, const void *x, void *out)
{
    const int maps = lrn->num_maps, stride = maps + lrn->n / 2, at_once = rows_at_once(lrn);
#pragma omp parallel num_threads(lrn->num_threads)
    {
        float a[ROOM], spread[ROOM + 64], sums[ROOM], result[ROOM];
        memset(spread, 0, sizeof spread);
#pragma omp for schedule(static)
        for (ptrdiff_t start = 0; start < lrn->num_rows; start += at_once) {
            const int rows = (int)(lrn->num_rows - start < at_once ? lrn->num_rows - start : at_once);
            begin_block(lrn, x, start, rows, a, spread);
            for (int r = 0; r < rows; r++)
                sum_windows(sums + r * maps, spread + r * stride, maps, lrn->n);
            for (int i = 0; i < rows * maps; i++) {
                float root = sqrtf(lrn->k + lrn->scale * sums[i]);
                result[i] = a[i] / (root * sqrtf(root));
            }
            store(out, result, start * maps, rows * maps, lrn->bf16);
        }
    }
}

/* with s = k + scale * sum of a^2, t = gradient / s^0.75: out = t - coefficient * a * sum of (t * a / s), 0 where the
   ReLU was 0; 1 / s = s^0.5 / (s^0.75)^2, so that one division serves for both */
void lrn_backward(const Lrn *lrn, const void *x, const void *gradient, void *out)
{
    const int maps = lrn->num_maps, half = lrn->n / 2, stride = maps + half, at_once = rows_at_once(lrn);
#pragma omp parallel num_threads(lrn->num_threads)
    {
        float a[ROOM], t[ROOM], spread[ROOM + 64], sums[ROOM];
        memset(spread, 0, sizeof spread);
#pragma omp for schedule(static)
        for (ptrdiff_t start = 0; start < lrn->num_rows; start += at_once) {
            const int rows = (int)(lrn->num_rows - start < at_once ? lrn->num_rows - start : at_once);
            const int num = rows * maps;
            begin_block(lrn, x, start, rows, a, spread);
            for (int r = 0; r < rows; r++)
                sum_windows(sums + r * maps, spread + r * stride, maps, lrn->n);
            load(t, gradient, start * maps, num, lrn->bf16);
            for (int i = 0; i < num; i++) {
                float root = sqrtf(lrn->k + lrn->scale * sums[i]), inverse = 1 / (root * sqrtf(root));
                t[i] *= inverse;
                sums[i] = t[i] * a[i] * root * inverse * inverse;
            }
            for (int r = 0; r < rows; r++)
                memcpy(spread + r * stride + half, sums + r * maps, (size_t)maps * 4);
            for (int r = 0; r < rows; r++)
                sum_windows(sums + r * maps, spread + r * stride, maps, lrn->n);
            for (int i = 0; i < num; i++)
                t[i] -= lrn->coefficient * a[i] * sums[i];
            if (lrn->relu)
                for (int i = 0; i < num; i++)
                    t[i] = a[i] == 0 ? 0 : t[i];
            store(out, t, start * maps, num, lrn->bf16);
        }
    }
}
