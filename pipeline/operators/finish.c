/* One image: uint8 pixels -> float32, as hostfinish.py does with torch, to the same bits, in one pass over the memory.

   out = ((float)pixel + bias - mean_image) * factor, each step rounded; compile with -ffp-contract=off.
   A row is worked out in the first-level cache and then stored past the caches: storing the usual way would first read
   the memory that is about to be overwritten, and the reading costs as much as the arithmetic. */

#include <emmintrin.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <tmmintrin.h>
#include <unistd.h>

enum { SIDE = 224, ROW = 3 * SIDE, PIXELS = SIDE * SIDE, STORED_SIDE = 256, ROWS_A_READ = 112, MESSAGE_BYTES = 200 };

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

/* What becomes of one image. bias, factor: 3 numbers; mean_image: NULL, or laid out like out, which is 16-byte aligned:
   (224, 224, 3), or (3, 224, 224) if is_nchw. If is_uint8, out is bytes, the pixels as they are. */
typedef struct {
    const float *bias, *mean_image, *factor;
    void *out;
    int is_flipped, is_nchw, is_uint8;
    float biases[ROW], factors[ROW];
    Orders orders;
} View;

static void begin_view(View *view, int is_flipped, const float *bias, const float *mean_image, const float *factor,
                       void *out, int is_nchw, int is_uint8)
{
    view->bias = bias, view->mean_image = mean_image, view->factor = factor, view->out = out;
    view->is_flipped = is_flipped, view->is_nchw = is_nchw, view->is_uint8 = is_uint8;
    make_orders(view->orders);
    for (int i = 0; i < ROW; i++) {
        view->biases[i] = bias[i % 3];
        view->factors[i] = factor[i % 3];
    }
}

static void finish_row(View *view, const uint8_t *row, int y)
{
    float done[ROW] __attribute__((aligned(64))), *floats = view->out;
    uint8_t flipped[ROW + 16], planes[3][SIDE], *bytes = view->out;
    if (view->is_flipped) {
        flip_row(flipped, row);
        row = flipped;
    }
    if (!view->is_nchw) {
        const ptrdiff_t start = y * ROW;
        if (view->is_uint8) {
            store_bytes(bytes + start, row, ROW);
            return;
        }
        for (int i = 0; i < ROW; i++)
            done[i] = (float)row[i] + view->biases[i];
        if (view->mean_image)
            for (int i = 0; i < ROW; i++)
                done[i] -= view->mean_image[start + i];
        for (int i = 0; i < ROW; i++)
            done[i] *= view->factors[i];
        store_floats(floats + start, done, ROW);
        return;
    }
    split_row(planes, row, view->orders);
    for (int channel = 0; channel < 3; channel++) {
        const uint8_t *plane = planes[channel];
        const ptrdiff_t start = channel * PIXELS + y * SIDE;
        if (view->is_uint8) {
            store_bytes(bytes + start, plane, SIDE);
            continue;
        }
        for (int x = 0; x < SIDE; x++)
            done[x] = (float)plane[x] + view->bias[channel];
        if (view->mean_image)
            for (int x = 0; x < SIDE; x++)
                done[x] -= view->mean_image[start + x];
        for (int x = 0; x < SIDE; x++)
            done[x] *= view->factor[channel];
        store_floats(floats + start, done, SIDE);
    }
}

/* pixels: the crop's first byte, its rows `stride` bytes apart. */
void finish(const uint8_t *pixels, ptrdiff_t stride, int is_flipped, const float *bias, const float *mean_image,
            const float *factor, void *out, int is_nchw, int is_uint8)
{
    View view;
    begin_view(&view, is_flipped, bias, mean_image, factor, out, is_nchw, is_uint8);
    for (int y = 0; y < SIDE; y++)
        finish_row(&view, pixels + y * stride, y);
    _mm_sfence();
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

/* `size` bytes of an open file, from byte `start` on. Returns 0, or 1 and why not in `message` (MESSAGE_BYTES). */
int read_bytes(int file, uint8_t *to, size_t size, int64_t start, char *message)
{
    const int error = read_all(file, to, size, start);
    if (error)
        snprintf(message, MESSAGE_BYTES, "%s", error < 0 ? "the file ends there" : strerror(error));
    return error != 0;
}

/* The same of uncompressed images (256, 256, 3): image i begins at byte starts[i] of the open file files[i], its crop at
   offsets[i] = (y, x); out + i images. Half a crop is read at a time, into the second-level cache (16 rows: 7 % slower). Returns -1, or the
   number of the first that cannot be read, and why in `message` (MESSAGE_BYTES). */
int finish_stored(int num, const int32_t *files, const int64_t *starts, const int32_t (*offsets)[2],
                  const int32_t *are_flipped, const float (*biases)[3], const float *mean_image, const float *factor,
                  void *out, int is_nchw, int is_uint8, char *message)
{
    const size_t image_bytes = 3 * PIXELS * (is_uint8 ? 1 : sizeof(float));
    uint8_t rows[ROWS_A_READ][3 * STORED_SIDE];
    for (int i = 0; i < num; i++) {
        View view;
        begin_view(&view, are_flipped[i], biases[i], mean_image, factor, (char *)out + i * image_bytes, is_nchw,
                   is_uint8);
        for (int y = 0; y < SIDE; y++) {
            if (y % ROWS_A_READ == 0) {
                const off_t start = starts[i] + (off_t)(offsets[i][0] + y) * 3 * STORED_SIDE;
                if (read_bytes(files[i], rows[0], sizeof rows, start, message))
                    return i;
            }
            finish_row(&view, rows[y % ROWS_A_READ] + 3 * offsets[i][1], y);
        }
    }
    _mm_sfence();
    return -1;
}
