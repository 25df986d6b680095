// The kernels of the operations. Matrices are row-major, and sums run in an order that depends on
// the shapes alone: the same numbers come out in every run.

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

// ---- element by element --------------------------------------------------------------------------

extern "C" __global__ void add(index_t n, const float *a, const float *b, float *y) {
    index_t i = ELEMENT;
    if (i < n) y[i] = a[i] + b[i];
}

extern "C" __global__ void accumulate(index_t n, const float *x, float *sum) {
    index_t i = ELEMENT;
    if (i < n) sum[i] += x[i];
}

extern "C" __global__ void accumulate_square(index_t n, const float *x, float *sum) {
    index_t i = ELEMENT;
    if (i < n) sum[i] += x[i] * x[i];
}

extern "C" __global__ void blend(index_t n, const float *a, const float *b, float t, float *y) {
    index_t i = ELEMENT;
    if (i < n) y[i] = (1.0f - t) * a[i] + t * b[i];
}

extern "C" __global__ void difference(index_t n, const float *a, const float *b, float *y) {
    index_t i = ELEMENT;
    if (i < n) y[i] = b[i] - a[i];
}

extern "C" __global__ void cap(index_t n, const float *x, float cap, float *y) {
    index_t i = ELEMENT;
    if (i < n) y[i] = cap * tanhf(x[i] / cap);
}

// The place of the first number that is none; n where all are.
extern "C" __global__ void first_not_finite(index_t n, const float *x, index_t *place) {
    index_t i = ELEMENT;
    if (i < n && !isfinite(x[i])) atomicMin(place, i);
}

// Every row becomes the bias.
extern "C" __global__ void rows_of(index_t n, index_t width, const float *bias, float *y) {
    index_t i = ELEMENT;
    if (i < n) y[i] = bias[i % width];
}

extern "C" __global__ void scatter(index_t n, const index_t *places, const float *values, float *y) {
    index_t i = ELEMENT;
    if (i < n) y[places[i]] = values[i];
}

// ---- activations, in the order of the enumeration ------------------------------------------------

__device__ void activation(int kind, float x, float *value, float *slope) {
    if (kind == 0) {
        float s = 1.0f / (1.0f + expf(-x));
        *value = x * s;
        *slope = s * (1.0f + x * (1.0f - s));
    } else if (kind == 1) {
        float below = 0.5f * (1.0f + erff(x * 0.70710678f));
        *value = x * below;
        *slope = below + x * 0.39894228f * expf(-0.5f * x * x);
    } else if (kind == 2) {
        float t = tanhf(0.7978846f * (x + 0.044715f * x * x * x));
        *value = 0.5f * x * (1.0f + t);
        *slope = 0.5f * (1.0f + t)
            + 0.5f * x * (1.0f - t * t) * 0.7978846f * (1.0f + 3.0f * 0.044715f * x * x);
    } else if (kind == 3) {
        *value = x > 0.0f ? x : 0.0f;
        *slope = x > 0.0f ? 1.0f : 0.0f;
    } else if (kind == 4) {
        float s = 1.0f / (1.0f + expf(-1.702f * x));
        *value = x * s;
        *slope = s * (1.0f + 1.702f * x * (1.0f - s));
    } else {
        float above = x > 0.0f ? x : 0.0f;
        *value = above * above;
        *slope = 2.0f * above;
    }
}

extern "C" __global__ void activate(index_t n, int kind, const float *x, float *y) {
    index_t i = ELEMENT;
    float slope;
    if (i < n) activation(kind, x[i], &y[i], &slope);
}

// The gradient is replaced.
extern "C" __global__ void activate_backward(index_t n, int kind, const float *x, float *g) {
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    activation(kind, x[i], &value, &slope);
    g[i] *= slope;
}

extern "C" __global__ void gated(index_t n, int kind, const float *gate, const float *up, float *y) {
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    activation(kind, gate[i], &value, &slope);
    y[i] = value * up[i];
}

