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
void update(float *, float *, const float *, ptrdiff_t, float, float, float, int);

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
        const int32_t offset[1][2] = {{number % 33, number / 33 % 33}}, flips[1] = {flip};
        const float bias[1][3] = {{1, 2, 3}};
        const uint8_t *of[1] = {data};
        const size_t sizes[1] = {size};
        void *out = exactly(3 * PIXELS * (is_uint8 ? 1 : sizeof(float)));
        char *message = exactly(JMSG_LENGTH_MAX);
        if (decode(1, of, sizes, offset, flips, bias, number & 8 ? mean : NULL, factor, out, is_nchw, is_uint8,
                   message) < 0)
            decoded++;
        else {
            (*refused)++;
            if (strnlen(message, JMSG_LENGTH_MAX) == JMSG_LENGTH_MAX || !message[0])
                abort();
        }
        free(out), free(message), free(data);
    }
    free(mean), fclose(file);
    return decoded;
}

static void finish_everywhere(void)
{
    const float factor[3] = {0.5f, 1, 2}, bias[1][3] = {{1, 2, 3}};
    const size_t bytes = 3 * STORED_SIDE * STORED_SIDE;
    uint8_t *pixels = exactly(bytes);
    float *mean = exactly(3 * PIXELS * sizeof(float));
    memset(mean, 0, 3 * PIXELS * sizeof(float));
    FILE *file = tmpfile();
    if (!file || fwrite(pixels, 1, bytes, file) != bytes || fflush(file))
        abort();
    const int32_t files[1] = {fileno(file)};
    const int64_t starts[1] = {0}, behind[1] = {4096};
    for (int kind = 0; kind < 16; kind++) {
        const int is_uint8 = kind & 1, is_nchw = kind >> 1 & 1;
        const int32_t flips[1] = {kind >> 2 & 1};
        void *out = exactly(3 * PIXELS * (is_uint8 ? 1 : sizeof(float)));
        char message[JMSG_LENGTH_MAX];
        for (int at = 0; at <= 32; at += 4) {
            const int32_t offset[1][2] = {{at, 32 - at}};
            finish(pixels + 3 * (at * STORED_SIDE + 32 - at), 3 * STORED_SIDE, flips[0], bias[0],
                   kind & 8 ? mean : NULL, factor, out, is_nchw, is_uint8);
            if (finish_stored(1, files, starts, offset, flips, bias, kind & 8 ? mean : NULL, factor, out, is_nchw,
                              is_uint8, message) != -1)
                abort();
        }
        const int32_t last[1][2] = {{32, 0}};
        if (finish_stored(1, files, behind, last, flips, bias, NULL, factor, out, is_nchw, is_uint8, message) != 0)
            abort(); /* the file ends within the image */
        free(out);
    }
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
    for (int num = 0; num < 70; num++) {
        float *weight = exactly(4 * num), *velocity = exactly(4 * num), *gradient = exactly(4 * num);
        update(weight, velocity, gradient, num, 0.01f, 0.9f, num & 1 ? 5e-4f : 0, 2);
        free(weight), free(velocity), free(gradient);
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
