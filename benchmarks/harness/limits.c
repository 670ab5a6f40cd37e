/* The physical limits of feed.py: what libjpeg-turbo and memory allow, with nothing around them.
 *
 * Compiled by limits.py; libjpeg-turbo is the one that Pillow brings, loaded before this library, so that the limit
 * is set by a current release and not by the distribution's. Each function works through a batch in one call, so Python
 * takes no part. A bad image ends the process: the benchmark made the images itself.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <immintrin.h>
#include <jpeglib.h>

enum { SIZE = 256, CROP = 224 };

/* n images -> the same pixels, uint8 RGB, one after another at `out` (all of them, or one place if `stride` is 0). */
int decode_full(const uint8_t *const *data, const size_t *sizes, int n, uint8_t *out, size_t stride) {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    info.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&info);
    for (int i = 0; i < n; i++) {
        uint8_t *pixels = out + i * stride;
        jpeg_mem_src(&info, (unsigned char *)data[i], sizes[i]);
        jpeg_read_header(&info, TRUE);
        info.out_color_space = JCS_RGB;
        jpeg_start_decompress(&info);
        while (info.output_scanline < info.output_height) {
            JSAMPROW rows[4];
            for (int k = 0; k < 4; k++) rows[k] = pixels + (size_t)(info.output_scanline + k) * SIZE * 3;
            jpeg_read_scanlines(&info, rows, 4);
        }
        jpeg_finish_decompress(&info);
    }
    jpeg_destroy_decompress(&info);
    return n;
}

/* n images -> their crops of 224x224 at offsets[2 i] (y), offsets[2 i + 1] (x). Rows above are skipped, those below are
 * never read, columns are decoded in whole MCUs: all that libjpeg-turbo offers. */
int decode_crop(const uint8_t *const *data, const size_t *sizes, int n, const int32_t *offsets, uint8_t *out) {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    uint8_t line[SIZE * 3];
    JSAMPROW row = line;
    info.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&info);
    for (int i = 0; i < n; i++) {
        uint8_t *pixels = out + (size_t)i * CROP * CROP * 3;
        JDIMENSION y = offsets[2 * i], x = offsets[2 * i + 1], left = x, width = CROP;
        jpeg_mem_src(&info, (unsigned char *)data[i], sizes[i]);
        jpeg_read_header(&info, TRUE);
        info.out_color_space = JCS_RGB;
        jpeg_start_decompress(&info);
        jpeg_crop_scanline(&info, &left, &width);
        if (y) jpeg_skip_scanlines(&info, y);
        for (int k = 0; k < CROP; k++) {
            jpeg_read_scanlines(&info, &row, 1);
            memcpy(pixels + (size_t)k * CROP * 3, line + (x - left) * 3, CROP * 3);
        }
        jpeg_abort_decompress(&info);
    }
    jpeg_destroy_decompress(&info);
    return n;
}

/* n stored images (256x256x3 uint8 at data[i]) -> cropped, mirrored, shifted float32, planes first; `out` is written
 * past the caches and must lie on 64 bytes. shifts[3 i + c] is subtracted. */
int convert(const uint8_t *const *data, int n, const int32_t *offsets, const uint8_t *flips, const float *shifts, float *out) {
    _Alignas(64) float line[3][CROP];
    for (int i = 0; i < n; i++) {
        const float r = shifts[3 * i], g = shifts[3 * i + 1], b = shifts[3 * i + 2];
        float *planes = out + (size_t)i * 3 * CROP * CROP;
        for (int y = 0; y < CROP; y++) {
            const uint8_t *in = data[i] + ((size_t)(offsets[2 * i] + y) * SIZE + offsets[2 * i + 1]) * 3;
            if (flips[i]) {
                for (int x = 0; x < CROP; x++) {
                    const uint8_t *pixel = in + 3 * (CROP - 1 - x);
                    line[0][x] = pixel[0] - r, line[1][x] = pixel[1] - g, line[2][x] = pixel[2] - b;
                }
            } else {
                for (int x = 0; x < CROP; x++)
                    line[0][x] = in[3 * x] - r, line[1][x] = in[3 * x + 1] - g, line[2][x] = in[3 * x + 2] - b;
            }
            for (int c = 0; c < 3; c++)
                for (int x = 0; x < CROP; x += 4)
                    _mm_stream_ps(planes + (size_t)c * CROP * CROP + y * CROP + x, _mm_load_ps(&line[c][x]));
        }
    }
    _mm_sfence();
    return n;
}