// The gradient of the output becomes that of the gate.
extern "C" __global__ void gated_backward(
    index_t n, int kind, const float *gate, const float *up, float *g, float *g_up
) {
    index_t i = ELEMENT;
    float value, slope;
    if (i >= n) return;
    activation(kind, gate[i], &value, &slope);
    g_up[i] = g[i] * value;
    g[i] *= up[i] * slope;
}

// ---- columns, and their rotation -----------------------------------------------------------------

// `part` columns of each row, from `start` on.
extern "C" __global__ void columns(
    index_t n, index_t width, index_t part, index_t start, const float *x, float *y
) {
    index_t i = ELEMENT;
    if (i < n) y[i] = x[i / part * width + start + i % part];
}

extern "C" __global__ void columns_backward(
    index_t n, index_t width, index_t part, index_t start, const float *g, float *gx
) {
    index_t i = ELEMENT;
    if (i < n) gx[i / part * width + start + i % part] = g[i];
}

// Rotates the first 2 · half channels of each head; `sign` is −1 for the opposite angle.
extern "C" __global__ void rotate(
    index_t n, index_t width, index_t head, index_t half, index_t positions, float sign,
    const float *cos, const float *sin, const float *x, float *y
) {
    index_t i = ELEMENT;
    if (i >= n) return;
    index_t position = i / width % positions, channel = i % width % head;
    if (channel < half) {
        index_t angle = position * half + channel;
        y[i] = x[i] * cos[angle] - x[i + half] * (sign * sin[angle]);
    } else if (channel < 2 * half) {
        index_t angle = position * half + channel - half;
        y[i] = x[i] * cos[angle] + x[i - half] * (sign * sin[angle]);
    } else {
        y[i] = x[i];
    }
}

// ---- a block of threads to a row -----------------------------------------------------------------

// The mean, if it counts, and the reciprocal of the deviation.
__device__ float2 moments(index_t width, int centred, float epsilon, const float *x) {
    float mean = 0.0f, square = 0.0f;
    if (centred) {
        for (index_t i = threadIdx.x; i < width; i += blockDim.x) mean += x[i];
        mean = block_sum(mean) / width;
    }
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) square += (x[i] - mean) * (x[i] - mean);
    return make_float2(mean, 1.0f / sqrtf(block_sum(square) / width + epsilon));
}

extern "C" __global__ void normalise(
    index_t width, int centred, float epsilon, const float *weight, int biased, const float *bias,
    const float *x, float *y
) {
    x += blockIdx.x * width;
    y += blockIdx.x * width;
    float2 m = moments(width, centred, epsilon, x);
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) {
        float normal = weight[i] * ((x[i] - m.x) * m.y);
        y[i] = biased ? normal + bias[i] : normal;
    }
}

// The gradient is replaced.
extern "C" __global__ void normalise_backward(
    index_t width, int centred, float epsilon, const float *weight, const float *x, float *g
) {
    x += blockIdx.x * width;
    g += blockIdx.x * width;
    float2 m = moments(width, centred, epsilon, x);
    float mean = 0.0f, along = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) {
        float h = g[i] * weight[i];
        mean += h;
        along += h * (x[i] - m.x) * m.y;
    }
    mean = centred ? block_sum(mean) / width : 0.0f;
    along = block_sum(along) / width;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x)
        g[i] = (g[i] * weight[i] - mean - (x[i] - m.x) * m.y * along) * m.y;
}

