/* JPEGs -> network input, a few rows at a time: a row is decoded, cropped, shifted and stored while it is in the
   first-level cache, and decoding ends with the last row that is wanted. The same bits as of a full decode.

   Compiled where libjpeg-turbo's headers are; any other libjpeg would give other pixels. */

#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h>

#include "finish.c"

#ifndef LIBJPEG_TURBO_VERSION
#error "not libjpeg-turbo"
#endif
#if JMSG_LENGTH_MAX > 200
#error "MESSAGE_BYTES is too small"
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

int decode_image(const uint8_t *data, size_t size, const Crop *crop, void *out, char *message)
{
    /* The codec stores past the caches what it may store at multiples of 32, and these rows are read at once. */
    uint8_t rows[ROWS_AT_ONCE][3 * STORED_SIDE + 32] __attribute__((aligned(32)));
    JSAMPROW pointers[ROWS_AT_ONCE];
    const int top = crop ? crop->y : 0, end = crop ? top + SIDE : STORED_SIDE;
    struct jpeg_decompress_struct info;
    Errors errors;
    View view;
    for (int i = 0; i < ROWS_AT_ONCE; i++)
        pointers[i] = rows[i] + NOT_ALIGNED;
    if (crop)
        begin_view(&view, crop, out);
    info.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = leave;
    errors.base.emit_message = refuse_warning;
    if (setjmp(errors.failed)) {
        errors.base.format_message((j_common_ptr)&info, message);
        jpeg_destroy_decompress(&info);
        return 1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, (unsigned char *)data, size);
    jpeg_read_header(&info, TRUE);
    if (info.image_width != STORED_SIDE || info.image_height != STORED_SIDE) {
        snprintf(message, MESSAGE_BYTES, "%ux%u px, expected %dx%d", info.image_width, info.image_height, STORED_SIDE,
                 STORED_SIDE);
        jpeg_destroy_decompress(&info);
        return 1;
    }
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    while (info.output_scanline < (JDIMENSION)end) {
        const int first = info.output_scanline;
        const int num = jpeg_read_scanlines(&info, pointers, ROWS_AT_ONCE);
        for (int i = 0; i < num; i++)
            if (!crop)
                memcpy((uint8_t *)out + 3 * STORED_SIDE * (first + i), pointers[i], 3 * STORED_SIDE);
            else if (first + i >= top && first + i < end)
                finish_row(&view, pointers[i] + 3 * crop->x, first + i - top);
    }
    if (!crop)
        jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
    _mm_sfence();
    return 0;
}
