/* One image: uint8 pixels -> float32, in one pass over the memory, to the bits of torch's operations in this order.

   out = ((float)pixel + bias - mean_image) * factor, each step rounded; compile with -ffp-contract=off.
   A row is worked out in the first-level cache and then stored past the caches: storing the usual way would first read
   the memory that is about to be overwritten, and the reading costs as much as the arithmetic. */

#include <emmintrin.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <tmmintrin.h>
#include <unistd.h>

#include "crop.h"

enum { ROW = 3 * SIDE, PIXELS = SIDE * SIDE, ROWS_A_READ = 112 };

/* Mirror a row, five pixels at a time, from the last to the first; `to` has room for 16 bytes more. */
static void flip_row(uint8_t *to, const uint8_t *from)
{
    const __m128i order = _mm_setr_epi8(13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, -1);
    int pixel = SIDE - 5;
    for (; pixel > 0; pixel -= 5) {
        __m128i five = _mm_loadu_si128((const __m128i *)(from + 3 * pixel - 1));
        _mm_storeu_si128((__m128i *)(to + 3 * (SIDE - 5 - pixel)), _mm_shuffle_epi8(five, order));
    }
    for (pixel += 4; pixel >= 0; pixel--)
        for (int channel = 0; channel < 3; channel++)
            to[3 * (SIDE - 1 - pixel) + channel] = from[3 * pixel + channel];
}

typedef uint8_t Orders[3][3][16]; /* [channel][part][i]: which byte of the part is the channel's i-th, else 0x80 */

static void make_orders(Orders orders)
{
    for (int channel = 0; channel < 3; channel++)
        for (int part = 0; part < 3; part++)
            for (int i = 0; i < 16; i++) {
                int byte = 3 * i + channel - 16 * part;
                orders[channel][part][i] = byte >= 0 && byte < 16 ? byte : 0x80;
            }
}

/* RGBRGB... -> R..., G..., B..., sixteen pixels at a time. */
static void split_row(uint8_t planes[3][SIDE], const uint8_t *row, Orders orders)
{
    for (int x = 0; x < SIDE; x += 16)
        for (int channel = 0; channel < 3; channel++) {
            __m128i got = _mm_setzero_si128();
            for (int part = 0; part < 3; part++)
                got = _mm_or_si128(got, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(row + 3 * x + 16 * part)),
                                                         _mm_loadu_si128((const __m128i *)orders[channel][part])));
            _mm_storeu_si128((__m128i *)(planes[channel] + x), got);
        }
}

/* Both store past the caches, to an address divisible by 16. */
static void store_floats(float *to, const float *from, int num)
{
    for (int i = 0; i < num; i += 4)
        _mm_stream_ps(to + i, _mm_load_ps(from + i));
}

static void store_bytes(uint8_t *to, const uint8_t *from, int num)
{
    for (int i = 0; i < num; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
}

typedef struct {
    Crop crop;
    void *out;
    float biases[ROW], factors[ROW];
    Orders orders;
} View;

static void begin_view(View *view, const Crop *crop, void *out)
{
    view->crop = *crop, view->out = out;
    make_orders(view->orders);
    for (int i = 0; i < ROW; i++) {
        view->biases[i] = crop->bias[i % 3];
        view->factors[i] = crop->factor[i % 3];
    }
}

/* Row y of the result, from the 224 pixels it shows. */
static void finish_row(View *view, const uint8_t *row, int y)
{
    float done[ROW] __attribute__((aligned(64))), *floats = view->out;
    uint8_t flipped[ROW + 16], planes[3][SIDE], *bytes = view->out;
    const Crop *crop = &view->crop;
    if (crop->is_flipped) {
        flip_row(flipped, row);
        row = flipped;
    }
    if (!crop->is_nchw) {
        const ptrdiff_t start = y * ROW;
        if (crop->is_uint8) {
            store_bytes(bytes + start, row, ROW);
            return;
        }
        for (int i = 0; i < ROW; i++)
            done[i] = (float)row[i] + view->biases[i];
        if (crop->mean_image)
            for (int i = 0; i < ROW; i++)
                done[i] -= crop->mean_image[start + i];
        for (int i = 0; i < ROW; i++)
            done[i] *= view->factors[i];
        store_floats(floats + start, done, ROW);
        return;
    }
    split_row(planes, row, view->orders);
    for (int channel = 0; channel < 3; channel++) {
        const uint8_t *plane = planes[channel];
        const ptrdiff_t start = channel * PIXELS + y * SIDE;
        if (crop->is_uint8) {
            store_bytes(bytes + start, plane, SIDE);
            continue;
        }
        for (int x = 0; x < SIDE; x++)
            done[x] = (float)plane[x] + crop->bias[channel];
        if (crop->mean_image)
            for (int x = 0; x < SIDE; x++)
                done[x] -= crop->mean_image[start + x];
        for (int x = 0; x < SIDE; x++)
            done[x] *= crop->factor[channel];
        store_floats(floats + start, done, SIDE);
    }
}

/* 0, or an error's number; -1 for the end of the file. */
static int read_all(int file, uint8_t *to, size_t size, off_t start)
{
    while (size) {
        const ssize_t got = pread(file, to, size, start);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? errno : -1;
        to += got, start += got, size -= (size_t)got;
    }
    return 0;
}

int read_bytes(int file, int64_t start, size_t size, void *out, char *message)
{
    const int error = read_all(file, out, size, start);
    if (error)
        snprintf(message, MESSAGE_BYTES, "%s", error < 0 ? "the file ends there" : strerror(error));
    return error != 0;
}

/* Half a crop is read at a time, into the second-level cache (16 rows: 7 % slower). */
int read_image(int file, int64_t start, const Crop *crop, void *out, char *message)
{
    uint8_t rows[ROWS_A_READ][3 * STORED_SIDE];
    View view;
    if (!crop)
        return read_bytes(file, start, 3 * STORED_SIDE * STORED_SIDE, out, message);
    begin_view(&view, crop, out);
    for (int y = 0; y < SIDE; y++) {
        const int64_t row = start + (int64_t)(crop->y + y) * 3 * STORED_SIDE;
        if (y % ROWS_A_READ == 0 && read_bytes(file, row, sizeof rows, rows, message))
            return 1;
        finish_row(&view, rows[y % ROWS_A_READ] + 3 * crop->x, y);
    }
    _mm_sfence();
    return 0;
}