// Σ (y − t)² of each row.
extern "C" __global__ void squared_error(index_t width, const float *y, const float *t, float *sums) {
    y += blockIdx.x * width;
    t += blockIdx.x * width;
    float sum = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) sum += (y[i] - t[i]) * (y[i] - t[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

extern "C" __global__ void squared_error_backward(
    index_t n, index_t width, const float *scales, const float *y, const float *t, float *g
) {
    index_t i = ELEMENT;
    if (i < n) g[i] = scales[i / width] * (y[i] - t[i]);
}

// The largest logit of a row and Σ exp(z − largest).
__device__ float2 partition(index_t width, const float *z) {
    float largest = LOWEST, sum = 0.0f;
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) largest = fmaxf(largest, z[i]);
    largest = block_max(largest);
    for (index_t i = threadIdx.x; i < width; i += blockDim.x) sum += expf(z[i] - largest);
    return make_float2(largest, block_sum(sum));
}

// log Σ exp(z) − z_target of each row.
extern "C" __global__ void cross_entropy(
    index_t width, const float *logits, const unsigned *targets, float *losses
) {
    logits += blockIdx.x * width;
    float2 p = partition(width, logits);
    if (threadIdx.x == 0) losses[blockIdx.x] = p.x - logits[targets[blockIdx.x]] + logf(p.y);
}

extern "C" __global__ void cross_entropy_backward(
    index_t width, float scale, const float *logits, const unsigned *targets, float *g
) {
    logits += blockIdx.x * width;
    g += blockIdx.x * width;
    float2 p = partition(width, logits);
    for (index_t i = threadIdx.x; i < width; i += blockDim.x)
        g[i] = scale * (expf(logits[i] - p.x) / p.y - (i == targets[blockIdx.x] ? 1.0f : 0.0f));
}

// Σ x² of 32 columns of x over a range of rows, by 8 threads a column.
extern "C" __global__ void column_squares(
    index_t width, const index_t *ranges, const float *x, float *sums
) {
    __shared__ float lanes[8][33];
    index_t column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
        for (index_t row = ranges[2 * blockIdx.y] + threadIdx.y; row < ranges[2 * blockIdx.y + 1]; row += 8)
            sum += x[row * width + column] * x[row * width + column];
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= width) return;
    for (int lane = 1; lane < 8; lane++) sum += lanes[lane][threadIdx.x];
    sums[blockIdx.y * width + column] = sum;
}

// ---- attention: a block to a row of a head's scores, [heads, rows, keys] ---------------------------

// Scores become probabilities over what each row sees: two ranges of keys, as four numbers; the
// others get 0. Where scores are capped, `slopes` gets the derivatives of the capped ones.
extern "C" __global__ void probabilities(
    index_t keys, const unsigned *seen, float cap, float *scores, float *slopes
) {
    index_t row = blockIdx.y * (index_t)gridDim.x + blockIdx.x;
    float *p = scores + row * keys;
    seen += 4 * blockIdx.x;
    float largest = LOWEST, sum = 0.0f;
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) {
        if (cap > 0.0f) {
            float t = tanhf(p[i] / cap);
            p[i] = t * cap;
            slopes[row * keys + i] = 1.0f - t * t;
        }
        bool sees = (i >= seen[0] && i < seen[1]) || (i >= seen[2] && i < seen[3]);
        if (sees) largest = fmaxf(largest, p[i]);
    }
    largest = block_max(largest);
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) {
        bool sees = (i >= seen[0] && i < seen[1]) || (i >= seen[2] && i < seen[3]);
        p[i] = sees ? expf(p[i] - largest) : 0.0f;
        sum += p[i];
    }
    float scale = 1.0f / block_sum(sum);
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) p[i] *= scale;
}

// The gradient of the probabilities becomes that of the scores.
extern "C" __global__ void probabilities_backward(
    index_t keys, int capped, const float *p, const float *slopes, float *g
) {
    index_t row = blockIdx.y * (index_t)gridDim.x + blockIdx.x;
    p += row * keys;
    g += row * keys;
    float sum = 0.0f;
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x) sum += p[i] * g[i];
    sum = block_sum(sum);
    for (index_t i = threadIdx.x; i < keys; i += blockDim.x)
        g[i] = p[i] * (g[i] - sum) * (capped ? slopes[row * keys + i] : 1.0f);
}
