/* Our C code under the address and undefined-behaviour sanitizers: every function with every shape it is called with.

   cc -O1 -g -mssse3 -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all kernels.c native.c -ljpeg -lm
   a.out FILE, where FILE holds JPEGs, each after its size as eight bytes. Buffers are from malloc, of the exact size,
   so that a byte too far ends the process. libjpeg-turbo itself is not instrumented: what it writes into our rows is
   followed by what we read of them. Prints how many were decoded and how many refused. */

#define _GNU_SOURCE
#include "../../pipeline/operators/decode.c"

#include <stdlib.h>
#include <unistd.h>

typedef struct {
    ptrdiff_t num_rows;
    int num_maps, n, relu, bf16, num_threads;
    float k, scale, coefficient;
} LrnOfNative;

void lrn_forward(const LrnOfNative *, const void *, void *);
void lrn_backward(const LrnOfNative *, const void *, const void *, void *);

static void *exactly(size_t size)
{
    void *memory = NULL;
    if (posix_memalign(&memory, 64, size ? size : 1))
        abort();
    memset(memory, 7, size);
    return memory;
}

static long decode_file(const char *path, long *refused)
{
    static const float factor[3] = {0.5f, 1, 2};
    long decoded = 0;
    uint64_t size;
    FILE *file = fopen(path, "rb");
    if (!file)
        abort();
    float *mean = exactly(3 * PIXELS * sizeof(float));
    memset(mean, 0, 3 * PIXELS * sizeof(float));
    for (int number = 0; fread(&size, sizeof size, 1, file) == 1; number++) {
        uint8_t *data = exactly(size);
        if (fread(data, 1, size, file) != size)
            abort();
        const int is_uint8 = number & 1, is_nchw = number >> 1 & 1, flip = number >> 2 & 1;
        const float bias[3] = {1, 2, 3};
        const int y = number % 33, x = number / 33 % 33;
        const Crop crop = {y, x, flip, is_nchw, is_uint8, bias, number & 8 ? mean : NULL, factor};
        void *out = exactly(3 * PIXELS * (is_uint8 ? 1 : sizeof(float)));
        void *whole = exactly(3 * STORED_SIDE * STORED_SIDE);
        char *message = exactly(MESSAGE_BYTES);
        if (decode_image(data, size, &crop, out, message) == 0)
            decoded++;
        else {
            (*refused)++;
            if (strnlen(message, MESSAGE_BYTES) == MESSAGE_BYTES || !message[0])
                abort();
            if (decode_image(data, size, NULL, whole, message) == 0)
                abort(); /* the whole includes the crop */
        }
        decode_image(data, size, NULL, whole, message);
        free(out), free(whole), free(message), free(data);
    }
    free(mean), fclose(file);
    return decoded;
}

static void finish_everywhere(void)
{
    const float factor[3] = {0.5f, 1, 2}, bias[3] = {1, 2, 3};
    const size_t bytes = 3 * STORED_SIDE * STORED_SIDE;
    uint8_t *pixels = exactly(bytes);
    float *mean = exactly(3 * PIXELS * sizeof(float));
    memset(mean, 0, 3 * PIXELS * sizeof(float));
    FILE *file = tmpfile();
    if (!file || fwrite(pixels, 1, bytes, file) != bytes || fflush(file))
        abort();
    for (int kind = 0; kind < 16; kind++) {
        Crop crop = {0, 0, kind >> 2 & 1, kind >> 1 & 1, kind & 1, bias, kind & 8 ? mean : NULL, factor};
        void *out = exactly(3 * PIXELS * (crop.is_uint8 ? 1 : sizeof(float)));
        char message[MESSAGE_BYTES];
        for (int at = 0; at <= 32; at += 4) {
            crop.y = at, crop.x = 32 - at;
            if (read_image(fileno(file), 0, &crop, out, message))
                abort();
        }
        if (!read_image(fileno(file), 4096, &crop, out, message)) /* its last rows are behind the file's end */
            abort();
        free(out);
    }
    void *whole = exactly(bytes);
    char message[MESSAGE_BYTES];
    if (read_image(fileno(file), 0, NULL, whole, message) || !read_image(fileno(file), 1, NULL, whole, message))
        abort();
    free(whole);
    free(pixels), free(mean), fclose(file);
}

static void normalise_everywhere(void)
{
    static const int maps[] = {1, 3, 6, 16, 48, 96, 128, 255, 256, 2047, 2048}, windows[] = {1, 2, 3, 5, 9, 16, 17};
    for (size_t m = 0; m < sizeof maps / sizeof *maps; m++)
        for (size_t w = 0; w < sizeof windows / sizeof *windows; w++)
            for (int kind = 0; kind < 4; kind++)
                for (int rows = 0; rows < 140; rows += 23) {
                    const int size = kind & 1 ? 2 : 4;
                    LrnOfNative lrn = {rows, maps[m], windows[w], kind >> 1, kind & 1, 2, 2, 1e-4f, 1.5e-4f};
                    const size_t bytes = (size_t)rows * maps[m] * size;
                    void *x = exactly(bytes), *gradient = exactly(bytes), *out = exactly(bytes);
                    lrn_forward(&lrn, x, out);
                    lrn_backward(&lrn, x, gradient, out);
                    free(x), free(gradient), free(out);
                }
}

int main(int count, char **words)
{
    long refused = 0, decoded = 0;
    for (int i = 1; i < count; i++)
        decoded += decode_file(words[i], &refused);
    finish_everywhere();
    normalise_everywhere();
    printf("%ld decoded, %ld refused\n", decoded, refused);
    return 0;
}
