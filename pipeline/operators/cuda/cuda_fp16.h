#pragma once
#include <cuda_runtime_api.h>

struct __half {
  unsigned short bits;
};
struct __half2 {
  __half x, y;
};
