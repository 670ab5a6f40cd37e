/* A stored image, 256x256 RGB -> the 224x224 of it that the network sees, or the whole: decode.c and finish.c. */

#ifndef ALEXNET_CROP_H
#define ALEXNET_CROP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SIDE = 224, STORED_SIDE = 256, MESSAGE_BYTES = 200 };

/* What becomes of an image: rows y to y + 223, columns x to x + 223, mirrored if is_flipped. bias, factor: 3 numbers;
   mean_image: NULL, or laid out like the result: (224, 224, 3), or (3, 224, 224) if is_nchw. If is_uint8, the result is
   bytes, the pixels as they are. */
typedef struct {
    int y, x, is_flipped, is_nchw, is_uint8;
    const float *bias, *mean_image, *factor;
} Crop;

/* All write to `out`, which is aligned to 16 bytes; crop NULL: the whole image, uint8 (256, 256, 3). They return 0, or
   1 and the reason in `message` (MESSAGE_BYTES). */

/* Of a JPEG. Damage is an error up to the last row that is wanted, of a whole image up to its end marker. */
int decode_image(const uint8_t *data, size_t size, const Crop *crop, void *out, char *message);

/* Of the uncompressed pixels that begin at byte `start` of an open file. */
int read_image(int file, int64_t start, const Crop *crop, void *out, char *message);

/* Any `size` bytes of an open file. */
int read_bytes(int file, int64_t start, size_t size, void *out, char *message);

#ifdef __cplusplus
}
#endif

#endif
