// What the kernels of the operations share. Matrices are row-major, and sums run in an order that
// depends on the shapes alone: the same numbers come out in every run.

typedef unsigned long long index_t;

#define LOWEST __int_as_float(0xff800000)  // −∞

// The element of a thread of a one-dimensional grid.
#define ELEMENT (blockIdx.x * (index_t)blockDim.x + threadIdx.x)

// ---- sums over a block of 256 threads ------------------------------------------------------------

template <bool LARGEST> __device__ float block_reduce(float value) {
    __shared__ float warps[8];
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(0xffffffff, value, step);
        value = LARGEST ? fmaxf(value, other) : value + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    float result = warps[0];
    for (int i = 1; i < 8; i++) result = LARGEST ? fmaxf(result, warps[i]) : result + warps[i];
    return result;
}

__device__ float block_sum(float value) { return block_reduce<false>(value); }
__device__ float block_max(float value) { return block_reduce<true>(value); }
