/* JPEGs -> network input, a few rows at a time: a row is decoded, cropped, shifted and stored while it is in the
   first-level cache, and decoding ends with the crop's last row. The same bits as a full decode, then finish().

   Compiled where libjpeg-turbo's headers are; any other libjpeg would give other pixels. */

#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h>

#include "finish.c"

#ifndef LIBJPEG_TURBO_VERSION
#error "not libjpeg-turbo"
#endif

enum { ROWS_AT_ONCE = 4, NOT_ALIGNED = 16 };

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf failed;
} Errors;

static void leave(j_common_ptr info)
{
    longjmp(((Errors *)info->err)->failed, 1);
}

/* Warnings are errors: damaged data, or an end before all was read. */
static void refuse_warning(j_common_ptr info, int level)
{
    if (level < 0)
        leave(info);
}

static void begin_codec(struct jpeg_decompress_struct *info, Errors *errors)
{
    info->err = jpeg_std_error(&errors->base);
    errors->base.error_exit = leave;
    errors->base.emit_message = refuse_warning;
    jpeg_create_decompress(info);
}

/* Up to the first row of a JPEG of 256x256. Returns 0, or 1 and why not in `message` (JMSG_LENGTH_MAX bytes). */
static int begin_image(struct jpeg_decompress_struct *info, const uint8_t *data, size_t size, char *message)
{
    jpeg_mem_src(info, (unsigned char *)data, size);
    jpeg_read_header(info, TRUE);
    if (info->image_width != STORED_SIDE || info->image_height != STORED_SIDE) {
        snprintf(message, JMSG_LENGTH_MAX, "%ux%u px, expected %dx%d", info->image_width, info->image_height,
                 STORED_SIDE, STORED_SIDE);
        return 1;
    }
    info->out_color_space = JCS_RGB;
    jpeg_start_decompress(info);
    return 0;
}

/* The crop at (y, x) of a JPEG of 256x256. Returns as begin_image. */
static int decode_one(struct jpeg_decompress_struct *info, const uint8_t *data, size_t size, int y, int x, View *view,
                      char *message)
{
    /* The codec stores past the caches what it may store at multiples of 32, and these rows are read at once. */
    uint8_t rows[ROWS_AT_ONCE][3 * STORED_SIDE + 32] __attribute__((aligned(32)));
    JSAMPROW pointers[ROWS_AT_ONCE];
    Errors *errors = (Errors *)info->err;
    for (int i = 0; i < ROWS_AT_ONCE; i++)
        pointers[i] = rows[i] + NOT_ALIGNED;
    if (setjmp(errors->failed)) {
        errors->base.format_message((j_common_ptr)info, message);
        return 1;
    }
    if (begin_image(info, data, size, message))
        return 1;
    while (info->output_scanline < (JDIMENSION)(y + SIDE)) {
        const int first = info->output_scanline;
        const int num = jpeg_read_scanlines(info, pointers, ROWS_AT_ONCE);
        for (int i = 0; i < num; i++)
            if (first + i >= y && first + i < y + SIDE)
                finish_row(view, pointers[i] + 3 * x, first + i - y);
    }
    jpeg_abort_decompress(info);
    return 0;
}

/* All of a JPEG of 256x256, up to its end marker, into `out`, (256, 256, 3). Returns as begin_image. */
static int decode_rows(struct jpeg_decompress_struct *info, const uint8_t *data, size_t size, uint8_t *out,
                       char *message)
{
    Errors *errors = (Errors *)info->err;
    if (setjmp(errors->failed)) {
        errors->base.format_message((j_common_ptr)info, message);
        return 1;
    }
    if (begin_image(info, data, size, message))
        return 1;
    while (info->output_scanline < STORED_SIDE) {
        JSAMPROW pointers[ROWS_AT_ONCE];
        for (int i = 0; i < ROWS_AT_ONCE; i++)
            pointers[i] = out + 3 * STORED_SIDE * (info->output_scanline + i);
        jpeg_read_scanlines(info, pointers, ROWS_AT_ONCE);
    }
    jpeg_finish_decompress(info);
    return 0;
}

int decode_whole(const uint8_t *data, size_t size, uint8_t *out, char *message)
{
    struct jpeg_decompress_struct info;
    Errors errors;
    begin_codec(&info, &errors);
    const int failed = decode_rows(&info, data, size, out, message);
    jpeg_destroy_decompress(&info);
    return failed;
}

/* Images data[i] of sizes[i] bytes, offsets[i] = (y, x), out + i images; the rest is finish()'s, bias of each image.
   Returns -1, or the number of the first that cannot be decoded, and why in `message` (JMSG_LENGTH_MAX bytes). */
int decode(int num, const uint8_t *const *data, const size_t *sizes, const int32_t (*offsets)[2],
           const int32_t *are_flipped, const float (*biases)[3], const float *mean_image, const float *factor,
           void *out, int is_nchw, int is_uint8, char *message)
{
    const size_t image_bytes = 3 * PIXELS * (is_uint8 ? 1 : sizeof(float));
    struct jpeg_decompress_struct info;
    Errors errors;
    int failed = -1;
    begin_codec(&info, &errors);
    for (int i = 0; i < num && failed < 0; i++) {
        View view;
        begin_view(&view, are_flipped[i], biases[i], mean_image, factor, (char *)out + i * image_bytes, is_nchw,
                   is_uint8);
        if (decode_one(&info, data[i], sizes[i], offsets[i][0], offsets[i][1], &view, message))
            failed = i;
    }
    _mm_sfence();
    jpeg_destroy_decompress(&info);
    return failed;
}
